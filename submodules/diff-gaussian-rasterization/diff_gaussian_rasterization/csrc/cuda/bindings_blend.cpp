// `blend` for CUDA tensors: checks, bins, allocates, launches.
#include "bindings.h"

namespace medgs {
namespace {

constexpr int64_t kPixels = int64_t(cuda::kTile) * cuda::kTile;  // of a tile

struct Pairs {
  Tensor tile_offsets, gaussians, slots, gaussian_offsets;  // as in cpu/blend.cpp
};

/// Places of arrays in one allocation. As one, what is scratch leaves room that larger tensors fit into afterwards.
struct Layout {
  size_t bytes = 0;

  size_t add(size_t size) {
    const size_t at = bytes;
    bytes += (size + 255) / 256 * 256;  // as aligned as an allocation
    return at;
  }
};

/// With a `capacity` there is room for that many pairs, and the device is not asked how many there are.
template <class S>
Pairs bin(const Tensor& means2d, const Tensor& conics, const Tensor& active, const Tensor& opacities,
          const std::vector<int64_t>& view_bits, int width, int height, int64_t capacity, cudaStream_t stream) {
  const int64_t views = means2d.size(0), n = means2d.size(1), rows = views * n;
  const int tiles_x = (width + cuda::kTile - 1) / cuda::kTile, tiles_y = (height + cuda::kTile - 1) / cuda::kTile;
  const int64_t tiles = int64_t(tiles_x) * tiles_y;
  int key_bits = 1;
  while ((int64_t(1) << key_bits) < views * tiles) ++key_bits;
  const auto ints = means2d.options().dtype(at::kInt), bytes = means2d.options().dtype(at::kByte);
  const auto allocate = [&](const Layout& layout) {
    return at::empty({int64_t(std::max<size_t>(layout.bytes, 1))}, bytes);
  };
  auto offsets = at::empty({rows + 1}, ints);

  Layout layout;
  size_t scan_bytes = 0, sort_bytes = 0;
  C10_CUDA_CHECK(cuda::launch_scan(nullptr, scan_bytes, nullptr, nullptr, rows, stream));
  const size_t rectangles = layout.add(size_t(rows) * 8), counts = layout.add(size_t(rows) * 4);
  const size_t scan = layout.add(scan_bytes);
  struct {
    size_t unsorted, sorted, slots, owners, sort;
  } at_pairs{};
  const auto lay_out_pairs = [&](int64_t pairs) {
    TORCH_CHECK(
        pairs <= cuda::kMostPairs,
        "blend: the pairs of Gaussian and tile are more than 2^31: render fewer views at once, or smaller images");
    const size_t size = size_t(pairs) * 4;
    at_pairs = {layout.add(size), layout.add(size), layout.add(size), layout.add(size), 0};
    if (pairs == 0) return;
    C10_CUDA_CHECK(cuda::launch_sort(nullptr, sort_bytes, nullptr, nullptr, nullptr, nullptr, pairs, key_bits, stream));
    at_pairs.sort = layout.add(sort_bytes);
  };
  if (capacity > 0) lay_out_pairs(capacity);
  const Tensor scratch = allocate(layout);
  auto* counting = scratch.mutable_data_ptr<uint8_t>();
  auto* counted = reinterpret_cast<int32_t*>(counting + counts);
  C10_CUDA_CHECK(cuda::launch_count_pairs(means2d.const_data_ptr<S>(), conics.const_data_ptr<S>(),
                                          active.const_data_ptr<uint8_t>(), opacities.const_data_ptr<S>(), views, n,
                                          opacities.size(0), view_bits.data(), width, height, counting + rectangles,
                                          counted, stream));
  C10_CUDA_CHECK(
      cuda::launch_scan(counting + scan, scan_bytes, counted, offsets.mutable_data_ptr<int32_t>(), rows, stream));
  int32_t pairs = int32_t(capacity);
  Tensor more = scratch;
  if (capacity == 0) {  // the one host synchronisation of a render
    C10_CUDA_CHECK(
        cudaMemcpyAsync(&pairs, offsets.data_ptr<int32_t>() + rows, sizeof pairs, cudaMemcpyDeviceToHost, stream));
    C10_CUDA_CHECK(cudaStreamSynchronize(stream));
    layout = Layout();
    lay_out_pairs(pairs);
    more = allocate(layout);
  }
  Pairs out = {at::empty({views, tiles + 1}, ints), at::empty({pairs}, ints), at::empty({pairs}, ints), offsets};
  auto* sorting = more.mutable_data_ptr<uint8_t>();
  auto* unsorted = reinterpret_cast<uint32_t*>(sorting + at_pairs.unsorted);
  auto* sorted = reinterpret_cast<uint32_t*>(sorting + at_pairs.sorted);
  auto* slots = reinterpret_cast<int32_t*>(sorting + at_pairs.slots);
  auto* owners = reinterpret_cast<int32_t*>(sorting + at_pairs.owners);
  auto* sorted_slots = out.slots.mutable_data_ptr<int32_t>();
  if (pairs > 0) {
    C10_CUDA_CHECK(cuda::launch_emit_pairs(counting + rectangles, offsets.data_ptr<int32_t>(), views, n, tiles_x,
                                           tiles_y, pairs, unsorted, slots, owners, stream));
    C10_CUDA_CHECK(cuda::launch_sort(sorting + at_pairs.sort, sort_bytes, unsorted, sorted, slots, sorted_slots, pairs,
                                     key_bits, stream));
  }
  C10_CUDA_CHECK(cuda::launch_tile_ranges(sorted, sorted_slots, owners, offsets.data_ptr<int32_t>() + rows, pairs,
                                          views, tiles, out.tile_offsets.mutable_data_ptr<int32_t>(),
                                          out.gaussians.mutable_data_ptr<int32_t>(), stream));
  return out;
}

/// Cuts the tiles' lists into segments; `starts` are theirs. Returns the list of segments, which `in` points to.
template <class S>
Tensor cut_lists(BlendArguments<S>& in, const Tensor& tile_offsets, const Tensor& starts, int64_t pairs, int64_t layers,
                 cudaStream_t stream) {
  const int64_t tiles = in.tiles_x * in.tiles_y;
  in.pairs = pairs;
  in.segments = cuda::segment_count(pairs, in.view_count, tiles);
  in.layers = layers;
  in.starts = starts.data_ptr<S>();
  Tensor segment_tiles = at::empty({in.segments}, tile_offsets.options());
  C10_CUDA_CHECK(cuda::launch_list_segments(tile_offsets.const_data_ptr<int32_t>(), in.view_count, tiles, in.segments,
                                            segment_tiles.mutable_data_ptr<int32_t>(), stream));
  in.segment_tiles = segment_tiles.const_data_ptr<int32_t>();
  return segment_tiles;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> blend_cuda(
    const Tensor& means2d, const Tensor& conics, const Tensor& active, const Tensor& opacities, const Tensor& colours,
    const Tensor& backgrounds, const std::optional<Tensor>& screen, IntArrayRef views, IntArrayRef heads,
    IntArrayRef bits, int64_t width, int64_t height, bool raw, int64_t capacity) {
  check_blend(means2d, conics, active, opacities, colours, backgrounds, screen, views, heads, bits, width, height,
              capacity);
  const c10::cuda::CUDAGuard guard(means2d.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const int64_t r = int64_t(views.size()), c = colours.size(2);
  const Tensor p[] = {means2d.contiguous(),         conics.contiguous(),
                      active.contiguous(),          active_opacities(opacities, raw),
                      active_colours(colours, raw), backgrounds.contiguous()};
  const auto view_bits = bits_of_views(means2d.size(0), views, bits);
  const auto check = renders_to_check(view_bits, views, bits);
  auto images = at::empty({r, c, height, width}, means2d.options());
  auto transmittance = at::empty({r, height, width}, means2d.options());
  auto stops = at::empty({r, height, width}, means2d.options().dtype(at::kInt));
  Tensor starts;
  Pairs pairs;
  AT_DISPATCH_FLOATING_TYPES(means2d.scalar_type(), "blend", [&] {
    pairs = bin<scalar_t>(p[0], p[1], p[2], p[3], view_bits, int(width), int(height), capacity, stream);
    auto in = blend_arguments<scalar_t>(p[0], p[1], p[2], p[3], p[4], pairs.tile_offsets, pairs.gaussians, pairs.slots,
                                        views, heads, bits, check.get(), width, height, cuda::kTile);
    in.backgrounds = p[5].const_data_ptr<scalar_t>();
    in.images = images.mutable_data_ptr<scalar_t>();
    in.transmittance = transmittance.mutable_data_ptr<scalar_t>();
    in.stops = stops.mutable_data_ptr<int32_t>();
    const int64_t layers = layers_of(views);
    const int64_t segments = cuda::segment_count(pairs.slots.size(0), in.view_count, in.tiles_x * in.tiles_y);
    // Zeros: segments that stay unused are an output, too, and hold nothing that was in memory before.
    starts = at::zeros({layers * segments * (c + 1) * kPixels}, means2d.options());
    const Tensor segment_tiles = cut_lists(in, pairs.tile_offsets, starts, pairs.slots.size(0), layers, stream);
    if (r > 0) C10_CUDA_CHECK(cuda::launch_blend(in, stream));
  });
  return {images,      transmittance,          stops, pairs.tile_offsets, pairs.gaussians,
          pairs.slots, pairs.gaussian_offsets, starts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> blend_backward_cuda(
    const Tensor& v_images, const Tensor& v_transmittance, const Tensor& images, const Tensor& transmittance,
    const Tensor& stops, const Tensor& tile_offsets, const Tensor& pair_gaussians, const Tensor& pair_slots,
    const Tensor& gaussian_offsets, const Tensor& starts, const Tensor& means2d, const Tensor& conics,
    const Tensor& active, const Tensor& opacities, const Tensor& colours, IntArrayRef views, IntArrayRef heads,
    IntArrayRef bits, int64_t width, int64_t height, bool raw) {
  const c10::cuda::CUDAGuard guard(means2d.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const int64_t v = means2d.size(0), r = int64_t(views.size()), c = colours.size(2);
  check_float(v_images, "v_images", {r, c, height, width}, means2d);
  check_float(v_transmittance, "v_transmittance", {r, height, width}, means2d);
  const Tensor p[] = {means2d.contiguous(), conics.contiguous(), active.contiguous(), active_opacities(opacities, raw),
                      active_colours(colours, raw)};
  const auto g_images = v_images.contiguous(), g_transmittance = v_transmittance.contiguous();
  const auto view_bits = bits_of_views(v, views, bits);
  const auto check = renders_to_check(view_bits, views, bits);
  const int64_t layers = layers_of(views);
  auto v_means2d = at::empty({opacities.size(0), v, means2d.size(1), 2}, means2d.options()),
       v_conics = opacities.size(0) > 0 ? at::empty_like(p[1]) : at::zeros_like(p[1]);
  auto v_opacities = at::empty_like(p[3]), v_colours = at::empty_like(p[4]);
  AT_DISPATCH_FLOATING_TYPES(means2d.scalar_type(), "blend_backward", [&] {
    auto in = blend_arguments<scalar_t>(p[0], p[1], p[2], p[3], p[4], tile_offsets, pair_gaussians, pair_slots, views,
                                        heads, bits, check.get(), width, height, cuda::kTile);
    auto buffer = at::empty({layers, pair_slots.size(0), record_size(c)}, means2d.options());
    in.images = images.data_ptr<scalar_t>();
    in.transmittance = transmittance.data_ptr<scalar_t>();
    in.stops = stops.data_ptr<int32_t>();
    in.v_images = g_images.const_data_ptr<scalar_t>();
    in.v_transmittance = g_transmittance.const_data_ptr<scalar_t>();
    const Tensor segment_tiles = cut_lists(in, tile_offsets, starts, pair_slots.size(0), layers, stream);
    in.gaussian_offsets = gaussian_offsets.const_data_ptr<int32_t>();
    in.records = buffer.mutable_data_ptr<scalar_t>();
    if (r > 0) C10_CUDA_CHECK(cuda::launch_blend_backward(in, stream));
    C10_CUDA_CHECK(cuda::launch_sum_records(
        in, opacities.size(0), v_means2d.mutable_data_ptr<scalar_t>(), v_conics.mutable_data_ptr<scalar_t>(),
        v_opacities.mutable_data_ptr<scalar_t>(), v_colours.mutable_data_ptr<scalar_t>(), stream));
  });
  if (raw) to_raw(p[3], p[4], v_opacities, v_colours);
  return {v_means2d, v_conics, v_opacities, v_colours};
}

}  // namespace

TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) {
  m.impl("blend", &blend_cuda);
  m.impl("blend_backward", &blend_backward_cuda);
}

}  // namespace medgs
