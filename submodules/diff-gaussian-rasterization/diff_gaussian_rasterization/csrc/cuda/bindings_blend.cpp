// `blend` and `splat` for CUDA tensors: bins, cuts the lists into segments, launches.
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
  const int width = int(of.width), height = int(of.height);
  const int64_t views = of.view_count, n = of.gaussians, rows = views * n;
  const int32_t* order = data<int32_t>(of.order);
  const int tiles_x = int(of.tiles_x(cuda::kTile)), tiles_y = int(of.tiles_y(cuda::kTile));
  const int64_t tiles = int64_t(tiles_x) * tiles_y;
  int key_bits = 1;
  while ((int64_t(1) << key_bits) < views * tiles) ++key_bits;
  const auto ints = [&](const Shape& shape) { return empty(shape, of.means2d, ScalarType::Int); };
  const auto allocate = [&](const Layout& layout) {
    return empty({int64_t(std::max<size_t>(layout.bytes, 1))}, of.means2d, ScalarType::Byte);
  };
  const Tensor offsets = ints({rows + 1});

  Layout layout;
  size_t scan_bytes = 0, sort_bytes = 0;
  MEDGS_CUDA_CHECK(cuda::launch_scan(nullptr, scan_bytes, nullptr, nullptr, rows, stream));
  const size_t rectangles = layout.add(size_t(rows) * sizeof(TileRectangle)), counts = layout.add(size_t(rows) * 4);
  const size_t scan = layout.add(scan_bytes);
  struct {
    size_t unsorted, sorted, slots, owners, sort;
  } at_pairs{};
  const auto lay_out_pairs = [&](int64_t pairs) {
    MEDGS_CHECK(
        pairs <= cuda::kMostPairs,
        "blend: the pairs of Gaussian and tile are more than 2^31: render fewer views at once, or smaller images");
    const size_t size = size_t(pairs) * 4;
    at_pairs = {layout.add(size), layout.add(size), layout.add(size), layout.add(size), 0};
    if (pairs == 0) return;
    MEDGS_CUDA_CHECK(
        cuda::launch_sort(nullptr, sort_bytes, nullptr, nullptr, nullptr, nullptr, pairs, key_bits, stream));
    at_pairs.sort = layout.add(sort_bytes);
  };
  if (capacity > 0) lay_out_pairs(capacity);
  const Tensor scratch = allocate(layout);
  auto* counting = writable<uint8_t>(scratch);
  auto* counted = reinterpret_cast<int32_t*>(counting + counts);
  auto* reached = reinterpret_cast<TileRectangle*>(counting + rectangles);
  MEDGS_CUDA_CHECK(cuda::launch_count_pairs(data<S>(of.means2d), data<S>(of.conics), data<uint8_t>(of.active),
                                            data<S>(of.opacities), order, views, n, of.head_count, of.view_bits.data(),
                                            width, height, reached, counted, stream));
  MEDGS_CUDA_CHECK(cuda::launch_scan(counting + scan, scan_bytes, counted, writable<int32_t>(offsets), rows, stream));
  int32_t pairs = int32_t(capacity);
  Tensor more = scratch;
  if (capacity == 0) {  // the one host synchronisation of a render
    MEDGS_CUDA_CHECK(
        cudaMemcpyAsync(&pairs, data<int32_t>(offsets) + rows, sizeof pairs, cudaMemcpyDeviceToHost, stream));
    MEDGS_CUDA_CHECK(cudaStreamSynchronize(stream));
    layout = Layout();
    lay_out_pairs(pairs);
    more = allocate(layout);
  }
  Pairs out = {cuda::kTile, ints({views, tiles + 1}), ints({pairs}), ints({pairs}), offsets};
  auto* sorting = writable<uint8_t>(more);
  auto* unsorted = reinterpret_cast<uint32_t*>(sorting + at_pairs.unsorted);
  auto* sorted = reinterpret_cast<uint32_t*>(sorting + at_pairs.sorted);
  auto* slots = reinterpret_cast<int32_t*>(sorting + at_pairs.slots);
  auto* owners = reinterpret_cast<int32_t*>(sorting + at_pairs.owners);
  auto* sorted_slots = writable<int32_t>(out.slots);
  if (pairs > 0) {
    MEDGS_CUDA_CHECK(cuda::launch_emit_pairs(reached, data<int32_t>(offsets), order, views, n, tiles_x, tiles_y, pairs,
                                             unsorted, slots, owners, stream));
    MEDGS_CUDA_CHECK(cuda::launch_sort(sorting + at_pairs.sort, sort_bytes, unsorted, sorted, slots, sorted_slots,
                                       pairs, key_bits, stream));
  }
  MEDGS_CUDA_CHECK(cuda::launch_tile_ranges(sorted, sorted_slots, owners, data<int32_t>(offsets) + rows, pairs, views,
                                            tiles, writable<int32_t>(out.tile_offsets),
                                            writable<int32_t>(out.gaussians), stream));
  return out;
}

/// The arguments of one launch: the lists of its tiles are cut into segments.
template <class S>
struct Segmented {
  BlendArguments<S> in;
  Tensor tiles;  // of the segments

  Segmented(const BlendArguments<S>& of, const Pairs& pairs, cudaStream_t stream)
      : in(of),
        tiles(empty({cuda::segment_count(of.pairs, of.view_count, of.tiles_x * of.tiles_y)}, pairs.tile_offsets)) {
    const int64_t count = in.tiles_x * in.tiles_y;
    in.segments = tiles.numel();
    in.slots = cuda::slot_count(in.pairs);
    MEDGS_CUDA_CHECK(cuda::launch_list_segments(in.tile_offsets, in.view_count, count, in.pairs, in.segments,
                                                writable<int32_t>(tiles), stream));
    in.segment_tiles = data<int32_t>(tiles);
  }
};

struct Cuda {
  using Guard = CudaGuard;

  static int64_t tile_of(const BlendInputs&, const Tensor&) { return cuda::kTile; }
  template <class S>
  static Pairs bin(const BlendInputs& of, int64_t capacity) {
    return medgs::bin<S>(of, capacity, current_stream());
  }
  static int64_t room(const BlendInputs& of, const Pairs& pairs, int64_t channels) {
    return of.layers() * cuda::slot_count(pairs.count()) * cuda::start_size(channels);
  }
  static void check_lists(const BlendInputs&, const Pairs&) {}  // a look into them would wait for the device
  static void check_order(const Tensor&) {}
  template <class S>
  static void blend(const BlendArguments<S>& of, const Pairs& pairs) {
    const auto stream = current_stream();
    const Segmented<S> cut(of, pairs, stream);
    if (of.renders > 0) MEDGS_CUDA_CHECK(cuda::launch_blend(cut.in, stream));
  }
  template <class S>
  static void blend_backward(const BlendArguments<S>& of, const Pairs& pairs) {
    const auto stream = current_stream();
    const Segmented<S> cut(of, pairs, stream);
    if (of.renders > 0) MEDGS_CUDA_CHECK(cuda::launch_blend_backward(cut.in, stream));
  }
  template <class S>
  static void sum_records(const BlendArguments<S>& in, int64_t heads) {
    MEDGS_CUDA_CHECK(cuda::launch_sum_records(in, heads, current_stream()));
  }
  template <class S>
  static void activate(const S* raw, const S* raw_colours, int64_t opacities, int64_t colours, S* activated,
                       S* clamped) {
    MEDGS_CUDA_CHECK(cuda::launch_activate(raw, raw_colours, opacities, colours, activated, clamped, current_stream()));
  }
  template <class S>
  static void activate_backward(const S* activated, const S* clamped, int64_t opacities, int64_t colours,
                                S* v_opacities, S* v_colours) {
    MEDGS_CUDA_CHECK(cuda::launch_activate_backward(activated, clamped, opacities, colours, v_opacities, v_colours,
                                                    current_stream()));
  }
  template <class S>
  static void prepare(const SplatArguments<S>& in) {
    MEDGS_CUDA_CHECK(cuda::launch_prepare(in, current_stream()));
  }
  template <class S>
  static void split(const SplatArguments<S>& in) {
    MEDGS_CUDA_CHECK(cuda::launch_split(in, current_stream()));
  }
  template <class S>
  static void sort_by_depth(const Tensor& depths, const Tensor& radii, const Tensor& order) {
    const auto stream = current_stream();
    const int64_t n = order.numel();
    size_t bytes = 0;
    MEDGS_CUDA_CHECK(cuda::launch_order<S>(nullptr, bytes, nullptr, nullptr, n, nullptr, stream));
    const Tensor scratch = empty({int64_t(std::max<size_t>(bytes, 1))}, order, ScalarType::Byte);
    MEDGS_CUDA_CHECK(cuda::launch_order(writable<uint8_t>(scratch), bytes, data<S>(depths), data<int32_t>(radii), n,
                                        writable<int32_t>(order), stream));
  }
  template <class S>
  static void copy(const S* from, int64_t count, S* to) {
    MEDGS_CUDA_CHECK(cudaMemcpyAsync(to, from, count * sizeof(S), cudaMemcpyDeviceToDevice, current_stream()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) { register_blend<Cuda>(m); }

}  // namespace medgs
