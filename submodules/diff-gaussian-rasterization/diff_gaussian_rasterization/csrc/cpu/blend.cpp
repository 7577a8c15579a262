// `blend`: projected Gaussians into images, front to back by index. Schema, binning, and the CPU side.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"

namespace medgs {
namespace {

/// Pairs of Gaussian and tile. A pair's slot is its place Gaussian by Gaussian (view, then index), so that the records
/// of one Gaussian lie together; its place in the tile lists is tile by tile (view, then tile), front to back.
struct Pairs {
  Tensor tile_offsets;      // (V, tiles + 1) int32
  Tensor gaussians, slots;  // (pairs) int32, in tile order
  Tensor gaussian_offsets;  // (V N + 1) int32: slots of each Gaussian of each view
};

/// A counting sort in two passes over the Gaussians. Each view is cut into parts that are counted and filled in
/// parallel; parts follow each other within a tile, so the lists come out in the order of the index.
template <class S>
Pairs bin(const S* means2d, const S* conics, const uint8_t* active, const S* opacities, int64_t views, int64_t n,
          int64_t heads, const std::vector<int64_t>& view_bits, int width, int height,
          const at::TensorOptions& options) {
  const int tiles_x = (width + kTile - 1) / kTile, tiles_y = (height + kTile - 1) / kTile;
  const int64_t tiles = int64_t(tiles_x) * tiles_y;
  const int threads = at::get_num_threads();
  // At most as many parts as keep their counts of the tiles to 32 MB.
  const int64_t affordable = (int64_t(1) << 22) / std::max<int64_t>(1, views * tiles);
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>({threads, n / 1024, affordable}));
  const auto part_begin = [&](int64_t part) { return part * n / parts; };

  std::vector<S> limits(n);  // a pair exists where some head can be seen
  for (int64_t i = 0; i < n; ++i) {
    S opacity = 0;
    for (int64_t h = 0; h < heads; ++h) opacity = std::max(opacity, opacities[h * n + i]);
    limits[i] = generic::visible_limit(opacity);
  }

  const std::unique_ptr<TileRectangle[]> rectangles(new TileRectangle[views * n]);
  std::vector<int64_t> counts(views * parts * tiles, 0);  // then: where each part's pairs of a tile start
  std::vector<int64_t> part_slots(views * parts + 1, 0);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(views* n, threads))
  for (int64_t job = 0; job < views * parts; ++job) {
    const int64_t view = job / parts, part = job % parts;
    const int64_t begin = part_begin(part), end = part_begin(part + 1);
    int64_t* count = counts.data() + job * tiles;
    int64_t pairs = 0;
    BoundsArguments<S> bounds{};
    bounds.means2d = means2d + 2 * view * n;
    bounds.conics = conics + 3 * view * n;
    bounds.active = active + view * n;
    bounds.limits = limits.data();
    bounds.bits = uint8_t(view_bits[view]);
    bounds.width = width;
    bounds.height = height;
    bounds.rectangles = rectangles.get() + view * n;
    kernels<S>().bound(bounds, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      const TileRectangle r = bounds.rectangles[i];
      pairs += (r.x1 - r.x0) * (r.y1 - r.y0);
      for (int y = r.y0; y < r.y1; ++y)
        for (int x = r.x0; x < r.x1; ++x) ++count[y * tiles_x + x];
    }
    part_slots[job + 1] = pairs;
  }
  std::partial_sum(part_slots.begin(), part_slots.end(), part_slots.begin());
  const int64_t total = part_slots.back();
  TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), "blend: ", total,
              " pairs of Gaussian and tile are more than 2^31: render fewer views at once, or smaller images");

  const auto ints = options.dtype(at::kInt);
  Pairs out = {at::empty({views, tiles + 1}, ints), at::empty({total}, ints), at::empty({total}, ints),
               at::empty({views * n + 1}, ints)};
  int32_t* tile_offsets = out.tile_offsets.mutable_data_ptr<int32_t>();
  for (int64_t view = 0; view < views; ++view) {
    int64_t next = part_slots[view * parts];
    for (int64_t tile = 0; tile < tiles; ++tile) {
      tile_offsets[view * (tiles + 1) + tile] = int32_t(next);
      for (int64_t part = 0; part < parts; ++part) {
        int64_t& count = counts[(view * parts + part) * tiles + tile];
        const int64_t start = next;
        next += count;
        count = start;
      }
    }
    tile_offsets[view * (tiles + 1) + tiles] = int32_t(next);
  }

  int32_t* gaussians = out.gaussians.mutable_data_ptr<int32_t>();
  int32_t* slots = out.slots.mutable_data_ptr<int32_t>();
  int32_t* gaussian_offsets = out.gaussian_offsets.mutable_data_ptr<int32_t>();
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(views* n, threads))
  for (int64_t job = 0; job < views * parts; ++job) {
    const int64_t view = job / parts, part = job % parts;
    const int64_t begin = part_begin(part), end = part_begin(part + 1);
    int64_t* next = counts.data() + job * tiles;
    int64_t slot = part_slots[job];
    for (int64_t i = begin; i < end; ++i) {
      const TileRectangle r = rectangles[view * n + i];
      gaussian_offsets[view * n + i] = int32_t(slot);
      for (int y = r.y0; y < r.y1; ++y)
        for (int x = r.x0; x < r.x1; ++x) {
          const int64_t at = next[y * tiles_x + x]++;
          gaussians[at] = int32_t(i);
          slots[at] = int32_t(slot++);
        }
    }
  }
  gaussian_offsets[views * n] = int32_t(total);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> blend_cpu(
    const Tensor& means2d, const Tensor& conics, const Tensor& active, const Tensor& opacities, const Tensor& colours,
    const Tensor& backgrounds, const std::optional<Tensor>& screen, IntArrayRef views, IntArrayRef heads,
    IntArrayRef bits, int64_t width, int64_t height, bool raw, int64_t capacity) {
  check_blend(means2d, conics, active, opacities, colours, backgrounds, screen, views, heads, bits, width, height,
              capacity);
  const int64_t v = means2d.size(0), n = means2d.size(1), r = int64_t(views.size()), c = colours.size(2);
  const Tensor p[] = {means2d.contiguous(),         conics.contiguous(),
                      active.contiguous(),          active_opacities(opacities, raw),
                      active_colours(colours, raw), backgrounds.contiguous()};
  const auto view_bits = bits_of_views(v, views, bits);
  const auto check = renders_to_check(view_bits, views, bits);
  auto images = at::empty({r, c, height, width}, means2d.options());
  auto transmittance = at::empty({r, height, width}, means2d.options());
  auto stops = at::empty({r, height, width}, means2d.options().dtype(at::kInt));
  Pairs pairs;
  AT_DISPATCH_FLOATING_TYPES(means2d.scalar_type(), "blend", [&] {
    pairs = bin<scalar_t>(p[0].const_data_ptr<scalar_t>(), p[1].const_data_ptr<scalar_t>(),
                          p[2].const_data_ptr<uint8_t>(), p[3].const_data_ptr<scalar_t>(), v, n, opacities.size(0),
                          view_bits, int(width), int(height), means2d.options());
    auto in = blend_arguments<scalar_t>(p[0], p[1], p[2], p[3], p[4], pairs.tile_offsets, pairs.gaussians, pairs.slots,
                                        views, heads, bits, check.get(), width, height, kTile);
    in.backgrounds = p[5].const_data_ptr<scalar_t>();
    in.images = images.mutable_data_ptr<scalar_t>();
    in.transmittance = transmittance.mutable_data_ptr<scalar_t>();
    in.stops = stops.mutable_data_ptr<int32_t>();
    kernels<scalar_t>().blend(in, at::get_num_threads());
  });
  return {images,
          transmittance,
          stops,
          pairs.tile_offsets,
          pairs.gaussians,
          pairs.slots,
          pairs.gaussian_offsets,
          at::empty({0}, means2d.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> blend_backward_cpu(
    const Tensor& v_images, const Tensor& v_transmittance, const Tensor& images, const Tensor& transmittance,
    const Tensor& stops, const Tensor& tile_offsets, const Tensor& pair_gaussians, const Tensor& pair_slots,
    const Tensor& gaussian_offsets, const Tensor& /*starts*/, const Tensor& means2d, const Tensor& conics,
    const Tensor& active, const Tensor& opacities, const Tensor& colours, IntArrayRef views, IntArrayRef heads,
    IntArrayRef bits, int64_t width, int64_t height, bool raw) {
  const int64_t v = means2d.size(0), r = int64_t(views.size()), c = colours.size(2);
  check_float(v_images, "v_images", {r, c, height, width}, means2d);
  check_float(v_transmittance, "v_transmittance", {r, height, width}, means2d);
  const Tensor p[] = {means2d.contiguous(), conics.contiguous(), active.contiguous(), active_opacities(opacities, raw),
                      active_colours(colours, raw)};
  const auto g_images = v_images.contiguous(), g_transmittance = v_transmittance.contiguous();
  const auto view_bits = bits_of_views(v, views, bits);
  const auto check = renders_to_check(view_bits, views, bits);
  // The k-th render of a view writes its records to layer k.
  const int64_t pairs = pair_slots.size(0), records = layers_of(views) * pairs;
  std::vector<int64_t> render_slots(r);
  for (int64_t i = 0; i < r; ++i) render_slots[i] = std::count(views.begin(), views.begin() + i, views[i]) * pairs;
  auto v_means2d = at::empty({opacities.size(0), v, means2d.size(1), 2}, means2d.options());
  auto v_conics = opacities.size(0) > 0 ? at::empty_like(p[1]) : at::zeros_like(p[1]);
  auto v_opacities = at::empty_like(p[3]), v_colours = at::empty_like(p[4]);
  AT_DISPATCH_FLOATING_TYPES(means2d.scalar_type(), "blend_backward", [&] {
    auto in = blend_arguments<scalar_t>(p[0], p[1], p[2], p[3], p[4], tile_offsets, pair_gaussians, pair_slots, views,
                                        heads, bits, check.get(), width, height, kTile);
    auto buffer = at::empty({records, record_size(c)}, means2d.options());
    in.images = images.data_ptr<scalar_t>();
    in.transmittance = transmittance.data_ptr<scalar_t>();
    in.stops = stops.data_ptr<int32_t>();
    in.v_images = g_images.const_data_ptr<scalar_t>();
    in.v_transmittance = g_transmittance.const_data_ptr<scalar_t>();
    in.render_slots = render_slots.data();
    in.gaussian_offsets = gaussian_offsets.const_data_ptr<int32_t>();
    in.records = buffer.mutable_data_ptr<scalar_t>();
    kernels<scalar_t>().blend_backward(in, at::get_num_threads());
    in.v_means2d = v_means2d.mutable_data_ptr<scalar_t>();
    in.v_conics = v_conics.mutable_data_ptr<scalar_t>();
    in.v_opacities = v_opacities.mutable_data_ptr<scalar_t>();
    in.v_colours = v_colours.mutable_data_ptr<scalar_t>();
    kernels<scalar_t>().sum_records(in, opacities.size(0), at::get_num_threads());
  });
  if (raw) to_raw(p[3], p[4], v_opacities, v_colours);
  return {v_means2d, v_conics, v_opacities, v_colours};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(diff_gaussian_rasterization, m) {
  m.def(
      "blend(Tensor means2d, Tensor conics, Tensor active, Tensor opacities, Tensor colours, Tensor backgrounds, "
      "Tensor? screen, int[] views, int[] heads, int[] bits, int width, int height, bool raw, int capacity=0) "
      "-> (Tensor images, Tensor transmittance, Tensor stops, Tensor tile_offsets, Tensor pair_gaussians, "
      "Tensor pair_slots, Tensor gaussian_offsets, Tensor starts)");
  m.def(
      "blend_backward(Tensor v_images, Tensor v_transmittance, Tensor images, Tensor transmittance, Tensor stops, "
      "Tensor tile_offsets, Tensor pair_gaussians, Tensor pair_slots, Tensor gaussian_offsets, Tensor starts, "
      "Tensor means2d, Tensor conics, Tensor active, Tensor opacities, Tensor colours, int[] views, int[] heads, "
      "int[] bits, int width, int height, bool raw) "
      "-> (Tensor v_means2d, Tensor v_conics, Tensor v_opacities, Tensor v_colours)");
}

TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CPU, m) {
  m.impl("blend", &blend_cpu);
  m.impl("blend_backward", &blend_backward_cpu);
}

}  // namespace medgs
