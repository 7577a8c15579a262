// `similarity` on a GPU: each block compares a square of pixels, with the window's halo in shared memory.
#include "../common/similarity.h"
#include "launch.h"
#include "warp.cuh"

namespace medgs {
namespace cuda {
namespace {

constexpr int kSide = kSimilarityTile;
constexpr int kReach = kSide + 2 * kHalo;
constexpr int kThreads = kSide * kSide;

/// Sums over the block; every thread calls it, thread 0 gets the result.
template <class S>
__device__ S block_sum(S value) {
  __shared__ S warps[kThreads / 32];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  S total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  return total;
}

/// M maps of the block's square and its halo, `load(m, y, x)` each, blurred at this thread's pixel; zero outside.
template <class S, int M, class Load>
__device__ void blur(const SimilarityArguments<S>& in, int64_t x0, int64_t y0, S (*halo)[kReach][kReach + 1],
                     S (*rows)[kReach][kSide + 1], int sources, const Load& load, S* out) {
  for (int i = threadIdx.x; i < kReach * kReach; i += kThreads) {
    const int64_t y = y0 + i / kReach - kHalo, x = x0 + i % kReach - kHalo;
    const bool inside = x >= 0 && x < in.width && y >= 0 && y < in.height;
    for (int m = 0; m < sources; ++m) halo[m][i / kReach][i % kReach] = inside ? load(m, y, x) : S(0);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kReach * kSide; i += kThreads) {
    const int y = i / kSide, x = i % kSide;
    S sum[M] = {};
#pragma unroll
    for (int k = 0; k < kWindow; ++k) {
      const S w = in.window[k];
      if (M == 5) {  // the products are formed here rather than stored
        const S a = halo[0][y][x + k], b = halo[1][y][x + k];
        sum[0] += w * a;
        sum[1] += w * b;
        sum[2] += w * a * a;
        sum[3 % M] += w * b * b;
        sum[4 % M] += w * a * b;
      } else {
#pragma unroll
        for (int m = 0; m < M; ++m) sum[m] += w * halo[m][y][x + k];
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) rows[m][y][x] = sum[m];
  }
  __syncthreads();
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    out[m] = 0;
#pragma unroll
    for (int k = 0; k < kWindow; ++k) out[m] += in.window[k] * rows[m][y + k][x];
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) compare(const SimilarityArguments<S> in) {
  __shared__ S halo[2][kReach][kReach + 1], rows[5][kReach][kSide + 1];
  const int64_t x0 = int64_t(blockIdx.x) * kSide, y0 = int64_t(blockIdx.y) * kSide, area = in.width * in.height;
  const S* image = in.images + blockIdx.z * area;
  const S* target = in.targets + blockIdx.z * area;
  S mean[5];
  blur<S, 5>(
      in, x0, y0, halo, rows, 2, [&](int m, int64_t y, int64_t x) { return (m ? target : image)[y * in.width + x]; },
      mean);
  const int64_t x = x0 + threadIdx.x % kSide, y = y0 + threadIdx.x / kSide;
  S difference = 0, value = 0;
  if (x < in.width && y < in.height) {
    const int64_t at = y * in.width + x;
    S by[3];
    value = generic::similarity_at(mean[0], mean[1], mean[2], mean[3], mean[4], in.c1, in.c2, by[0], by[1], by[2]);
    difference = image[at] > target[at] ? image[at] - target[at] : target[at] - image[at];
    if (in.gradient)
      for (int m = 0; m < 3; ++m) in.maps[(m * in.planes + blockIdx.z) * area + at] = by[m];
  }
  difference = block_sum(difference);
  value = block_sum(value);
  if (threadIdx.x == 0) {
    S* sums = in.sums + 2 * ((int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
    sums[0] = difference;
    sums[1] = value;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) differentiate(const SimilarityArguments<S> in) {
  __shared__ S halo[3][kReach][kReach + 1], rows[3][kReach][kSide + 1];
  const int64_t x0 = int64_t(blockIdx.x) * kSide, y0 = int64_t(blockIdx.y) * kSide, area = in.width * in.height;
  S by[3];
  blur<S, 3>(
      in, x0, y0, halo, rows, 3,
      [&](int m, int64_t y, int64_t x) { return in.maps[(m * in.planes + blockIdx.z) * area + y * in.width + x]; }, by);
  const int64_t x = x0 + threadIdx.x % kSide, y = y0 + threadIdx.x / kSide;
  if (x >= in.width || y >= in.height) return;
  const int64_t at = blockIdx.z * area + y * in.width + x;
  in.gradient[at] = by[0] + 2 * in.images[at] * by[1] + in.targets[at] * by[2];
}

/// The means of the sums of all parts, in one block.
template <class S>
__global__ void __launch_bounds__(kThreads) finish(const SimilarityArguments<S> in) {
  S difference = 0, total = 0;
  for (int64_t part = threadIdx.x; part < in.parts; part += kThreads) {
    difference += in.sums[2 * part];
    total += in.sums[2 * part + 1];
  }
  difference = block_sum(difference);
  total = block_sum(total);
  if (threadIdx.x != 0) return;
  const S pixels = S(in.planes * in.width * in.height);
  *in.l1 = difference / pixels;
  *in.ssim = total / pixels;
}

}  // namespace

template <class S>
cudaError_t launch_similarity(const SimilarityArguments<S>& in, cudaStream_t stream) {
  const dim3 grid(unsigned(generic::ceil_div(in.width, int64_t(kSide))),
                  unsigned(generic::ceil_div(in.height, int64_t(kSide))), unsigned(in.planes));
  compare<S><<<grid, kThreads, 0, stream>>>(in);
  finish<S><<<1, kThreads, 0, stream>>>(in);
  if (in.gradient) differentiate<S><<<grid, kThreads, 0, stream>>>(in);
  return cudaGetLastError();
}

template cudaError_t launch_similarity(const SimilarityArguments<float>&, cudaStream_t);
template cudaError_t launch_similarity(const SimilarityArguments<double>&, cudaStream_t);

}  // namespace cuda
}  // namespace medgs
