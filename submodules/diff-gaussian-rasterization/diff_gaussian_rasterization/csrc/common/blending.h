// The recurrence of blending, forward and backward, at one pixel (CUDA: T is a scalar) or a vector of pixels (CPU: T is
// a SIMD vector); S is the scalar. What lies around it differs: the CPU walks a tile's whole list, CUDA walks it in
// segments and puts them together.
#pragma once

#include <type_traits>

#include "constants.h"
#include "elementary.h"

namespace medgs {
namespace MEDGS_ISA {

/// What one Gaussian gives one pixel.
template <class T, class Condition>
struct Contribution {
  T dx, dy;       // offset from the centre, px
  T raw, alpha;   // opacity * exp(-q / 2) before and after the clamp
  Condition hit;  // q >= 0 and alpha >= 1/255
};

template <class T, class S>
MEDGS_INLINE auto contribution(T x, T y, S u, S v, S a, S b, S c, S opacity) {
  const T dx = x - u, dy = y - v;
  const T power = S(-0.5) * (a * dx * dx + c * dy * dy) - b * dx * dy;
  const T raw = opacity * math::blending_exp(power);
  const T alpha = raw > S(kMaxAlpha) ? math::splat<T>(S(kMaxAlpha)) : raw;
  const auto hit = (power <= S(0)) & (alpha >= S(kMinAlpha));
  return Contribution<T, std::decay_t<decltype(hit)>>{dx, dy, raw, alpha, hit};
}

/// dL/d(-q/2) of a Gaussian that is drawn at the pixel. With g the pixel's gradient and `behind` = g . (image - drawn
/// so far, this Gaussian included), dL/dalpha = T (g . colour) - behind / (1 - alpha), for any number of channels; the
/// final transmittance enters `behind` as one more channel. The gradient of alpha is 0 where it is clamped, and
/// d alpha / d power = alpha. `g_colour` is g . colour.
template <class S, class T, class Condition>
MEDGS_INLINE T power_gradient(const Contribution<T, Condition>& of, Condition used, T transmittance, T g_colour,
                              T behind) {
  const T v_alpha = transmittance * g_colour - math::blending_divide(behind, S(1) - of.alpha);
  return (used & (of.raw <= S(kMaxAlpha))) ? v_alpha * of.raw : math::splat<T>(S(0));
}

/// Adds a pixel's share to the six moments of a record; see kRecordSize.
template <class T, class Condition>
MEDGS_INLINE void add_moments(const Contribution<T, Condition>& of, T v_power, T* total) {
  const T vx = v_power * of.dx, vy = v_power * of.dy;
  total[0] += vx;
  total[1] += vy;
  total[2] += vx * of.dx;
  total[3] += vx * of.dy;
  total[4] += vy * of.dy;
  total[5] += v_power;
}

/// Adds |dL/dmean| of a pixel, one an axis, to sums over pixels.
template <class T, class S, class Condition>
MEDGS_INLINE void add_absolute(const Contribution<T, Condition>& of, T v_power, S a, S b, S c, T* total) {
  const T x = v_power * (a * of.dx + b * of.dy), y = v_power * (b * of.dx + c * of.dy);
  total[0] += x < S(0) ? -x : x;
  total[1] += y < S(0) ? -y : y;
}

}  // namespace MEDGS_ISA
}  // namespace medgs
