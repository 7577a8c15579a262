// `blend` for CUDA tensors: bins, cuts the lists into segments, launches.
#include "../common/blend_op.h"
#include "bindings.h"

namespace medgs {
namespace {

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
Pairs bin(const BlendInputs& of, int64_t capacity, cudaStream_t stream) {
  const Tensor &means2d = of.means2d, &conics = of.conics, &active = of.active, &opacities = of.opacities;
  const int width = int(of.width), height = int(of.height);
  const int64_t views = means2d.size(0), n = means2d.size(1), rows = views * n;
  const int tiles_x = int(of.tiles_x(cuda::kTile)), tiles_y = int(of.tiles_y(cuda::kTile));
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
  const size_t rectangles = layout.add(size_t(rows) * sizeof(TileRectangle)), counts = layout.add(size_t(rows) * 4);
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
  auto* reached = reinterpret_cast<TileRectangle*>(counting + rectangles);
  C10_CUDA_CHECK(cuda::launch_count_pairs(means2d.const_data_ptr<S>(), conics.const_data_ptr<S>(),
                                          active.const_data_ptr<uint8_t>(), opacities.const_data_ptr<S>(), views, n,
                                          opacities.size(0), of.view_bits.data(), width, height, reached, counted,
                                          stream));
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
    C10_CUDA_CHECK(cuda::launch_emit_pairs(reached, offsets.data_ptr<int32_t>(), views, n, tiles_x, tiles_y, pairs,
                                           unsorted, slots, owners, stream));
    C10_CUDA_CHECK(cuda::launch_sort(sorting + at_pairs.sort, sort_bytes, unsorted, sorted, slots, sorted_slots, pairs,
                                     key_bits, stream));
  }
  C10_CUDA_CHECK(cuda::launch_tile_ranges(sorted, sorted_slots, owners, offsets.data_ptr<int32_t>() + rows, pairs,
                                          views, tiles, out.tile_offsets.mutable_data_ptr<int32_t>(),
                                          out.gaussians.mutable_data_ptr<int32_t>(), stream));
  return out;
}

/// The arguments of one launch: the lists of its tiles are cut into segments.
template <class S>
struct Segmented {
  BlendArguments<S> in;
  Tensor tiles;  // of the segments

  Segmented(const BlendArguments<S>& of, const Pairs& pairs, cudaStream_t stream) : in(of) {
    const int64_t count = in.tiles_x * in.tiles_y;
    in.segments = cuda::segment_count(in.pairs, in.view_count, count);
    tiles = at::empty({in.segments}, pairs.tile_offsets.options());
    C10_CUDA_CHECK(cuda::launch_list_segments(in.tile_offsets, in.view_count, count, in.segments,
                                              tiles.mutable_data_ptr<int32_t>(), stream));
    in.segment_tiles = tiles.const_data_ptr<int32_t>();
  }
};

struct Cuda {
  using Guard = c10::cuda::CUDAGuard;
  static constexpr int64_t kTile = cuda::kTile;

  template <class S>
  static Pairs bin(const BlendInputs& of, int64_t capacity) {
    return medgs::bin<S>(of, capacity, at::cuda::getCurrentCUDAStream());
  }
  static int64_t room(const BlendInputs& of, const Pairs& pairs, int64_t channels) {
    const int64_t tiles = of.tiles_x(kTile) * of.tiles_y(kTile);
    return of.layers() * cuda::segment_count(pairs.count(), of.means2d.size(0), tiles) * cuda::start_size(channels);
  }
  static void check_lists(const BlendInputs&, const Pairs&) {}  // a look into them would wait for the device
  template <class S>
  static void blend(const BlendArguments<S>& of, const Pairs& pairs) {
    const auto stream = at::cuda::getCurrentCUDAStream();
    const Segmented<S> cut(of, pairs, stream);
    if (of.renders > 0) C10_CUDA_CHECK(cuda::launch_blend(cut.in, stream));
  }
  template <class S>
  static void blend_backward(const BlendArguments<S>& of, const Pairs& pairs) {
    const auto stream = at::cuda::getCurrentCUDAStream();
    const Segmented<S> cut(of, pairs, stream);
    if (of.renders > 0) C10_CUDA_CHECK(cuda::launch_blend_backward(cut.in, stream));
  }
  template <class S>
  static void sum_records(const BlendArguments<S>& in, int64_t heads) {
    C10_CUDA_CHECK(cuda::launch_sum_records(in, heads, at::cuda::getCurrentCUDAStream()));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) { register_blend<Cuda>(m); }

}  // namespace medgs
