// `blend` on a GPU. A warp blends a tile of 8 x 8 pixels by itself, two pixels a lane: the Gaussians here are small, so
// larger tiles would spend most lanes on pixels that a Gaussian does not reach. Backward, each pair of Gaussian and
// tile is reduced within its warp and written once: no atomics, and the same bits in every run.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "launch.h"
#include "scalar.cuh"
// after scalar.cuh
#include "../common/bounds.h"

namespace medgs {
namespace cuda {
namespace {

using namespace generic;

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarps = 4;      // tiles of a block
constexpr int kRowsApart = 4;  // a lane's second pixel lies four rows under its first
constexpr int kScanThreads = 256;

struct ViewBits {
  uint8_t bits[kMaxRenders];
};

/// The renders of one launch, by value: nothing to copy to the device.
struct RenderTable {
  int view[kMaxRenders], head[kMaxRenders];
  uint8_t bit[kMaxRenders];
  bool check[kMaxRenders];
  int64_t slots[kMaxRenders];
};

// ---- binning
// ---------------------------------------------------------------------------------------------------------

template <class S>
__global__ void count_pairs(const S* means2d, const S* conics, const uint8_t* active, const S* opacities, int64_t views,
                            int64_t gaussians, int64_t heads, const ViewBits view_bits, int width, int height,
                            TileRectangle* rectangles, int32_t* counts) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= gaussians) return;
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
    rectangles[row] = r;
    counts[row] = (r.x1 - r.x0) * (r.y1 - r.y0);
  }
}

__global__ void emit_pairs(const TileRectangle* rectangles, const int32_t* gaussian_offsets, int64_t rows,
                           int64_t gaussians, int tiles_x, int tiles, uint32_t* keys, int32_t* slots, int32_t* owners) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const TileRectangle r = rectangles[row];
  const uint32_t view = uint32_t(row / gaussians);
  const int32_t n = int32_t(row % gaussians);
  int32_t slot = gaussian_offsets[row];
  for (int y = r.y0; y < r.y1; ++y)
    for (int x = r.x0; x < r.x1; ++x, ++slot) {
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

__global__ void find_gaussians(const int32_t* slots, const int32_t* owners, int64_t pairs, int32_t* pair_gaussians) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < pairs) pair_gaussians[i] = owners[slots[i]];
}

// ---- blending
// --------------------------------------------------------------------------------------------------------

/// What a tile needs of a Gaussian, staged in shared memory by one lane and read by all.
template <class S, int C>
struct alignas(16) Staged {
  S u, v, a, b, c, opacity;
  S colour[C];
};

template <class S, int C>
struct Tile {
  int64_t render, view_row, head_row, area;
  int32_t first, last;
  int x, y;
  bool inside[2];
  int64_t pixel[2];
  bool exists;

  __device__ Tile(const BlendArguments<S>& in, const RenderTable& table) {
    const int lane = threadIdx.x % 32;
    const int64_t tiles = in.tiles_x * in.tiles_y;
    const int64_t tile = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    exists = tile < tiles;
    render = blockIdx.y;
    area = in.width * in.height;
    if (!exists) return;
    view_row = table.view[render] * in.gaussians;
    head_row = table.head[render] * in.gaussians;
    const int32_t* range = in.tile_offsets + table.view[render] * (tiles + 1) + tile;
    first = range[0];
    last = range[1];
    x = int(tile % in.tiles_x) * kTile + lane % kTile;
    y = int(tile / in.tiles_x) * kTile + lane / kTile;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      inside[k] = x < in.width && y + k * kRowsApart < in.height;
      pixel[k] = int64_t(y + k * kRowsApart) * in.width + x;
    }
  }
};

/// One lane's pair of the batch that starts at `batch`; a Gaussian that this render does not draw gets opacity 0.
template <class S, int C>
__device__ __forceinline__ void stage(const BlendArguments<S>& in, const RenderTable& table, const Tile<S, C>& tile,
                                      int32_t pair, Staged<S, C>& out) {
  const int64_t n = in.pair_gaussians[pair];
  const S* mean = in.means2d + 2 * (tile.view_row + n);
  const S* conic = in.conics + 3 * (tile.view_row + n);
  out.u = mean[0];
  out.v = mean[1];
  out.a = conic[0];
  out.b = conic[1];
  out.c = conic[2];
  out.opacity = in.opacities[tile.head_row + n];
#pragma unroll
  for (int c = 0; c < C; ++c) out.colour[c] = in.colours[(tile.head_row + n) * C + c];
  if (table.check[tile.render] && !(in.active[tile.view_row + n] & table.bit[tile.render])) out.opacity = 0;
}

template <class S>
struct Contribution {
  S dx, dy, raw, alpha;
  bool hit;
};

template <class S, int C>
__device__ __forceinline__ Contribution<S> contribution(const Staged<S, C>& g, int x, int y) {
  Contribution<S> c;
  c.dx = S(x) - g.u;
  c.dy = S(y) - g.v;
  const S power = S(-0.5) * (g.a * c.dx * c.dx + g.c * c.dy * c.dy) - g.b * c.dx * c.dy;
  c.raw = g.opacity * math::fast_exp(power);
  c.alpha = c.raw > S(kMaxAlpha) ? S(kMaxAlpha) : c.raw;
  c.hit = power <= S(0) && c.alpha >= S(kMinAlpha);
  return c;
}

template <class S, int C>
__global__ void __launch_bounds__(32 * kWarps) blend_kernel(const BlendArguments<S> in, const RenderTable table) {
  __shared__ Staged<S, C> shared[kWarps][32];
  Staged<S, C>* staged = shared[threadIdx.x / 32];
  const Tile<S, C> tile(in, table);
  if (!tile.exists) return;
  const int lane = threadIdx.x % 32;
  S image[2][C] = {}, transmittance[2] = {1, 1};
  int32_t stop[2] = {0, 0};
  bool running[2] = {tile.inside[0], tile.inside[1]};

  for (int32_t batch = tile.first; batch < tile.last; batch += 32) {
    if (!__any_sync(kAllLanes, running[0] || running[1])) break;
    const int count = min(32, tile.last - batch);
    if (lane < count) stage(in, table, tile, batch + lane, staged[lane]);
    __syncwarp();
    for (int j = 0; j < count; ++j) {
      const Staged<S, C> g = staged[j];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const auto c = contribution(g, tile.x, tile.y + k * kRowsApart);
        if (!c.hit || !running[k]) continue;
        const S next = transmittance[k] * (S(1) - c.alpha);
        if (next < S(kMinTransmittance)) {
          running[k] = false;
          continue;
        }
        const S weight = c.alpha * transmittance[k];
#pragma unroll
        for (int i = 0; i < C; ++i) image[k][i] += g.colour[i] * weight;
        transmittance[k] = next;
        stop[k] = batch + j - tile.first + 1;
      }
    }
    __syncwarp();
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (!tile.inside[k]) continue;
    const int64_t at = tile.render * tile.area + tile.pixel[k];
    in.transmittance[at] = transmittance[k];
    in.stops[at] = stop[k];
#pragma unroll
    for (int i = 0; i < C; ++i)
      in.images[(tile.render * C + i) * tile.area + tile.pixel[k]] =
          image[k][i] + transmittance[k] * in.backgrounds[tile.render * C + i];
  }
}

/// Sums eight numbers over the warp at once: each step halves the numbers that a lane still carries, 9 shuffles in all
/// instead of 40. Lane 4 i ends with the sum of value[i].
template <class S>
__device__ __forceinline__ S warp_sum8(S* value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 16, count = 4; count >= 1; step /= 2, count /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const S send = upper ? value[i] : value[i + count];
      const S keep = upper ? value[i + count] : value[i];
      value[i] = keep + __shfl_xor_sync(kAllLanes, send, step);
    }
  }
  value[0] += __shfl_xor_sync(kAllLanes, value[0], 2);
  value[0] += __shfl_xor_sync(kAllLanes, value[0], 1);
  return value[0];
}

template <class S>
__device__ __forceinline__ S warp_sum(S value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

/// Front to back, like the forward pass; see blend_backward_channels in cpu/kernels_body.h for the recurrence.
template <class S, int C>
__global__ void __launch_bounds__(32 * kWarps)
    blend_backward_kernel(const BlendArguments<S> in, const RenderTable table) {
  constexpr int R = kRecordSize<C>;
  __shared__ Staged<S, C> shared[kWarps][32];
  Staged<S, C>* staged = shared[threadIdx.x / 32];
  const Tile<S, C> tile(in, table);
  if (!tile.exists || tile.first == tile.last) return;
  const int lane = threadIdx.x % 32;
  S v_image[2][C] = {}, transmittance[2] = {1, 1}, behind[2] = {0, 0};
  int32_t stop[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (!tile.inside[k]) continue;
    const int64_t at = tile.render * tile.area + tile.pixel[k];
    stop[k] = in.stops[at];
    behind[k] = in.v_transmittance[at] * in.transmittance[at];
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const int64_t channel = (tile.render * C + i) * tile.area + tile.pixel[k];
      v_image[k][i] = in.v_images[channel];
      behind[k] += v_image[k][i] * in.images[channel];
    }
  }
  int32_t deepest = max(stop[0], stop[1]);
  for (int step = 16; step > 0; step /= 2) deepest = max(deepest, __shfl_xor_sync(kAllLanes, deepest, step));
  S* records = in.records + table.slots[tile.render] * R;

  int32_t batch = tile.first;
  for (; batch - tile.first < deepest; batch += 32) {
    const int count = min(32, tile.last - batch);
    int32_t slot = 0;
    if (lane < count) {
      stage(in, table, tile, batch + lane, staged[lane]);
      slot = in.pair_slots[batch + lane];
    }
    __syncwarp();
    for (int j = 0; j < count; ++j) {
      const Staged<S, C> g = staged[j];
      S total[R] = {};
      bool touched = false;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const auto c = contribution(g, tile.x, tile.y + k * kRowsApart);
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
        const S v_alpha = transmittance[k] * v_weight - math::fast_divide(behind[k], S(1) - c.alpha);
        transmittance[k] *= S(1) - c.alpha;
        // The gradient of alpha is 0 where it is clamped; d alpha / d power = alpha.
        const S v_power = c.raw <= S(kMaxAlpha) ? v_alpha * c.raw : S(0);
        const S vx = v_power * c.dx, vy = v_power * c.dy;
        total[0] += vx;
        total[1] += vy;
        total[2] += vx * c.dx;
        total[3] += vx * c.dy;
        total[4] += vy * c.dy;
        total[5] += v_power;
      }
      S* record = records + int64_t(__shfl_sync(kAllLanes, slot, j)) * R;
      if (__any_sync(kAllLanes, touched)) {
#pragma unroll
        for (int r = 8; r < R; ++r) {
          const S sum = warp_sum(total[r]);
          if (lane == 0) record[r] = sum;
        }
        const S sum = warp_sum8(total);
        if (lane % 4 == 0) record[lane / 4] = sum;
      } else if (lane < R) {
        record[lane] = 0;
      }
    }
    __syncwarp();
  }
  // Pairs behind the last pixel's stop were never drawn.
  for (int32_t pair = batch + lane; pair < tile.last; pair += 32) {
    S* record = records + int64_t(in.pair_slots[pair]) * R;
#pragma unroll
    for (int r = 0; r < R; ++r) record[r] = 0;
  }
}

/// Lanes that sum the records of one Gaussian together, lane k the k-th number: whole records are read at once.
template <int C>
constexpr int kSumLanes = kRecordSize<C> <= 8 ? 8 : 16;

template <class S, int C>
__global__ void __launch_bounds__(kScanThreads)
    sum_records_kernel(const BlendArguments<S> in, const RenderTable table, int64_t heads, S* v_means2d, S* v_conics,
                       S* v_opacities, S* v_colours) {
  constexpr int R = kRecordSize<C>, L = kSumLanes<C>;
  const int64_t n = (int64_t(blockIdx.x) * kScanThreads + threadIdx.x) / L;
  const int lane = threadIdx.x % L;
  const unsigned group = (L == 32 ? kAllLanes : ((1u << L) - 1)) << (threadIdx.x % 32 / L * L);
  if (n >= in.gaussians) return;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t at = head * in.gaussians + n;
    S appearance = 0;  // lane 5: opacity, lanes 6 ...: colour
    for (int64_t view = 0; view < in.view_count; ++view) {
      const int64_t row = view * in.gaussians + n;
      const int32_t first = in.gaussian_offsets[row], last = in.gaussian_offsets[row + 1];
      S sum = 0;
      for (int64_t r = 0; first < last && r < in.renders; ++r) {
        if (table.view[r] != view || table.head[r] != head) continue;
        const S* record = in.records + (table.slots[r] + first) * R + lane;
        if (lane < R)
          for (int32_t slot = first; slot < last; ++slot, record += R) sum += *record;
      }
      appearance += sum;
      const S sx = __shfl_sync(group, sum, 0, L), sy = __shfl_sync(group, sum, 1, L);
      if (lane < 2)
        v_means2d[2 * (head * in.view_count * in.gaussians + row) + lane] =
            first < last ? in.conics[3 * row + lane] * sx + in.conics[3 * row + lane + 1] * sy : S(0);
      if (lane >= 2 && lane < 5) {
        const S gradient = lane == 3 ? -sum : S(-0.5) * sum;
        S* v_conic = v_conics + 3 * row + lane - 2;
        *v_conic = head == 0 ? gradient : *v_conic + gradient;
      }
    }
    if (lane == 5) v_opacities[at] = appearance != S(0) ? appearance / in.opacities[at] : S(0);
    if (lane >= 6 && lane < 6 + C) v_colours[at * C + lane - 6] = appearance;
  }
}

/// Sums of counts that stop at the largest int32 instead of wrapping: still associative, as no count is negative.
struct SaturatingSum {
  __device__ int32_t operator()(int32_t x, int32_t y) const { return x > 0x7fffffff - y ? 0x7fffffff : x + y; }
};

unsigned blocks_for(int64_t items, int threads) { return unsigned((items + threads - 1) / threads); }

template <class S>
RenderTable table_of(const BlendArguments<S>& in) {
  RenderTable table{};
  for (int64_t r = 0; r < in.renders; ++r) {
    table.view[r] = int(in.views[r]);
    table.head[r] = int(in.heads[r]);
    table.bit[r] = uint8_t(in.bits[r]);
    table.check[r] = in.check_bits[r];
    table.slots[r] = in.render_slots ? in.render_slots[r] : 0;
  }
  return table;
}

/// Calls `run` with the number of channels as a compile-time constant.
template <class Run>
cudaError_t with_channels(int64_t channels, const Run& run) {
  switch (channels) {
    case 1:
      run(std::integral_constant<int, 1>{});
      break;
    case 2:
      run(std::integral_constant<int, 2>{});
      break;
    case 3:
      run(std::integral_constant<int, 3>{});
      break;
    default:
      run(std::integral_constant<int, 4>{});
      break;
  }
  return cudaGetLastError();
}

}  // namespace

template <class S>
cudaError_t launch_count_pairs(const S* means2d, const S* conics, const uint8_t* active, const S* opacities,
                               int64_t views, int64_t gaussians, int64_t heads, const int64_t* view_bits, int width,
                               int height, void* rectangles, int32_t* counts, cudaStream_t stream) {
  if (gaussians == 0) return cudaSuccess;
  ViewBits bits{};
  for (int64_t v = 0; v < views; ++v) bits.bits[v] = uint8_t(view_bits[v]);
  count_pairs<S><<<blocks_for(gaussians, kScanThreads), kScanThreads, 0, stream>>>(
      means2d, conics, active, opacities, views, gaussians, heads, bits, width, height,
      static_cast<TileRectangle*>(rectangles), counts);
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

cudaError_t launch_emit_pairs(const void* rectangles, const int32_t* gaussian_offsets, int64_t views, int64_t gaussians,
                              int tiles_x, int tiles_y, uint32_t* keys, int32_t* slots, int32_t* owners,
                              cudaStream_t stream) {
  const int64_t rows = views * gaussians;
  if (rows == 0) return cudaSuccess;
  emit_pairs<<<blocks_for(rows, kScanThreads), kScanThreads, 0, stream>>>(static_cast<const TileRectangle*>(rectangles),
                                                                          gaussian_offsets, rows, gaussians, tiles_x,
                                                                          tiles_x * tiles_y, keys, slots, owners);
  return cudaGetLastError();
}

cudaError_t launch_sort(void* temporary, size_t& bytes, const uint32_t* keys, uint32_t* sorted_keys,
                        const int32_t* slots, int32_t* sorted_slots, int64_t pairs, int key_bits, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, keys, sorted_keys, slots, sorted_slots, int(pairs), 0,
                                         key_bits, stream);
}

cudaError_t launch_tile_ranges(const uint32_t* sorted_keys, const int32_t* sorted_slots, const int32_t* owners,
                               int64_t pairs, int64_t views, int64_t tiles, int32_t* tile_offsets,
                               int32_t* pair_gaussians, cudaStream_t stream) {
  if (views == 0) return cudaSuccess;
  find_tiles<<<blocks_for(views * (tiles + 1), kScanThreads), kScanThreads, 0, stream>>>(sorted_keys, pairs, views,
                                                                                         tiles, tile_offsets);
  if (pairs > 0)
    find_gaussians<<<blocks_for(pairs, kScanThreads), kScanThreads, 0, stream>>>(sorted_slots, owners, pairs,
                                                                                 pair_gaussians);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_blend(const BlendArguments<S>& in, cudaStream_t stream) {
  const dim3 grid(blocks_for(in.tiles_x * in.tiles_y, kWarps), unsigned(in.renders));
  const RenderTable table = table_of(in);
  return with_channels(in.channels,
                       [&](auto c) { blend_kernel<S, c.value><<<grid, 32 * kWarps, 0, stream>>>(in, table); });
}

template <class S>
cudaError_t launch_blend_backward(const BlendArguments<S>& in, cudaStream_t stream) {
  const dim3 grid(blocks_for(in.tiles_x * in.tiles_y, kWarps), unsigned(in.renders));
  const RenderTable table = table_of(in);
  return with_channels(in.channels,
                       [&](auto c) { blend_backward_kernel<S, c.value><<<grid, 32 * kWarps, 0, stream>>>(in, table); });
}

template <class S>
cudaError_t launch_sum_records(const BlendArguments<S>& in, int64_t heads, S* v_means2d, S* v_conics, S* v_opacities,
                               S* v_colours, cudaStream_t stream) {
  if (in.gaussians == 0) return cudaSuccess;
  const RenderTable table = table_of(in);
  return with_channels(in.channels, [&](auto c) {
    sum_records_kernel<S, c.value>
        <<<blocks_for(in.gaussians * kSumLanes<c.value>, kScanThreads), kScanThreads, 0, stream>>>(
            in, table, heads, v_means2d, v_conics, v_opacities, v_colours);
  });
}

#define MEDGS_INSTANTIATE(S)                                                                                       \
  template cudaError_t launch_count_pairs(const S*, const S*, const uint8_t*, const S*, int64_t, int64_t, int64_t, \
                                          const int64_t*, int, int, void*, int32_t*, cudaStream_t);                \
  template cudaError_t launch_blend(const BlendArguments<S>&, cudaStream_t);                                       \
  template cudaError_t launch_blend_backward(const BlendArguments<S>&, cudaStream_t);                              \
  template cudaError_t launch_sum_records(const BlendArguments<S>&, int64_t, S*, S*, S*, S*, cudaStream_t);
MEDGS_INSTANTIATE(float)
MEDGS_INSTANTIATE(double)

}  // namespace cuda
}  // namespace medgs
