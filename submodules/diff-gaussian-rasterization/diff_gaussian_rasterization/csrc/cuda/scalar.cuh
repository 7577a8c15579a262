// The elementary functions of scalars on a GPU; see common/elementary.h.
#pragma once

#include <cmath>

#include "../common/constants.h"

namespace medgs {
namespace MEDGS_ISA {
namespace math {

__device__ __forceinline__ float exp(float x) { return ::expf(x); }
__device__ __forceinline__ double exp(double x) { return ::exp(x); }
__device__ __forceinline__ float sqrt(float x) { return ::sqrtf(x); }
__device__ __forceinline__ double sqrt(double x) { return ::sqrt(x); }
__device__ __forceinline__ float ceil(float x) { return ::ceilf(x); }
__device__ __forceinline__ double ceil(double x) { return ::ceil(x); }
__device__ __forceinline__ void sincos_turns(float turns, float& sine, float& cosine) {
  ::sincospif(2 * turns, &sine, &cosine);
}
__device__ __forceinline__ void sincos_turns(double turns, double& sine, double& cosine) {
  ::sincospi(2 * turns, &sine, &cosine);
}

/// For blending, where the exponent lies in [-6, 0] whenever the result counts: the hardware's 2^x, within 2 ulp. Not
/// __expf, which spends three instructions more on results that are denormal.
__device__ __forceinline__ float blending_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ double blending_exp(double x) { return ::exp(x); }
__device__ __forceinline__ float blending_divide(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double blending_divide(double x, double y) { return x / y; }

template <class T, class S>
__device__ __forceinline__ T splat(S x) {
  return x;
}

}  // namespace math
}  // namespace MEDGS_ISA
}  // namespace medgs
