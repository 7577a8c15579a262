// `adam_step`, `observe` and `sigma_outside` on a GPU.
#include <algorithm>

#include "../common/elementary.h"
#include "../common/statistics.h"
#include "launch.h"
#include "warp.cuh"

namespace medgs {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAdamTensors = 16;  // in one launch
constexpr int kAdamPerThread = 4;

template <class S>
struct AdamTable {
  AdamTensor<S> tensor[kAdamTensors];
  unsigned first_block[kAdamTensors + 1];
};

template <class S>
__global__ void __launch_bounds__(kThreads) adam_kernel(const AdamTable<S> table, const AdamConstants<S> c) {
  int k = 0;
  while (blockIdx.x >= table.first_block[k + 1]) ++k;
  const AdamTensor<S>& t = table.tensor[k];
  const int64_t start = int64_t(blockIdx.x - table.first_block[k]) * kThreads * kAdamPerThread + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kAdamPerThread; ++j) {
    const int64_t i = start + j * kThreads;
    if (i >= t.size) return;
    generic::adam_step_at(t, c, i);
  }
}

template <class S>
__global__ void observe_kernel(const ObserveArguments<S> in) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n < in.gaussians) generic::observe_gaussian(in, n);
}

template <class S>
__global__ void __launch_bounds__(kThreads) sigma_sums(const SigmaArguments<S> in) {
  S sum[4] = {};
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < in.gaussians; i += int64_t(gridDim.x) * kThreads) {
    const S sigma = generic::math::exp(in.raw[i]);
    if (sigma < in.low) {
      sum[0] += in.low - sigma;
      sum[1] += 1;
    }
    if (sigma > in.high) {
      sum[2] += sigma - in.high;
      sum[3] += 1;
    }
  }
  __shared__ S warps[kThreads / 32][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    sum[k] = warp_sum(sum[k]);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][k] = sum[k];
  }
  __syncthreads();
  if (threadIdx.x < 4) {
    S total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w][threadIdx.x];
    in.sums[4 * blockIdx.x + threadIdx.x] = total;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) sigma_gradient(const SigmaArguments<S> in) {
  // A warp adds the parts, each lane every 32nd; in the same order in every block.
  __shared__ S total[4];
  if (threadIdx.x < 32) {
    S sum[4] = {};
    for (int64_t part = threadIdx.x; part < in.parts; part += 32)
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] += in.sums[4 * part + k];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum[k] = warp_sum(sum[k]);
      if (threadIdx.x == 0) total[k] = sum[k];
    }
  }
  __syncthreads();
  S below, above;
  const S loss = generic::sigma_loss(total, below, above);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i == 0) *in.loss = loss;
  if (i >= in.gaussians) return;
  const S sigma = generic::math::exp(in.raw[i]);
  in.gradient[i] = sigma < in.low ? -sigma * below : (sigma > in.high ? sigma * above : S(0));
}

unsigned blocks_for(int64_t items, int64_t each) { return unsigned(generic::ceil_div(items, each)); }

}  // namespace

template <class S>
cudaError_t launch_adam(const AdamTensor<S>* tensors, int count, const AdamConstants<S>& constants,
                        cudaStream_t stream) {
  for (int first = 0; first < count; first += kAdamTensors) {
    AdamTable<S> table{};
    const int here = std::min(kAdamTensors, count - first);
    for (int k = 0; k < here; ++k) {
      table.tensor[k] = tensors[first + k];
      table.first_block[k + 1] = table.first_block[k] + blocks_for(tensors[first + k].size, kThreads * kAdamPerThread);
    }
    adam_kernel<S><<<table.first_block[here], kThreads, 0, stream>>>(table, constants);
  }
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_observe(const ObserveArguments<S>& in, cudaStream_t stream) {
  if (in.gaussians == 0) return cudaSuccess;
  observe_kernel<S><<<blocks_for(in.gaussians, kThreads), kThreads, 0, stream>>>(in);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_sigma_outside(const SigmaArguments<S>& in, cudaStream_t stream) {
  sigma_sums<S><<<unsigned(in.parts), kThreads, 0, stream>>>(in);
  sigma_gradient<S><<<blocks_for(in.gaussians, kThreads), kThreads, 0, stream>>>(in);
  return cudaGetLastError();
}

#define MEDGS_INSTANTIATE(S)                                                                          \
  template cudaError_t launch_adam(const AdamTensor<S>*, int, const AdamConstants<S>&, cudaStream_t); \
  template cudaError_t launch_observe(const ObserveArguments<S>&, cudaStream_t);                      \
  template cudaError_t launch_sigma_outside(const SigmaArguments<S>&, cudaStream_t);
MEDGS_INSTANTIATE(float)
MEDGS_INSTANTIATE(double)

}  // namespace cuda
}  // namespace medgs
