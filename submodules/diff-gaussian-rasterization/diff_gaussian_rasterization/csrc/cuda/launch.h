// Entry points of the CUDA kernels: device pointers in, work queued on the stream, the launch's error out.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../common/arguments.h"

namespace medgs {
namespace cuda {

constexpr int kTile = 8;       // px: one warp blends a tile of 8 x 8 pixels, two pixels a lane
constexpr int kSegment = 128;  // pairs of a tile's list that one warp blends at a time
constexpr int32_t kMostPairs = 0x7fffffff - 2 * kSegment;  // so that the end of a whole segment is an int32
constexpr int kSimilarityTile = 16;                        // px: side of the square of pixels that one block compares
constexpr int kFoldChunk = 32;                             // Gaussians behind one partial sum of dL/dt: a warp

template <class S>
cudaError_t launch_fold(const FoldArguments<S>& in, cudaStream_t stream);
template <class S>
cudaError_t launch_fold_backward(const FoldArguments<S>& in, cudaStream_t stream);

/// Rectangle of tiles of every Gaussian of every view, `rectangles` (V N), and their sizes, in the order of the lists:
/// by index, or by `order` (N) where that is not null. view_bits (V) on the host, V at most kMaxRenders.
template <class S>
cudaError_t launch_count_pairs(const S* means2d, const S* conics, const uint8_t* active, const S* opacities,
                               const int32_t* order, int64_t views, int64_t gaussians, int64_t heads,
                               const int64_t* view_bits, int width, int height, TileRectangle* rectangles,
                               int32_t* counts, cudaStream_t stream);

/// Exclusive sums of `count` numbers and, behind them, their total: (count + 1) out. With `temporary` null, only writes
/// the bytes it needs.
cudaError_t launch_scan(void* temporary, size_t& bytes, const int32_t* in, int32_t* out, int64_t count,
                        cudaStream_t stream);

/// Keys (view and tile) and owners of all pairs, in the order of the slots: of as many as there is room for.
cudaError_t launch_emit_pairs(const TileRectangle* rectangles, const int32_t* gaussian_offsets, const int32_t* order,
                              int64_t views, int64_t gaussians, int tiles_x, int tiles_y, int64_t capacity,
                              uint32_t* keys, int32_t* slots, int32_t* owners, cudaStream_t stream);

/// Stable radix sort of the pairs by key. Both buffers of keys and slots are scratch; the sorted slots end in
/// `sorted_slots` and the sorted keys in `sorted_keys`. With `temporary` null, only writes the bytes it needs.
cudaError_t launch_sort(void* temporary, size_t& bytes, const uint32_t* keys, uint32_t* sorted_keys,
                        const int32_t* slots, int32_t* sorted_slots, int64_t pairs, int key_bits, cudaStream_t stream);

/// Range of each tile in the sorted keys, and the Gaussian of each sorted pair, of which the device knows the `total`.
cudaError_t launch_tile_ranges(const uint32_t* sorted_keys, const int32_t* sorted_slots, const int32_t* owners,
                               const int32_t* total, int64_t capacity, int64_t views, int64_t tiles,
                               int32_t* tile_offsets, int32_t* pair_gaussians, cudaStream_t stream);

/// Segments of kSegment pairs that the lists are cut into, those that stay unused included.
inline int64_t segment_count(int64_t pairs, int64_t views, int64_t tiles) { return pairs / kSegment + views * tiles; }

/// Segments for which there is room to keep what is in front of them: all those of lists that have several.
inline int64_t slot_count(int64_t pairs) { return 2 * (pairs / kSegment) + 2; }

/// The tile (counted over all views) of each segment, -1 where it is unused.
cudaError_t launch_list_segments(const int32_t* tile_offsets, int64_t views, int64_t tiles, int64_t pairs,
                                 int64_t segments, int32_t* segment_tiles, cudaStream_t stream);

template <class S>
cudaError_t launch_blend(const BlendArguments<S>& in, cudaStream_t stream);
template <class S>
cudaError_t launch_blend_backward(const BlendArguments<S>& in, cudaStream_t stream);

/// Sums the records of each Gaussian in the order of the slots, and turns the moments into gradients. The first slice
/// of the channels writes every entry of them, the others add to what all channels share.
template <class S>
cudaError_t launch_sum_records(const BlendArguments<S>& in, int64_t heads, cudaStream_t stream);

/// Numbers that a tile keeps of each segment for that many channels: transmittance and colour in front of it.
int64_t start_size(int64_t channels);

/// Raw opacities and colours, so many numbers of each, to those that are blended; and gradients back, in place.
template <class S>
cudaError_t launch_activate(const S* raw, const S* raw_colours, int64_t opacities, int64_t colours, S* activated,
                            S* clamped, cudaStream_t stream);
template <class S>
cudaError_t launch_activate_backward(const S* activated, const S* clamped, int64_t opacities, int64_t colours,
                                     S* v_opacities, S* v_colours, cudaStream_t stream);

/// See common/splatting.h.
template <class S>
cudaError_t launch_prepare(const SplatArguments<S>& in, cudaStream_t stream);
template <class S>
cudaError_t launch_split(const SplatArguments<S>& in, cudaStream_t stream);

/// The Gaussians by depth, nearest first and equal ones by index, what is not visible last. With `temporary` null, only
/// writes the bytes it needs.
template <class S>
cudaError_t launch_order(void* temporary, size_t& bytes, const S* depths, const int32_t* radii, int64_t gaussians,
                         int32_t* order, cudaStream_t stream);

/// One part of the sums for each square of kSimilarityTile pixels of each plane.
template <class S>
cudaError_t launch_similarity(const SimilarityArguments<S>& in, cudaStream_t stream);

template <class S>
cudaError_t launch_adam(const AdamTensor<S>* tensors, int count, const AdamConstants<S>& constants,
                        cudaStream_t stream);

template <class S>
cudaError_t launch_observe(const ObserveArguments<S>& in, cudaStream_t stream);

template <class S>
cudaError_t launch_sigma_outside(const SigmaArguments<S>& in, cudaStream_t stream);

}  // namespace cuda
}  // namespace medgs
