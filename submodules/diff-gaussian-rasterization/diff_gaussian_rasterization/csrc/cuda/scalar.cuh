// Scalar maths behind common/folding.h on a GPU.
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
__device__ __forceinline__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ double fast_exp(double x) { return ::exp(x); }
__device__ __forceinline__ float fast_divide(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double fast_divide(double x, double y) { return x / y; }

}  // namespace math
}  // namespace MEDGS_ISA
}  // namespace medgs
