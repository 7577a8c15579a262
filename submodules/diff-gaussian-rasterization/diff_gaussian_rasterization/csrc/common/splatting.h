// One projected Gaussian to what is blended of it: opacity, colour and depth as channels, its place in depth; and the
// gradients back; and raw appearance to what is blended. The same on every device.
#pragma once

#include <cstring>
#include <type_traits>

#include "arguments.h"
#include "constants.h"

namespace medgs {
namespace MEDGS_ISA {

/// Unsigned numbers in the order of depths, which are positive.
template <class S>
using DepthKey = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;

/// What is not visible lies behind everything.
template <class S>
MEDGS_INLINE DepthKey<S> depth_key(S depth, int32_t radius) {
  DepthKey<S> key;
  std::memcpy(&key, &depth, sizeof key);
  return radius > 0 ? key : ~DepthKey<S>(0);
}

template <class S>
MEDGS_INLINE void prepare_splat(const SplatArguments<S>& in, int64_t n) {
  const bool visible = in.radii[n] > 0;
  const S depth = visible ? in.depths[n] : S(1);
  in.active[n] = visible ? kActive : 0;
  in.alphas[n] = in.opacities[n] * in.compensations[n];
  for (int c = 0; c < 3; ++c) in.features[4 * n + c] = in.colours[3 * n + c];
  in.features[4 * n + 3] = in.inverse ? S(1) / depth : depth;
}

template <class S>
MEDGS_INLINE void split_gradient(const SplatArguments<S>& in, int64_t n) {
  const S depth = in.radii[n] > 0 ? in.depths[n] : S(1);
  const S by_depth = in.v_features[4 * n + 3];
  in.v_depths[n] = in.radii[n] <= 0 ? S(0) : in.inverse ? -by_depth / (depth * depth) : by_depth;
  for (int c = 0; c < 3; ++c) in.v_colours[3 * n + c] = in.v_features[4 * n + c];
  in.v_compensations[n] = in.v_alphas[n] * in.opacities[n];
  in.v_opacities[n] = in.v_alphas[n] * in.compensations[n];
  if (!in.v_screen) return;
  S* screen = in.v_screen + in.columns * n;
  screen[0] = in.v_means2d[2 * n] * in.half_width;
  screen[1] = in.v_means2d[2 * n + 1] * in.half_height;
  if (in.columns == 3) screen[2] = 0;
  if (in.columns == 4) {
    screen[2] = in.v_absolute[2 * n] * in.half_width;
    screen[3] = in.v_absolute[2 * n + 1] * in.half_height;
  }
}

/// Colour of a raw one, a coefficient of the constant harmonic; and its gradient.
template <class S>
MEDGS_INLINE S colour_of(S raw) {
  const S colour = S(kHarmonic0) * raw + S(0.5);
  return colour < S(0) ? S(0) : colour;
}
template <class S>
MEDGS_INLINE S colour_gradient(S colour, S v_colour) {
  return colour <= S(0) ? S(0) : S(kHarmonic0) * v_colour;
}

}  // namespace MEDGS_ISA
}  // namespace medgs
