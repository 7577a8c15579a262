// What a training step does to one number or one Gaussian, the same on every device.
#pragma once

#include <cmath>

#include "arguments.h"
#include "constants.h"

namespace medgs {
namespace MEDGS_ISA {

/// One number of an Adam step (Kingma and Ba 2015).
template <class S>
MEDGS_INLINE void adam_step_at(const AdamTensor<S>& t, const AdamConstants<S>& c, int64_t i) {
  const S g = t.gradient[i];
  const S m = c.beta1 * t.first_moment[i] + c.rest1 * g;
  const S v = c.beta2 * t.second_moment[i] + c.rest2 * g * g;
  t.first_moment[i] = m;
  t.second_moment[i] = v;
  t.parameter[i] -= t.rate * m / (std::sqrt(v) * t.correction + c.epsilon);
}

/// The loss of `sigma_outside` of the sums (sum and count below, sum and count above), and the factors of its gradient.
template <class S>
MEDGS_INLINE S sigma_loss(const S* total, S& below, S& above) {
  below = total[1] > 0 ? S(1) / total[1] : S(0);
  above = total[3] > 0 ? S(1) / total[3] : S(0);
  return total[0] * below + total[2] * above;
}

/// One Gaussian's share of the statistics of density control.
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
