// Cutting a Folded-Gaussian at time t and projecting it, forward and backward (MedGS, arXiv 2509.16806, section 3;
// the camera is fixed at distance d before the plane y = 0).
//
// T is a scalar (CUDA, one Gaussian a thread) or a SIMD vector (CPU, one Gaussian a lane); S is its scalar. A condition
// on T is a bool or a lane mask, and `condition ? a : b` selects in both.
#pragma once

#include "constants.h"
#include "elementary.h"

namespace medgs {
namespace MEDGS_ISA {

/// Active parameters of a Gaussian: those that do not depend on the time of the cut.
template <class T>
struct FoldedGaussian {
  T x, z;   // in-plane centre at t = m, plane units
  T m;      // centre in time, (0, 1)
  T sigma;  // spread in time
  T scale_x, scale_z;
  T cosine, sine;  // of the in-plane angle 2 pi sigmoid(rotation)
  T rotation;      // sigmoid(rotation), in turns
};

template <class T, class S>
MEDGS_INLINE FoldedGaussian<T> activate(T x, T z, T m_raw, T sigma_raw, T scale_x_raw, T scale_z_raw, T rotation_raw) {
  FoldedGaussian<T> g;
  g.x = x;
  g.z = z;
  g.m = S(1) / (S(1) + math::exp(-m_raw));
  g.sigma = math::exp(sigma_raw);
  g.scale_x = math::exp(scale_x_raw);
  g.scale_z = math::exp(scale_z_raw);
  g.rotation = S(1) / (S(1) + math::exp(-rotation_raw));
  math::sincos_turns(g.rotation, g.sine, g.cosine);
  return g;
}

/// One cut: what a view of the plane at time t sees of a Gaussian.
template <class T>
struct Cut {
  T u, v;              // centre, px
  T a, b, c;           // conic: q = a du^2 + 2 b du dv + c dv^2
  T radius;            // px, before the test of visibility
  T time_weight;       // delta(t)
  T scale_x, scale_z;  // delta(t) * scale, plane units
};

/// sum_j w_j (m - t)^(j + 1), Horner from the highest power; `path(j, axis)` reads w_j.
template <class T, class Path>
MEDGS_INLINE void displacement(const Path& path, int degree, T offset, T& x, T& z) {
  x = offset - offset;
  z = x;
  for (int j = degree - 1; j >= 0; --j) {
    x = (x + path(j, 0)) * offset;
    z = (z + path(j, 1)) * offset;
  }
}

template <class T, class S, class Path>
MEDGS_INLINE Cut<T> cut(const FoldedGaussian<T>& g, const Path& path, int degree, S time, S sign, S pixels_per_unit,
                        S width, S height) {
  Cut<T> out;
  const T offset = g.m - time;
  const T standardised = offset / g.sigma;
  out.time_weight = math::exp(S(-0.5) * standardised * standardised);
  T dx, dz;
  displacement(path, degree, offset, dx, dz);
  out.u = sign * pixels_per_unit * (g.x + dx) + S(0.5) * (width - S(1));
  out.v = -pixels_per_unit * (g.z + dz) + S(0.5) * (height - S(1));

  out.scale_x = out.time_weight * g.scale_x;
  out.scale_z = out.time_weight * g.scale_z;
  const T sx = pixels_per_unit * out.scale_x, sz = pixels_per_unit * out.scale_z;
  const T p = sx * sx, q = sz * sz;  // variances along the Gaussian's own axes, px^2
  const T cc = g.cosine * g.cosine, ss = g.sine * g.sine, cs = g.cosine * g.sine;
  const T xx = cc * p + ss * q + S(kLowPass);
  const T xy = sign * cs * (p - q);
  const T yy = ss * p + cc * q + S(kLowPass);
  // Eigenvalues are p + 0.3 and q + 0.3: their product has no cancellation, unlike xx yy - xy^2.
  const T determinant = (p + S(kLowPass)) * (q + S(kLowPass));
  out.a = yy / determinant;
  out.b = -xy / determinant;
  out.c = xx / determinant;
  const T half_gap = S(0.5) * (p - q);
  const T gap = half_gap * half_gap;  // mid^2 - det
  const T larger =
      S(0.5) * (p + q) + S(kLowPass) + math::sqrt(gap > S(kMinEigenvalueGap) ? gap : gap * S(0) + S(kMinEigenvalueGap));
  out.radius = math::ceil(S(kRadiusSigmas) * math::sqrt(larger));
  return out;
}

/// Does the square of that radius touch the grid of 16 x 16 tiles that covers the image? Not where the cut is no
/// number.
template <class T, class S>
MEDGS_INLINE auto touches_tiles(const Cut<T>& cut, S grid_width, S grid_height) {
  return (cut.a >= S(0)) & (cut.u + cut.radius >= S(0)) & (cut.u - cut.radius < grid_width) &
         (cut.v + cut.radius >= S(0)) & (cut.v - cut.radius < grid_height);
}

/// Gradients of the raw parameters, summed over the views of one Gaussian.
template <class T>
struct FoldedGradient {
  T x, z, m, sigma, scale_x, scale_z, rotation;  // m and rotation: with respect to the active value until `finish`
};

/// Adds one view's share. `path_gradient(j, axis, value)` adds to dL/dw_j. Returns dL/dt.
template <class T, class S, class Path, class PathGradient>
MEDGS_INLINE T cut_backward(const FoldedGaussian<T>& g, const Path& path, int degree, S time, S sign, S pixels_per_unit,
                            T v_u, T v_v, T v_a, T v_b, T v_c, FoldedGradient<T>& v,
                            const PathGradient& path_gradient) {
  const T offset = g.m - time;
  const T inverse_sigma = S(1) / g.sigma;
  const T standardised = offset * inverse_sigma;
  const T weight = math::exp(S(-0.5) * standardised * standardised);
  const T sx = pixels_per_unit * weight * g.scale_x, sz = pixels_per_unit * weight * g.scale_z;
  const T p = sx * sx, q = sz * sz;
  const T cc = g.cosine * g.cosine, ss = g.sine * g.sine, cs = g.cosine * g.sine;

  // Cov = (p + 0.3) e e^T + (q + 0.3) f f^T over the Gaussian's own axes e = (sign cos, sin), f = (-sign sin, cos).
  // With M = Cov^-1 and G = dL/dM = [[v_a, v_b / 2], [v_b / 2, v_c]], dL/dCov = -M G M, and M e = e / (p + 0.3):
  // nothing cancels for a long Gaussian, unlike in products of the entries of M.
  const T inverse_p = S(1) / (p + S(kLowPass)), inverse_q = S(1) / (q + S(kLowPass));
  const T ee = cc * v_a + sign * cs * v_b + ss * v_c;
  const T ff = ss * v_a - sign * cs * v_b + cc * v_c;
  const T ef = cs * (v_c - v_a) + S(0.5) * sign * (cc - ss) * v_b;
  const T v_log_p = S(-2) * p * inverse_p * inverse_p * ee;  // p = (ppu delta s_x)^2: d p / d log s_x = 2 p
  const T v_log_q = S(-2) * q * inverse_q * inverse_q * ff;
  const T v_angle = S(-2) * (p - q) * inverse_p * inverse_q * ef;
  const T v_log_weight = v_log_p + v_log_q;
  v.scale_x = v.scale_x + v_log_p;
  v.scale_z = v.scale_z + v_log_q;
  v.rotation = v.rotation + v_angle;
  v.sigma = v.sigma + v_log_weight * standardised * standardised;

  const T v_x = sign * pixels_per_unit * v_u;
  const T v_z = -pixels_per_unit * v_v;
  v.x = v.x + v_x;
  v.z = v.z + v_z;
  T v_offset = -v_log_weight * standardised * inverse_sigma;
  T power = offset - offset + S(1);  // offset^j
  for (int j = 0; j < degree; ++j) {
    v_offset = v_offset + S(j + 1) * power * (v_x * path(j, 0) + v_z * path(j, 1));
    power = power * offset;
    path_gradient(j, 0, v_x * power);
    path_gradient(j, 1, v_z * power);
  }
  v.m = v.m + v_offset;
  return -v_offset;
}

/// Through the two sigmoids, to raw parameters.
template <class T, class S>
MEDGS_INLINE void finish(const FoldedGaussian<T>& g, FoldedGradient<T>& v) {
  v.m = v.m * g.m * (S(1) - g.m);
  v.rotation = v.rotation * S(6.283185307179586) * g.rotation * (S(1) - g.rotation);
}

}  // namespace MEDGS_ISA
}  // namespace medgs
