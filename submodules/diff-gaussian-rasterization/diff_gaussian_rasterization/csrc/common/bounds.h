// Which tiles a projected Gaussian reaches with alpha >= 1/255: tighter than three standard deviations where the
// opacity is low, and never short of a pixel that the dense definition draws.
#pragma once

#include <cmath>

#include "arguments.h"
#include "constants.h"
#include "elementary.h"

namespace medgs {
namespace MEDGS_ISA {

/// Pixels [left, right] x [top, bottom] of an image of width x height whose centres are integers.
template <class T>
struct PixelBounds {
  T left, right, top, bottom;
};

/// Bounds of q <= limit for a centre (u, v) px and a conic (a, b, c), within the image. Returns the condition (T is a
/// scalar or a vector) that there are any; not-a-number anywhere gives none.
template <class T, class S>
MEDGS_INLINE auto pixel_bounds(T u, T v, T a, T b, T c, T limit, S width, S height, PixelBounds<T>& out) {
  // The ellipse's half extents are sqrt(limit c / det), sqrt(limit a / det). The determinant of a long Gaussian
  // cancels: its lower bound gives an upper one for the extents, and where that is not positive, the whole image.
  const S epsilon = sizeof(S) == 4 ? S(1.2e-7) : S(2.3e-16), everything = S(1e9);
  const T determinant = a * c - b * b - S(4) * epsilon * (a * c + b * b);
  // Slack for the rounding of q itself, so that no pixel on the edge is lost.
  const S slack = S(1.002), pad = S(0.01);
  const T scale = slack * limit / determinant;
  const T none = u - u;
  const T half_width = determinant > S(0) ? math::sqrt(scale * c) + pad : none + everything;
  const T half_height = determinant > S(0) ? math::sqrt(scale * a) + pad : none + everything;
  const S last_x = width - S(1), last_y = height - S(1);
  out.left = u - half_width > S(0) ? u - half_width : none;
  out.right = u + half_width < last_x ? u + half_width : none + last_x;
  out.top = v - half_height > S(0) ? v - half_height : none;
  out.bottom = v + half_height < last_y ? v + half_height : none + last_y;
  return (limit >= S(0)) & (a >= S(0)) & (c >= S(0)) & (u + half_width >= S(0)) & (u - half_width <= last_x) &
         (v + half_height >= S(0)) & (v - half_height <= last_y);
}

/// Tiles with a pixel centre inside the bounds.
template <int Tile, class S>
MEDGS_INLINE TileRectangle tiles_of(S left, S right, S top, S bottom) {
  const int x0 = int(left) + (S(int(left)) < left), x1 = int(right);  // first and last pixel centre inside
  const int y0 = int(top) + (S(int(top)) < top), y1 = int(bottom);
  if (x0 > x1 || y0 > y1) return {0, 0, 0, 0};
  return {uint16_t(x0 / Tile), uint16_t(x1 / Tile + 1), uint16_t(y0 / Tile), uint16_t(y1 / Tile + 1)};
}

}  // namespace MEDGS_ISA
}  // namespace medgs
