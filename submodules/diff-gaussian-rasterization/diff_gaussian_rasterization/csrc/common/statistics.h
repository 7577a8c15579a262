// One Gaussian's share of the statistics of density control.
#pragma once

#include <cmath>

#include "arguments.h"
#include "constants.h"

namespace medgs {
namespace MEDGS_ISA {

template <class S>
MEDGS_INLINE void observe_gaussian(const ObserveArguments<S>& in, int64_t n) {
  int32_t radius = 0;
  S largest = 0;
  bool seen = false;
  for (int64_t view = 0; view < in.views; ++view) {
    const int64_t row = view * in.gaussians + n;
    if (!(in.active[row] & in.bit)) continue;
    seen = true;
    radius = in.radii[row] > radius ? in.radii[row] : radius;
    const S x = in.screen_gradients[2 * row] * in.half_width, y = in.screen_gradients[2 * row + 1] * in.half_height;
    const S norm = std::sqrt(x * x + y * y);
    largest = norm > largest ? norm : largest;
  }
  if (!seen) return;
  in.max_radii[n] = S(radius) > in.max_radii[n] ? S(radius) : in.max_radii[n];
  in.xyz_gradient_accum[n] += largest;
  in.m_gradient_accum[n] += in.m_gradients[n] < 0 ? -in.m_gradients[n] : in.m_gradients[n];
  in.denom[n] += 1;
  in.m_denom[n] += 1;
}

}  // namespace MEDGS_ISA
}  // namespace medgs
