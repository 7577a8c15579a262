// `blend` on a GPU. A warp blends a tile of 8 x 8 pixels by itself, two pixels per lane: the Gaussians here are small,
// so larger tiles would spend most lanes on pixels that a Gaussian does not reach. The images are small as well, and
// the lists of their tiles long: a list is cut into segments that are blended at the same time, then put together front
// to back, (C, T) over (C', T') being (C + T C', T T'). A list of one segment is drawn at once. Backward, each segment
// starts from what the forward pass left in front of it; each pair of Gaussian and tile is reduced within its warp and
// written once: no atomics, and the same bits in every run.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include <algorithm>

#include "../common/blending.h"
#include "../common/bounds.h"
#include "../common/splatting.h"
#include "launch.h"
#include "warp.cuh"

namespace medgs {
namespace cuda {
namespace {

using namespace generic;

constexpr int kWarps = 4;      // tiles of a block
constexpr int kRowsApart = 4;  // a lane's second pixel lies four rows under its first
constexpr int kScanThreads = 256;
constexpr int kTilePixels = kTile * kTile;
constexpr int32_t kNeverStops = 0x7fffffff;
constexpr int kOwnRecords = 6;  // records that one thread adds by itself

struct ViewBits {
  uint8_t bits[kMaxRenders];
};

/// The renders of one launch, by value: nothing to copy to the device.
struct RenderTable {
  int view[kMaxRenders], head[kMaxRenders];
  int layer[kMaxRenders];  // how many renders of the same view come before
  int first[kMaxRenders];  // of each view: its render of layer 0, -1 where it has none
  int next[kMaxRenders];   // the render of the same view, one layer further, or -1
  uint8_t bit[kMaxRenders];
  bool check[kMaxRenders];
};

// ---- binning
// ---------------------------------------------------------------------------------------------------------

/// Rectangles and counts lie in the order of the lists, `order` if there is one.
template <class S>
__global__ void count_pairs(const S* means2d, const S* conics, const uint8_t* active, const S* opacities,
                            const int32_t* order, int64_t views, int64_t gaussians, int64_t heads,
                            const ViewBits view_bits, int width, int height, TileRectangle* rectangles,
                            int32_t* counts) {
  const int64_t place = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place >= gaussians) return;
  const int64_t n = order ? order[place] : place;
  S opacity = 0;
  for (int64_t h = 0; h < heads; ++h)
    opacity = opacities[h * gaussians + n] > opacity ? opacities[h * gaussians + n] : opacity;
  const S limit = visible_limit(opacity);
  for (int64_t view = 0; view < views; ++view) {
    const int64_t row = view * gaussians + n;
    TileRectangle r = {0, 0, 0, 0};
    if (active[row] & view_bits.bits[view]) {
      const S *mean = means2d + 2 * row, *conic = conics + 3 * row;
      PixelBounds<S> p;
      if (pixel_bounds<S, S>(mean[0], mean[1], conic[0], conic[1], conic[2], limit, S(width), S(height), p))
        r = tiles_of<kTile>(p.left, p.right, p.top, p.bottom);
    }
    rectangles[view * gaussians + place] = r;
    counts[view * gaussians + place] = (r.x1 - r.x0) * (r.y1 - r.y0);
  }
}

__global__ void emit_pairs(const TileRectangle* rectangles, const int32_t* gaussian_offsets, const int32_t* order,
                           int64_t rows, int64_t gaussians, int tiles_x, int tiles, int32_t capacity, uint32_t* keys,
                           int32_t* slots, int32_t* owners) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const TileRectangle r = rectangles[row];
  const uint32_t view = uint32_t(row / gaussians);
  const int32_t place = int32_t(row % gaussians), n = order ? order[place] : place;
  int32_t slot = gaussian_offsets[row];
  for (int y = r.y0; y < r.y1; ++y)
    for (int x = r.x0; x < r.x1; ++x, ++slot) {
      if (slot >= capacity) return;
      keys[slot] = view * tiles + y * tiles_x + x;
      slots[slot] = slot;
      owners[slot] = n;
    }
}

__global__ void find_tiles(const uint32_t* keys, int64_t pairs, int64_t views, int64_t tiles, int32_t* tile_offsets) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= views * (tiles + 1)) return;
  const uint32_t key = uint32_t(at / (tiles + 1) * tiles + at % (tiles + 1));
  int64_t low = 0, high = pairs;  // the first pair whose key is not less
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (keys[mid] < key)
      low = mid + 1;
    else
      high = mid;
  }
  tile_offsets[at] = int32_t(low);
}

__global__ void find_gaussians(const int32_t* slots, const int32_t* owners, const int32_t* total, int64_t capacity,
                               int32_t* pair_gaussians) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < capacity && i < *total) pair_gaussians[i] = owners[slots[i]];
}

/// The first segment of a tile (counted over all views) whose list starts at `first`. Lists follow each other, so no
/// two tiles share a segment and at most pairs / kSegment + tiles are needed; some stay unused.
__device__ __forceinline__ int64_t first_segment(int64_t tile, int32_t first) { return first / kSegment + tile; }

/// Where what is in front of the segments of a list is kept, of a list that has several: one longer than a segment, so
/// that no two lists share a slot.
__device__ __forceinline__ int64_t first_slot(int32_t first) { return 2 * int64_t(first / kSegment); }

/// A number of a list, brought into 0 ... last. What autograd hands over lies there; lists of others must not lead a
/// kernel out of bounds, and a look at all of them beforehand would wait for the device.
__device__ __forceinline__ int32_t within(int32_t number, int64_t last) {
  return number < 0 ? 0 : number > last ? int32_t(last) : number;
}

__global__ void list_segments(const int32_t* tile_offsets, int64_t views, int64_t tiles, int64_t pairs,
                              int64_t segments, int32_t* segment_tiles) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= views * tiles) return;
  const int32_t* range = tile_offsets + at / tiles * (tiles + 1) + at % tiles;
  const int32_t first = within(range[0], pairs), last = within(range[1], pairs);
  const int64_t segment = first_segment(at, first);
  for (int32_t i = 0; first + i * kSegment < last && segment + i < segments; ++i)
    segment_tiles[segment + i] = int32_t(at);
}

// ---- blending
// --------------------------------------------------------------------------------------------------------

// C is the number of channels that a kernel is compiled for, see compiled_channels. Where there are fewer, the others
// are zeros: only what reads or writes memory of the operator looks whether a channel exists.
template <int C, class S>
__device__ __forceinline__ bool has_channel(const BlendArguments<S>& in, int c) {
  return C <= 4 || c < in.channels;
}

/// What a tile needs of a Gaussian, staged in shared memory by one lane and read by all.
template <class S, int C>
struct alignas(16) Staged {
  S u, v, a, b, c, opacity;
  S colour[C];
};

/// A piece of a tile's list, of at most kSegment pairs; render -1: there is nothing to draw.
struct Segment {
  int64_t number;  // of all segments
  int render;
  int64_t tile;  // of the render
};

/// One tile of one render, and the two pixels of a lane.
template <class S, int C>
struct Tile {
  int64_t render, view_row, head_row, area;
  int32_t first, last;     // its pairs
  int32_t count;           // its segments; what is in front of each is kept where there are several
  int64_t segment, start;  // number of its first segment, and where that one's start lies
  int x, y;
  bool inside[2];
  int64_t pixel[2];

  __device__ Tile(const BlendArguments<S>& in, const RenderTable& table, int64_t r, int64_t tile) {
    const int lane = threadIdx.x % 32;
    const int64_t tiles = in.tiles_x * in.tiles_y;
    render = r;
    area = in.width * in.height;
    view_row = table.view[r] * in.gaussians;
    head_row = table.head[r] * in.gaussians;
    const int32_t* range = in.tile_offsets + table.view[r] * (tiles + 1) + tile;
    first = within(range[0], in.pairs);
    last = max(first, within(range[1], in.pairs));
    segment = first_segment(table.view[r] * tiles + tile, first);
    count = ceil_div(last - first, kSegment);
    start = (table.layer[r] * in.slots + first_slot(first)) * kStartSize;
    x = int(tile % in.tiles_x) * kTile + lane % kTile;
    y = int(tile / in.tiles_x) * kTile + lane / kTile;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      inside[k] = x < in.width && y + k * kRowsApart < in.height;
      pixel[k] = int64_t(y + k * kRowsApart) * in.width + x;
    }
  }

  static constexpr int kStartSize = (C + 1) * kTilePixels;  // transmittance and colour in front of a segment

  /// Where one of its segments begins in its list.
  __device__ int32_t place(const Segment& of) const { return int32_t(of.number - segment) * kSegment; }
  __device__ int64_t start_of(const Segment& of) const { return start + (of.number - segment) * kStartSize; }
};

/// The render that the block's row draws of the tile's view, -1 where there is none.
__device__ __forceinline__ int render_of(const RenderTable& table, int64_t view) {
  int r = table.first[view];
  for (unsigned layer = 0; layer < blockIdx.y && r >= 0; ++layer) r = table.next[r];
  return r;
}

/// The segment that the calling warp blends, in the layer of its block's row.
template <class S>
__device__ __forceinline__ Segment segment_of_warp(const BlendArguments<S>& in, const RenderTable& table) {
  const int64_t number = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, tiles = in.tiles_x * in.tiles_y;
  const int32_t tile = number < in.segments ? in.segment_tiles[number] : -1;  // counted over all views
  if (tile < 0) return {number, -1, 0};
  return {number, render_of(table, tile / tiles), tile % tiles};
}

/// One lane's pair of the batch that starts at `batch`; a Gaussian that this render does not draw gets opacity 0.
template <class S, int C>
__device__ __forceinline__ void stage(const BlendArguments<S>& in, const RenderTable& table, const Tile<S, C>& tile,
                                      int32_t pair, Staged<S, C>& out) {
  const int64_t n = within(in.pair_gaussians[pair], in.gaussians - 1);
  const S* mean = in.means2d + 2 * (tile.view_row + n);
  const S* conic = in.conics + 3 * (tile.view_row + n);
  out.u = mean[0];
  out.v = mean[1];
  out.a = conic[0];
  out.b = conic[1];
  out.c = conic[2];
  out.opacity = in.opacities[tile.head_row + n];
#pragma unroll
  for (int c = 0; c < C; ++c)
    out.colour[c] = has_channel<C>(in, c) ? in.colours[(tile.head_row + n) * in.stride + c] : S(0);
  if (table.check[tile.render] && !(in.active[tile.view_row + n] & table.bit[tile.render])) out.opacity = 0;
}

template <class S, int C>
__device__ __forceinline__ auto contribution_at(const Staged<S, C>& g, int x, int y) {
  return contribution<S, S>(S(x), S(y), g.u, g.v, g.a, g.b, g.c, g.opacity);
}

/// Blends the pairs [begin, end) of a tile behind what `image` and `transmittance` hold, at the pixels that are still
/// `running`; one that would fall under the least transmittance stops before that pair.
template <class S, int C>
__device__ __forceinline__ void walk(const BlendArguments<S>& in, const RenderTable& table, const Tile<S, C>& tile,
                                     int32_t begin, int32_t end, Staged<S, C>* staged, S (&image)[2][C],
                                     S (&transmittance)[2], bool (&running)[2], int32_t (&stop)[2]) {
  const int lane = threadIdx.x % 32;
  for (int32_t batch = begin; batch < end; batch += 32) {
    if (!__any_sync(kAllLanes, running[0] || running[1])) break;
    const int count = min(32, end - batch);
    if (lane < count) stage(in, table, tile, batch + lane, staged[lane]);
    __syncwarp();
    for (int j = 0; j < count; ++j) {
      const Staged<S, C> g = staged[j];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const auto c = contribution_at(g, tile.x, tile.y + k * kRowsApart);
        if (!c.hit || !running[k]) continue;
        const S next = transmittance[k] * (S(1) - c.alpha);
        if (next < S(kMinTransmittance)) {
          running[k] = false;
          stop[k] = batch + j - tile.first;
          continue;
        }
        const S weight = c.alpha * transmittance[k];
#pragma unroll
        for (int i = 0; i < C; ++i) image[k][i] += g.colour[i] * weight;
        transmittance[k] = next;
      }
    }
    __syncwarp();
  }
}

/// The plane of a channel among the images of a render, or their gradients; null where there are none.
template <int C, class S, class T>
__device__ __forceinline__ T* plane_of(const BlendArguments<S>& in, T* images, T* last, const Tile<S, C>& tile, int i) {
  if (C == 4 && i == 3 && in.last_image) return last;
  return images ? images + (tile.render * in.stride + i) * tile.area : nullptr;
}

/// What is blended at a lane's pixel k, over the background.
template <class S, int C>
__device__ __forceinline__ void write_pixel(const BlendArguments<S>& in, const Tile<S, C>& tile, int k,
                                            const S (&image)[C], S transmittance, int32_t stop) {
  const int64_t pixel = tile.render * tile.area + tile.pixel[k];
  in.transmittance[pixel] = transmittance;
  in.stops[pixel] = stop;
#pragma unroll
  for (int i = 0; i < C; ++i)
    if (has_channel<C>(in, i))
      plane_of<C>(in, in.images, in.last_image, tile, i)[tile.pixel[k]] =
          image[i] + transmittance * in.backgrounds[tile.render * in.stride + i];
}

/// Each segment by itself, as if nothing were in front of it: of a list that has no other, the image.
template <class S, int C>
__global__ void __launch_bounds__(32 * kWarps)
    blend_segments_kernel(const BlendArguments<S> in, const RenderTable table) {
  __shared__ Staged<S, C> shared[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Segment own = segment_of_warp(in, table);
  if (own.render < 0) return;
  const Tile<S, C> tile(in, table, own.render, own.tile);
  const int32_t begin = tile.first + tile.place(own);
  S image[2][C] = {}, transmittance[2] = {1, 1};
  int32_t stop[2] = {kNeverStops, kNeverStops};
  bool running[2] = {tile.inside[0], tile.inside[1]};
  walk(in, table, tile, begin, min(begin + kSegment, tile.last), shared[warp], image, transmittance, running, stop);
  if (tile.count == 1) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (tile.inside[k]) write_pixel(in, tile, k, image[k], transmittance[k], stop[k]);
    return;
  }
  S* start = in.starts + tile.start_of(own) + lane;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    start[32 * k] = running[k] ? transmittance[k] : S(0);  // 0: stops within, whatever is in front
#pragma unroll
    for (int i = 0; i < C; ++i) start[(1 + i) * kTilePixels + 32 * k] = image[k][i];
  }
}

/// Puts the segments of each tile together, and leaves in `starts` what is in front of each. Of a pixel that stops it
/// finds the segment in which it does, and writes what is in front of that, and as the stop ~(the segment's first
/// pair): negative until the next kernel writes the true one, or else another segment could take that for its own.
template <class S, int C>
__global__ void __launch_bounds__(32 * kWarps)
    join_segments_kernel(const BlendArguments<S> in, const RenderTable table) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t at = int64_t(blockIdx.x) * kWarps + warp;
  if (at >= in.tiles_x * in.tiles_y) return;
  const Tile<S, C> tile(in, table, blockIdx.y, at);
  const int32_t count = tile.count;
  if (count == 1) return;  // drawn already
  S image[2][C] = {}, transmittance[2] = {1, 1};
  int32_t stop[2] = {kNeverStops, kNeverStops};
  S ahead[2][C + 1] = {};  // of the next segment, asked for ahead of use
  S* start = in.starts + tile.start + lane;
  const auto ask = [&] {
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int i = 0; i <= C; ++i) ahead[k][i] = start[i * kTilePixels + 32 * k];
  };
  if (count > 0) ask();
  for (int32_t segment = 0; segment < count; ++segment) {
    S own[2][C + 1];
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int i = 0; i <= C; ++i) {
        own[k][i] = ahead[k][i];
        start[i * kTilePixels + 32 * k] = i == 0 ? transmittance[k] : image[k][i > 0 ? i - 1 : 0];
      }
    start += tile.kStartSize;
    if (segment + 1 < count) ask();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (stop[k] != kNeverStops) continue;
      const S next = transmittance[k] * own[k][0];
      if (next < S(kMinTransmittance)) {
        stop[k] = ~(segment * kSegment);
        continue;
      }
#pragma unroll
      for (int i = 0; i < C; ++i) image[k][i] += transmittance[k] * own[k][1 + i];
      transmittance[k] = next;
    }
  }
#pragma unroll
  for (int k = 0; k < 2; ++k)
    if (tile.inside[k]) write_pixel(in, tile, k, image[k], transmittance[k], stop[k]);
}

/// Blends once more, from where they start, the segments in which pixels stop.
template <class S, int C>
__global__ void __launch_bounds__(32 * kWarps) stop_pixels_kernel(const BlendArguments<S> in, const RenderTable table) {
  __shared__ Staged<S, C> shared[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Segment own = segment_of_warp(in, table);
  if (own.render < 0) return;
  const Tile<S, C> tile(in, table, own.render, own.tile);
  if (tile.count == 1) return;
  const int32_t first = tile.place(own);
  bool stops[2], running[2];
#pragma unroll
  for (int k = 0; k < 2; ++k)
    stops[k] = running[k] = tile.inside[k] && in.stops[tile.render * tile.area + tile.pixel[k]] == ~first;
  if (!__any_sync(kAllLanes, stops[0] || stops[1])) return;
  const S* start = in.starts + tile.start_of(own) + lane;
  S image[2][C], transmittance[2];
  int32_t stop[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    transmittance[k] = start[32 * k];
    stop[k] = min(first + kSegment, tile.last - tile.first);  // kept where rounding spares the pixel
#pragma unroll
    for (int i = 0; i < C; ++i) image[k][i] = start[(1 + i) * kTilePixels + 32 * k];
  }
  const int32_t begin = tile.first + first;
  walk(in, table, tile, begin, min(begin + kSegment, tile.last), shared[warp], image, transmittance, running, stop);
#pragma unroll
  for (int k = 0; k < 2; ++k)
    if (stops[k]) write_pixel(in, tile, k, image[k], transmittance[k], stop[k]);
}

/// Counts the pixels that each Gaussian is drawn at while much of the transmittance is left; see kTouchedTransmittance.
/// Sums of integers: the same in any order.
template <class S, int C>
__global__ void __launch_bounds__(32 * kWarps)
    count_touched_kernel(const BlendArguments<S> in, const RenderTable table) {
  __shared__ Staged<S, C> shared[kWarps][32];
  Staged<S, C>* staged = shared[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const Segment own = segment_of_warp(in, table);
  if (own.render < 0) return;
  const Tile<S, C> tile(in, table, own.render, own.tile);
  const int32_t begin = tile.first + tile.place(own), end = min(begin + kSegment, tile.last);
  const S* start = in.starts + tile.start_of(own) + lane;
  S transmittance[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) transmittance[k] = !tile.inside[k] ? S(0) : tile.count > 1 ? start[32 * k] : S(1);
  for (int32_t batch = begin; batch < end; batch += 32) {
    if (!__any_sync(kAllLanes, max(transmittance[0], transmittance[1]) > S(kTouchedTransmittance))) break;
    const int count = min(32, end - batch);
    if (lane < count) stage(in, table, tile, batch + lane, staged[lane]);
    __syncwarp();
    for (int j = 0; j < count; ++j) {
      const Staged<S, C> g = staged[j];
      int pixels = 0;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const auto c = contribution_at(g, tile.x, tile.y + k * kRowsApart);
        const bool touches = c.hit && transmittance[k] > S(kTouchedTransmittance);
        pixels += __popc(__ballot_sync(kAllLanes, touches));
        if (touches) transmittance[k] *= S(1) - c.alpha;
      }
      if (lane == 0 && pixels > 0)
        atomicAdd(in.touched + within(in.pair_gaussians[batch + j], in.gaussians - 1), pixels);
    }
    __syncwarp();
  }
}

/// Front to back, like the forward pass; see common/blending.h for the recurrence.
template <class S, int C, bool Absolute>
__global__ void __launch_bounds__(32 * kWarps)
    blend_backward_kernel(const BlendArguments<S> in, const RenderTable table) {
  constexpr int R = kRecordSize<C, Absolute>;
  __shared__ Staged<S, C> shared[kWarps][32];
  Staged<S, C>* staged = shared[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const Segment own = segment_of_warp(in, table);
  if (own.render < 0) return;
  const Tile<S, C> tile(in, table, own.render, own.tile);
  const int32_t begin = tile.first + tile.place(own), end = min(begin + kSegment, tile.last);
  const S* start = in.starts + tile.start_of(own) + lane;
  S v_image[2][C] = {}, transmittance[2] = {1, 1}, behind[2] = {0, 0};
  int32_t stop[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (!tile.inside[k]) continue;
    const int64_t pixel = tile.render * tile.area + tile.pixel[k];
    stop[k] = in.stops[pixel];
    if (tile.count > 1) transmittance[k] = start[32 * k];
    behind[k] = in.v_transmittance ? in.v_transmittance[pixel] * in.transmittance[pixel] : S(0);
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const S* incoming = has_channel<C>(in, i) ? plane_of<C>(in, in.v_images, in.v_last_image, tile, i) : nullptr;
      if (!incoming) continue;
      v_image[k][i] = incoming[tile.pixel[k]];
      const S drawn = tile.count > 1 ? start[(1 + i) * kTilePixels + 32 * k] : S(0);
      behind[k] += v_image[k][i] * (plane_of<C>(in, in.images, in.last_image, tile, i)[tile.pixel[k]] - drawn);
    }
  }
  int32_t deepest = max(stop[0], stop[1]);
  for (int step = 16; step > 0; step /= 2) deepest = max(deepest, __shfl_xor_sync(kAllLanes, deepest, step));
  S* records = in.records + table.layer[tile.render] * in.pairs * R;

  int32_t batch = begin;
  for (; batch < end && batch - tile.first < deepest; batch += 32) {
    const int count = min(32, end - batch);
    int32_t slot = 0;
    if (lane < count) {
      stage(in, table, tile, batch + lane, staged[lane]);
      slot = within(in.pair_slots[batch + lane], in.pairs - 1);
    }
    __syncwarp();
    for (int j = 0; j < count; ++j) {
      const Staged<S, C> g = staged[j];
      S total[R] = {};
      bool touched = false;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const auto c = contribution_at(g, tile.x, tile.y + k * kRowsApart);
        if (!c.hit || batch + j - tile.first >= stop[k]) continue;
        touched = true;
        const S weight = c.alpha * transmittance[k];
        S v_weight = 0;
#pragma unroll
        for (int i = 0; i < C; ++i) {
          v_weight += g.colour[i] * v_image[k][i];
          total[6 + i] += weight * v_image[k][i];
        }
        behind[k] -= weight * v_weight;
        const S v_power = power_gradient<S>(c, c.hit, transmittance[k], v_weight, behind[k]);
        add_moments(c, v_power, total);
        if constexpr (Absolute) add_absolute(c, v_power, g.a, g.b, g.c, total + 6 + C);
        transmittance[k] *= S(1) - c.alpha;
      }
      S* record = records + int64_t(__shfl_sync(kAllLanes, slot, j)) * R;
      if (__any_sync(kAllLanes, touched)) {
        if constexpr (C <= 4) {
#pragma unroll
          for (int r = 8; r < R; ++r) {
            const S sum = warp_sum(total[r]);
            if (lane == 0) record[r] = sum;
          }
        }
#pragma unroll
        for (int r = 0; r < (C <= 4 ? 8 : R); r += 8) {
          const S sum = warp_sum8(total + r);
          if (lane % 4 == 0) record[r + lane / 4] = sum;
        }
      } else if (lane < R) {
        record[lane] = 0;
      }
    }
    __syncwarp();
  }
  // Pairs behind the last pixel's stop were never drawn.
  for (int32_t pair = batch + lane; pair < end; pair += 32) {
    S* record = records + int64_t(within(in.pair_slots[pair], in.pairs - 1)) * R;
#pragma unroll
    for (int r = 0; r < R; ++r) record[r] = 0;
  }
}

/// Adds the numbers of one record, read as wide as they are aligned.
template <int R, class S>
__device__ __forceinline__ void add_record(const S* record, S (&sum)[R]) {
  if constexpr (R % 4 == 0 && sizeof(S) == 4) {
#pragma unroll
    for (int i = 0; i < R; i += 4) {
      const float4 part = *reinterpret_cast<const float4*>(record + i);
      sum[i] += part.x;
      sum[i + 1] += part.y;
      sum[i + 2] += part.z;
      sum[i + 3] += part.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < R; ++i) sum[i] += record[i];
  }
}

/// Sums the records of one Gaussian in one view. Most have a few, which its thread adds by itself; the whole warp adds
/// those of each that has many. Every lane of the warp calls this.
template <int R, class S>
__device__ __forceinline__ void sum_slots(const S* records, int32_t begin, int32_t end, S (&sum)[R]) {
  const int lane = threadIdx.x % 32;
  const bool many = end - begin > kOwnRecords;
  if (!many)
    for (int32_t slot = begin; slot < end; ++slot) add_record<R>(records + int64_t(slot) * R, sum);
  for (unsigned left = __ballot_sync(kAllLanes, many); left; left &= left - 1) {
    const int of = __ffs(int(left)) - 1;
    const int32_t first = __shfl_sync(kAllLanes, begin, of), last = __shfl_sync(kAllLanes, end, of);
    S part[R] = {};
    for (int32_t slot = first + lane; slot < last; slot += 32) add_record<R>(records + int64_t(slot) * R, part);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const S total = warp_sum(part[i]);
      if (lane == of) sum[i] += total;
    }
  }
}

template <class S, int C, bool Absolute>
__global__ void __launch_bounds__(kScanThreads)
    sum_records_kernel(const BlendArguments<S> in, const RenderTable table, int64_t heads) {
  constexpr int R = kRecordSize<C, Absolute>;
  const int64_t place = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  const bool exists = place < in.gaussians, first = in.first_slice;
  const int64_t n = exists && in.order ? within(in.order[place], in.gaussians - 1) : place;
  for (int64_t head = 0; head < heads; ++head) {
    S v_opacity = 0, v_colour[C] = {};
    for (int64_t view = 0; view < in.view_count; ++view) {
      const int64_t row = view * in.gaussians + n;
      int32_t begin = 0, end = 0;
      if (exists) {
        const int64_t slots = view * in.gaussians + place;
        begin = within(in.gaussian_offsets[slots], in.pairs);
        end = within(in.gaussian_offsets[slots + 1], in.pairs);
      }
      S sum[R] = {}, conic[3] = {};
      if (begin < end)
#pragma unroll
        for (int i = 0; i < 3; ++i) conic[i] = in.conics[3 * row + i];
      for (int r = table.first[view]; r >= 0; r = table.next[r])
        if (table.head[r] == head) sum_slots<R>(in.records + table.layer[r] * in.pairs * R, begin, end, sum);
      if (!exists) continue;
      S* v_mean = in.v_means2d + 2 * (head * in.view_count * in.gaussians + row);
      S* v_conic = in.v_conics + 3 * row;
      const S by_mean[2] = {conic[0] * sum[0] + conic[1] * sum[1], conic[1] * sum[0] + conic[2] * sum[1]};
      const S by_conic[3] = {S(-0.5) * sum[2], -sum[3], S(-0.5) * sum[4]};
#pragma unroll
      for (int i = 0; i < 2; ++i) v_mean[i] = first ? by_mean[i] : v_mean[i] + by_mean[i];
#pragma unroll
      for (int i = 0; i < 3; ++i) v_conic[i] = head == 0 && first ? by_conic[i] : v_conic[i] + by_conic[i];
      v_opacity += sum[5];
#pragma unroll
      for (int i = 0; i < C; ++i) v_colour[i] += sum[6 + i];
      if constexpr (Absolute)
        for (int i = 0; i < 2; ++i) in.v_absolute[2 * n + i] = sum[6 + C + i];
    }
    if (!exists) continue;
    const int64_t at = head * in.gaussians + n;
    const S by_opacity = v_opacity != S(0) ? v_opacity / in.opacities[at] : S(0);
    in.v_opacities[at] = first ? by_opacity : in.v_opacities[at] + by_opacity;
#pragma unroll
    for (int i = 0; i < C; ++i)
      if (has_channel<C>(in, i)) in.v_colours[at * in.stride + i] = v_colour[i];
  }
}

template <class S>
__global__ void activate_kernel(const S* raw, const S* raw_colours, int64_t opacities, int64_t colours, S* activated,
                                S* clamped) {
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i < opacities) activated[i] = S(1) / (S(1) + math::exp(-raw[i]));
  if (i < colours) clamped[i] = colour_of(raw_colours[i]);
}

template <class S>
__global__ void activate_backward_kernel(const S* activated, const S* clamped, int64_t opacities, int64_t colours,
                                         S* v_opacities, S* v_colours) {
  const int64_t i = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i < opacities) v_opacities[i] *= activated[i] * (S(1) - activated[i]);
  if (i < colours) v_colours[i] = colour_gradient(clamped[i], v_colours[i]);
}

template <class S>
__global__ void prepare_kernel(const SplatArguments<S> in) {
  const int64_t n = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (n < in.gaussians) prepare_splat(in, n);
}

template <class S>
__global__ void split_kernel(const SplatArguments<S> in) {
  const int64_t n = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (n < in.gaussians) split_gradient(in, n);
}

template <class S>
__global__ void depth_keys_kernel(const S* depths, const int32_t* radii, int64_t gaussians, DepthKey<S>* keys,
                                  int32_t* places) {
  const int64_t n = int64_t(blockIdx.x) * kScanThreads + threadIdx.x;
  if (n >= gaussians) return;
  keys[n] = depth_key(depths[n], radii[n]);
  places[n] = int32_t(n);
}

/// Sums of counts that stop at the largest int32 instead of wrapping: still associative, as no count is negative.
struct SaturatingSum {
  __device__ int32_t operator()(int32_t x, int32_t y) const { return x > 0x7fffffff - y ? 0x7fffffff : x + y; }
};

unsigned blocks_for(int64_t items, int64_t threads) { return unsigned(ceil_div(items, threads)); }

template <class S>
RenderTable table_of(const BlendArguments<S>& in) {
  RenderTable table{};
  int latest[kMaxRenders];
  std::fill(table.first, table.first + kMaxRenders, -1);
  for (int r = 0; r < int(in.renders); ++r) {
    const int view = table.view[r] = int(in.views[r]);
    table.head[r] = int(in.heads[r]);
    table.bit[r] = uint8_t(in.bits[r]);
    table.check[r] = in.check_bits[r];
    table.next[r] = -1;
    if (table.first[view] < 0)
      table.first[view] = r;
    else
      table.next[latest[view]] = r;
    table.layer[r] = int(in.render_layers[r]);
    latest[view] = r;
  }
  return table;
}

/// Calls `run` with the C of the kernels for that many channels.
template <class Run>
cudaError_t with_channels(int64_t channels, const Run& run) {
  switch (compiled_channels(channels)) {
    case 1:
      run(std::integral_constant<int, 1>{});
      break;
    case 2:
      run(std::integral_constant<int, 2>{});
      break;
    case 3:
      run(std::integral_constant<int, 3>{});
      break;
    case 4:
      run(std::integral_constant<int, 4>{});
      break;
    case 10:
      run(std::integral_constant<int, 10>{});
      break;
    default:
      run(std::integral_constant<int, kMostChannels>{});
  }
  return cudaGetLastError();
}

}  // namespace

int64_t start_size(int64_t channels) { return (compiled_channels(channels) + 1) * kTilePixels; }

template <class S>
cudaError_t launch_count_pairs(const S* means2d, const S* conics, const uint8_t* active, const S* opacities,
                               const int32_t* order, int64_t views, int64_t gaussians, int64_t heads,
                               const int64_t* view_bits, int width, int height, TileRectangle* rectangles,
                               int32_t* counts, cudaStream_t stream) {
  if (gaussians == 0) return cudaSuccess;
  ViewBits bits{};
  for (int64_t v = 0; v < views; ++v) bits.bits[v] = uint8_t(view_bits[v]);
  count_pairs<S><<<blocks_for(gaussians, kScanThreads), kScanThreads, 0, stream>>>(
      means2d, conics, active, opacities, order, views, gaussians, heads, bits, width, height, rectangles, counts);
  return cudaGetLastError();
}

cudaError_t launch_scan(void* temporary, size_t& bytes, const int32_t* in, int32_t* out, int64_t count,
                        cudaStream_t stream) {
  // An inclusive scan one place further, behind a leading zero, leaves the total at the end.
  if (temporary) {
    const cudaError_t error = cudaMemsetAsync(out, 0, sizeof(int32_t), stream);
    if (error != cudaSuccess) return error;
  }
  return cub::DeviceScan::InclusiveScan(temporary, bytes, in, out + 1, SaturatingSum{}, int(count), stream);
}

cudaError_t launch_emit_pairs(const TileRectangle* rectangles, const int32_t* gaussian_offsets, const int32_t* order,
                              int64_t views, int64_t gaussians, int tiles_x, int tiles_y, int64_t capacity,
                              uint32_t* keys, int32_t* slots, int32_t* owners, cudaStream_t stream) {
  const int64_t rows = views * gaussians;
  // What stays of the keys when there are fewer pairs belongs behind all tiles.
  const cudaError_t error = cudaMemsetAsync(keys, 0xff, sizeof(uint32_t) * capacity, stream);
  if (error != cudaSuccess || rows == 0) return error;
  emit_pairs<<<blocks_for(rows, kScanThreads), kScanThreads, 0, stream>>>(rectangles, gaussian_offsets, order, rows,
                                                                          gaussians, tiles_x, tiles_x * tiles_y,
                                                                          int32_t(capacity), keys, slots, owners);
  return cudaGetLastError();
}

cudaError_t launch_sort(void* temporary, size_t& bytes, const uint32_t* keys, uint32_t* sorted_keys,
                        const int32_t* slots, int32_t* sorted_slots, int64_t pairs, int key_bits, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, sorted_keys, slots, sorted_slots, int(pairs), 0,
                                         key_bits, stream);
}

cudaError_t launch_tile_ranges(const uint32_t* sorted_keys, const int32_t* sorted_slots, const int32_t* owners,
                               const int32_t* total, int64_t capacity, int64_t views, int64_t tiles,
                               int32_t* tile_offsets, int32_t* pair_gaussians, cudaStream_t stream) {
  if (views == 0) return cudaSuccess;
  find_tiles<<<blocks_for(views * (tiles + 1), kScanThreads), kScanThreads, 0, stream>>>(sorted_keys, capacity, views,
                                                                                         tiles, tile_offsets);
  if (capacity > 0)
    find_gaussians<<<blocks_for(capacity, kScanThreads), kScanThreads, 0, stream>>>(sorted_slots, owners, total,
                                                                                    capacity, pair_gaussians);
  return cudaGetLastError();
}

cudaError_t launch_list_segments(const int32_t* tile_offsets, int64_t views, int64_t tiles, int64_t pairs,
                                 int64_t segments, int32_t* segment_tiles, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(segment_tiles, 0xff, sizeof(int32_t) * segments, stream);
  if (error != cudaSuccess || views == 0) return error;
  list_segments<<<blocks_for(views * tiles, kScanThreads), kScanThreads, 0, stream>>>(tile_offsets, views, tiles, pairs,
                                                                                      segments, segment_tiles);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_blend(const BlendArguments<S>& in, cudaStream_t stream) {
  const dim3 segments(blocks_for(in.segments, kWarps), unsigned(in.layers));
  const dim3 tiles(blocks_for(in.tiles_x * in.tiles_y, kWarps), unsigned(in.renders));
  const RenderTable table = table_of(in);
  return with_channels(in.channels, [&](auto c) {
    blend_segments_kernel<S, c.value><<<segments, 32 * kWarps, 0, stream>>>(in, table);
    join_segments_kernel<S, c.value><<<tiles, 32 * kWarps, 0, stream>>>(in, table);
    stop_pixels_kernel<S, c.value><<<segments, 32 * kWarps, 0, stream>>>(in, table);
    if constexpr (c.value == 4)
      if (in.touched) count_touched_kernel<S, 4><<<segments, 32 * kWarps, 0, stream>>>(in, table);
  });
}

template <class S>
cudaError_t launch_blend_backward(const BlendArguments<S>& in, cudaStream_t stream) {
  const dim3 segments(blocks_for(in.segments, kWarps), unsigned(in.layers));
  const RenderTable table = table_of(in);
  return with_channels(in.channels, [&](auto c) {
    if constexpr (c.value == 4)
      if (in.v_absolute) {
        blend_backward_kernel<S, 4, true><<<segments, 32 * kWarps, 0, stream>>>(in, table);
        return;
      }
    blend_backward_kernel<S, c.value, false><<<segments, 32 * kWarps, 0, stream>>>(in, table);
  });
}

template <class S>
cudaError_t launch_sum_records(const BlendArguments<S>& in, int64_t heads, cudaStream_t stream) {
  if (in.gaussians == 0) return cudaSuccess;
  const RenderTable table = table_of(in);
  const unsigned blocks = blocks_for(in.gaussians, kScanThreads);
  return with_channels(in.channels, [&](auto c) {
    if constexpr (c.value == 4)
      if (in.v_absolute) {
        sum_records_kernel<S, 4, true><<<blocks, kScanThreads, 0, stream>>>(in, table, heads);
        return;
      }
    sum_records_kernel<S, c.value, false><<<blocks, kScanThreads, 0, stream>>>(in, table, heads);
  });
}

template <class S>
cudaError_t launch_activate(const S* raw, const S* raw_colours, int64_t opacities, int64_t colours, S* activated,
                            S* clamped, cudaStream_t stream) {
  if (opacities + colours == 0) return cudaSuccess;
  activate_kernel<S><<<blocks_for(opacities + colours, kScanThreads), kScanThreads, 0, stream>>>(
      raw, raw_colours, opacities, colours, activated, clamped);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_activate_backward(const S* activated, const S* clamped, int64_t opacities, int64_t colours,
                                     S* v_opacities, S* v_colours, cudaStream_t stream) {
  if (opacities + colours == 0) return cudaSuccess;
  activate_backward_kernel<S><<<blocks_for(opacities + colours, kScanThreads), kScanThreads, 0, stream>>>(
      activated, clamped, opacities, colours, v_opacities, v_colours);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_prepare(const SplatArguments<S>& in, cudaStream_t stream) {
  if (in.gaussians == 0) return cudaSuccess;
  prepare_kernel<S><<<blocks_for(in.gaussians, kScanThreads), kScanThreads, 0, stream>>>(in);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_split(const SplatArguments<S>& in, cudaStream_t stream) {
  if (in.gaussians == 0) return cudaSuccess;
  split_kernel<S><<<blocks_for(in.gaussians, kScanThreads), kScanThreads, 0, stream>>>(in);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_order(void* temporary, size_t& bytes, const S* depths, const int32_t* radii, int64_t gaussians,
                         int32_t* order, cudaStream_t stream) {
  using Key = DepthKey<S>;
  const size_t keys_bytes = (size_t(gaussians) * sizeof(Key) + 255) / 256 * 256;
  const size_t places_bytes = (size_t(gaussians) * sizeof(int32_t) + 255) / 256 * 256;
  size_t sort_bytes = 0;
  auto* start = static_cast<uint8_t*>(temporary);
  auto* keys = reinterpret_cast<Key*>(start);
  auto* sorted = reinterpret_cast<Key*>(start + keys_bytes);
  auto* places = reinterpret_cast<int32_t*>(start + 2 * keys_bytes);
  cudaError_t error = cub::DeviceRadixSort::SortPairs(nullptr, sort_bytes, keys, sorted, places, order, int(gaussians),
                                                      0, int(8 * sizeof(Key)), stream);
  if (error != cudaSuccess || temporary == nullptr) {
    bytes = 2 * keys_bytes + places_bytes + sort_bytes;
    return error;
  }
  if (gaussians == 0) return cudaSuccess;
  depth_keys_kernel<S>
      <<<blocks_for(gaussians, kScanThreads), kScanThreads, 0, stream>>>(depths, radii, gaussians, keys, places);
  return cub::DeviceRadixSort::SortPairs(start + 2 * keys_bytes + places_bytes, sort_bytes, keys, sorted, places, order,
                                         int(gaussians), 0, int(8 * sizeof(Key)), stream);
}

#define MEDGS_INSTANTIATE(S)                                                                                     \
  template cudaError_t launch_count_pairs(const S*, const S*, const uint8_t*, const S*, const int32_t*, int64_t, \
                                          int64_t, int64_t, const int64_t*, int, int, TileRectangle*, int32_t*,  \
                                          cudaStream_t);                                                         \
  template cudaError_t launch_activate(const S*, const S*, int64_t, int64_t, S*, S*, cudaStream_t);              \
  template cudaError_t launch_activate_backward(const S*, const S*, int64_t, int64_t, S*, S*, cudaStream_t);     \
  template cudaError_t launch_prepare(const SplatArguments<S>&, cudaStream_t);                                   \
  template cudaError_t launch_split(const SplatArguments<S>&, cudaStream_t);                                     \
  template cudaError_t launch_order(void*, size_t&, const S*, const int32_t*, int64_t, int32_t*, cudaStream_t);  \
  template cudaError_t launch_blend(const BlendArguments<S>&, cudaStream_t);                                     \
  template cudaError_t launch_blend_backward(const BlendArguments<S>&, cudaStream_t);                            \
  template cudaError_t launch_sum_records(const BlendArguments<S>&, int64_t, cudaStream_t);
MEDGS_INSTANTIATE(float)
MEDGS_INSTANTIATE(double)

}  // namespace cuda
}  // namespace medgs
