// Structural similarity (Wang et al. 2004) at one pixel.
#pragma once

#include "arguments.h"
#include "constants.h"

namespace medgs {
namespace MEDGS_ISA {

/// The formula at one pixel, from the window's means of x, y, x^2, y^2 and xy; derivatives by the three that depend on
/// x.
template <class T, class S>
MEDGS_INLINE T similarity_at(T x, T y, T xx, T yy, T xy, S c1, S c2, T& by_x, T& by_xx, T& by_xy) {
  const T n1 = S(2) * x * y + c1, n2 = S(2) * (xy - x * y) + c2;
  const T d1 = x * x + y * y + c1, d2 = xx - x * x + yy - y * y + c2;
  const T scale = S(1) / (d1 * d2);
  const T value = n1 * n2 * scale;
  by_x = S(2) * (y * (n2 - n1) * scale + x * value * (S(1) / d2 - S(1) / d1));
  by_xx = -value / d2;
  by_xy = S(2) * n1 * scale;
  return value;
}

}  // namespace MEDGS_ISA
}  // namespace medgs
