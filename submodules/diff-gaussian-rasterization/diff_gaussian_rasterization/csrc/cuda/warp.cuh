// Sums over a warp.
#pragma once

namespace medgs {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

/// Every lane gets the sum.
template <class S>
__device__ __forceinline__ S warp_sum(S value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

/// Sums eight numbers at once: each step halves the numbers that a lane still carries, 9 shuffles in all instead of 40.
/// Lane 4 i ends with the sum of value[i].
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

}  // namespace cuda
}  // namespace medgs
