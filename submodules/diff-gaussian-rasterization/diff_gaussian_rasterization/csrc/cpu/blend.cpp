// `blend`: projected Gaussians into images, front to back by index. Schema, binning, and the CPU side.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/blend_op.h"
#include "kernels.h"

namespace medgs {
namespace {

/// A counting sort in two passes over the Gaussians. Each view is cut into parts that are counted and filled in
/// parallel; parts follow each other within a tile, so the lists come out in the order of the index.
template <class S>
Pairs bin(const S* means2d, const S* conics, const uint8_t* active, const S* opacities, int64_t views, int64_t n,
          int64_t heads, const std::vector<int64_t>& view_bits, int width, int height,
          const at::TensorOptions& options) {
  const int tiles_x = generic::ceil_div(width, kTile), tiles_y = generic::ceil_div(height, kTile);
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

/// Refuses lists that would lead a kernel out of bounds. Autograd hands over what `blend` made; others may not.
void check_range(const Tensor& tensor, const char* name, int64_t low, int64_t high, bool ascending) {
  const auto* values = tensor.const_data_ptr<int32_t>();
  const int64_t size = tensor.numel();
  bool fits = true;
  for (int64_t i = 0; i < size; ++i) fits &= values[i] >= low && values[i] <= high;
  TORCH_CHECK_VALUE(fits, name, " must lie within ", low, " ... ", high);
  for (int64_t i = 1; ascending && i < size; ++i) fits &= values[i - 1] <= values[i];
  TORCH_CHECK_VALUE(fits, name, " must ascend");
}

struct Cpu {
  struct Guard {
    explicit Guard(const at::Device&) {}
  };
  static constexpr int64_t kTile = medgs::kTile;

  template <class S>
  static Pairs bin(const BlendInputs& of, int64_t /*capacity*/) {
    return medgs::bin<S>(of.means2d.const_data_ptr<S>(), of.conics.const_data_ptr<S>(),
                         of.active.const_data_ptr<uint8_t>(), of.opacities.const_data_ptr<S>(), of.means2d.size(0),
                         of.means2d.size(1), of.opacities.size(0), of.view_bits, int(of.width), int(of.height),
                         of.means2d.options());
  }
  static int64_t room(const BlendInputs&, const Pairs&, int64_t) { return 0; }
  static void check_lists(const BlendInputs& of, const Pairs& pairs) {
    const int64_t last = pairs.count() - 1;
    check_range(pairs.tile_offsets, "tile_offsets", 0, last + 1, true);
    check_range(pairs.gaussian_offsets, "gaussian_offsets", 0, last + 1, true);
    check_range(pairs.gaussians, "pair_gaussians", 0, of.means2d.size(1) - 1, false);
    check_range(pairs.slots, "pair_slots", 0, last, false);
  }
  template <class S>
  static void blend(const BlendArguments<S>& in, const Pairs&) {
    kernels<S>().blend(in, at::get_num_threads());
  }
  template <class S>
  static void blend_backward(const BlendArguments<S>& in, const Pairs&) {
    kernels<S>().blend_backward(in, at::get_num_threads());
  }
  template <class S>
  static void sum_records(const BlendArguments<S>& in, int64_t heads) {
    kernels<S>().sum_records(in, heads, at::get_num_threads());
  }
};

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

TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CPU, m) { register_blend<Cpu>(m); }

}  // namespace medgs
