// The constants of 3-D Gaussian splatting (Kerbl et al. 2023) and of the fold (MedGS), one place for each.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MEDGS_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define MEDGS_INLINE inline __attribute__((always_inline))
#else
#define MEDGS_INLINE inline
#endif

// Common headers are compiled once per instruction set. Each copy lives in a namespace of its own, so that the
// linker can never hand the code of one instruction set to a caller of another.
#ifndef MEDGS_ISA
#define MEDGS_ISA generic
#endif

namespace medgs {
namespace MEDGS_ISA {

constexpr double kMinAlpha = 1.0 / 255.0;      // a weaker contribution is skipped
constexpr double kMaxAlpha = 0.99;             // alpha is clamped here, and its gradient is 0 there
constexpr double kTouchedTransmittance = 0.5;  // a Gaussian touches a pixel while more than this is left in front of it
constexpr double kMinTransmittance = 1e-4;     // a pixel stops before the Gaussian that would go below
constexpr double kHarmonic0 = 0.28209479177387814;  // the constant spherical harmonic: colour = kHarmonic0 raw + 0.5
constexpr double kLowPass = 0.3;                    // px^2 added to the diagonal of every projected covariance
constexpr double kRadiusSigmas = 3.0;               // radius = ceil(3 standard deviations along the longer axis)
constexpr double kMinEigenvalueGap = 0.1;           // floor under mid^2 - det in the larger eigenvalue
constexpr double kMinTimeWeight = 0.1;              // a Gaussian is active at t where delta(t) exceeds this
constexpr double kMinSegmentationScale = 1e-6;      // and, in segmentation renders, where both scales exceed this
constexpr double kMaxRadius = 1e9;                  // px, keeps the conversion of a radius to int defined
constexpr int kVisibilityTile = 16;                 // px, the tile grid of the published visibility test
constexpr int kMaxDegree = 32;                      // largest polynomial degree P that the kernels hold on their stack

// Bits of the `active` masks that `fold` writes and `blend` reads.
constexpr unsigned char kActive = 1;              // delta(t) > 0.1 and visible
constexpr unsigned char kActiveSegmentation = 2;  // the same, and both scales above kMinSegmentationScale

/// a / b rounded up, of numbers that are not negative.
template <class T>
MEDGS_INLINE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

/// A radius that can become an int32, whatever it was.
template <class S>
MEDGS_INLINE S bounded_radius(S radius) {
  return radius < S(kMaxRadius) ? radius : S(kMaxRadius);
}

/// The largest q at which alpha = opacity exp(-q / 2) reaches 1/255; negative where it never does (or is not a number).
template <class S>
MEDGS_INLINE S visible_limit(S opacity) {
  return opacity >= S(kMinAlpha) ? S(2) * std::log(opacity / S(kMinAlpha)) : S(-1);
}

}  // namespace MEDGS_ISA
}  // namespace medgs
