// Which tiles a projected Gaussian reaches with alpha >= 1/255: tighter than three standard deviations where the
// opacity is low, and never short of a pixel that the dense definition draws.
#pragma once

#include <cmath>

#include "constants.h"

namespace medgs {
namespace MEDGS_ISA {

/// Tiles [x0, x1) x [y0, y1); empty when x1 <= x0.
struct TileRectangle {
  int x0, x1, y0, y1;
  MEDGS_INLINE int count() const { return (x1 - x0) * (y1 - y0); }
};

/// The largest q at which alpha = opacity exp(-q / 2) reaches 1/255; negative where it never does (or is not a number).
template <class S>
MEDGS_INLINE S visible_limit(S opacity) {
  return opacity >= S(kMinAlpha) ? S(2) * std::log(opacity / S(kMinAlpha)) : S(-1);
}

/// mean (u, v) px, conic (a, b, c), limit of `visible_limit`; an image of width x height pixels whose centres are
/// integers. Not-a-number anywhere gives the empty rectangle.
template <class S>
MEDGS_INLINE TileRectangle tile_rectangle(const S* mean, const S* conic, S limit, int tile_width, int tile_height,
                                          int width, int height) {
  const TileRectangle empty = {0, 0, 0, 0};
  if (!(limit >= S(0))) return empty;
  const S a = conic[0], b = conic[1], c = conic[2];
  // q <= limit is an ellipse whose half extents are sqrt(limit c / det), sqrt(limit a / det). The determinant of a
  // long Gaussian cancels: its lower bound gives an upper one for the extents.
  const S epsilon = sizeof(S) == 4 ? S(1.2e-7) : S(2.3e-16);
  const S determinant = a * c - b * b - S(4) * epsilon * (a * c + b * b);
  S left = 0, right = S(width - 1), top = 0, bottom = S(height - 1);
  if (determinant > S(0)) {
    // Slack for the rounding of q itself, so that no pixel on the edge is lost.
    const S slack = S(1.002), pad = S(0.01);
    const S scale = slack * limit / determinant;
    const S half_width = std::sqrt(scale * c) + pad, half_height = std::sqrt(scale * a) + pad;
    const S u0 = mean[0] - half_width, u1 = mean[0] + half_width;
    const S v0 = mean[1] - half_height, v1 = mean[1] + half_height;
    if (!(u1 >= left && u0 <= right && v1 >= top && v0 <= bottom)) return empty;
    left = u0 > left ? u0 : left;
    right = u1 < right ? u1 : right;
    top = v0 > top ? v0 : top;
    bottom = v1 < bottom ? v1 : bottom;
  } else if (!(a >= S(0) && c >= S(0) && mean[0] == mean[0] && mean[1] == mean[1])) {
    return empty;
  }
  const int x0 = int(left) + (S(int(left)) < left), x1 = int(right);  // first and last pixel centre inside
  const int y0 = int(top) + (S(int(top)) < top), y1 = int(bottom);
  if (x0 > x1 || y0 > y1) return empty;
  return {x0 / tile_width, x1 / tile_width + 1, y0 / tile_height, y1 / tile_height + 1};
}

}  // namespace MEDGS_ISA
}  // namespace medgs
