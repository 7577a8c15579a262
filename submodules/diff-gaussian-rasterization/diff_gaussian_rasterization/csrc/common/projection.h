// Projecting one 3-D Gaussian into the image, forward and backward: EWA splatting (Zwicker et al. 2001) with the
// conventions of 3-D Gaussian splatting (Kerbl et al. 2023). T is float or double. The CPU loop and the CUDA thread
// both call `project_gaussian` and `project_gaussian_backward` and do nothing else.
#pragma once

#include <cmath>
#include <cstdint>

#include "constants.h"

namespace medgs {
namespace MEDGS_ISA {

constexpr double kNearPlane = 0.2;   // a mean at this view-space depth or nearer is culled
constexpr double kViewMargin = 1.3;  // x/z and y/z stay within this many tan(fov / 2) inside the Jacobian
// Floor under the ratio of determinants that antialiasing takes the root of.
constexpr double kMinCompensation = 0.000025;
constexpr int kMaxShCount = 16;  // coefficients of degree 3

/// What all Gaussians of a call share. Matrices are in the row-vector convention: view = [p, 1] @ viewmatrix.
template <class T>
struct ProjectionCamera {
  const T* viewmatrix;  // [4, 4] world to view: x right, y down, z forward
  const T* projmatrix;  // [4, 4] world to clip
  const T* campos;      // [3] camera centre, world
  T tanfovx, tanfovy;   // tan of half the field of view
  T scale_modifier;     // factor on all scales
  int width, height;    // px
  int sh_degree;        // 0..3
  bool antialiasing;
  T low_pass;  // px^2 added to the diagonal of every projected covariance
};

/// Gaussians, or with a mutable T the gradients with respect to them. Null marks what the call does not have.
template <class T>
struct Gaussians3d {
  T* means;          // [N, 3]
  T* scales;         // [N, 3] standard deviations
  T* quaternions;    // [N, 4] w x y z, of any length but 0
  T* covariances;    // [N, 6] xx xy xz yy yz zz, in place of scales and quaternions
  T* shs;            // [N, K, 3] or null
  int64_t sh_count;  // K
};

/// Their footprints in the image, or with a const T the gradients with respect to those.
template <class T>
struct Footprints {
  T* means2d;        // [N, 2] px
  T* conics;         // [N, 3] A B C: q = A dx^2 + 2 B dx dy + C dy^2
  T* colours;        // [N, 3], null without shs
  T* depths;         // [N] view-space z
  T* compensations;  // [N] factor on the opacity
};

template <class T>
struct Vec3 {
  T x, y, z;
};
template <class T>
MEDGS_INLINE Vec3<T> operator+(Vec3<T> a, Vec3<T> b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z};
}
template <class T>
MEDGS_INLINE Vec3<T> operator*(T s, Vec3<T> a) {
  return {s * a.x, s * a.y, s * a.z};
}
template <class T>
MEDGS_INLINE T dot(Vec3<T> a, Vec3<T> b) {
  return a.x * b.x + a.y * b.y + a.z * b.z;
}
template <class T>
MEDGS_INLINE Vec3<T> load3(const T* p) {
  return {p[0], p[1], p[2]};
}
template <class T>
MEDGS_INLINE void store3(T* p, Vec3<T> v) {
  p[0] = v.x;
  p[1] = v.y;
  p[2] = v.z;
}
/// Column j of the upper three rows of a row-vector matrix: the world-space gradient of output coordinate j.
template <class T>
MEDGS_INLINE Vec3<T> column(const T* matrix, int j) {
  return {matrix[j], matrix[4 + j], matrix[8 + j]};
}
template <class T>
MEDGS_INLINE T transform(const T* matrix, int j, Vec3<T> p) {
  return dot(column(matrix, j), p) + matrix[12 + j];
}
template <class T>
MEDGS_INLINE T clamp(T value, T limit) {
  return value < -limit ? -limit : value > limit ? limit : value;
}

/// The six distinct entries of a symmetric 3 x 3 matrix. As a gradient, each holds both places of the entry.
template <class T>
struct Symmetric3 {
  T xx, xy, xz, yy, yz, zz;
};
template <class T>
MEDGS_INLINE Vec3<T> operator*(const Symmetric3<T>& m, Vec3<T> v) {
  return {m.xx * v.x + m.xy * v.y + m.xz * v.z, m.xy * v.x + m.yy * v.y + m.yz * v.z,
          m.xz * v.x + m.yz * v.y + m.zz * v.z};
}

// ---- covariance from factors
// -----------------------------------------------------------------------------------------

template <class T>
struct Rotation {
  T w, x, y, z;      // the unit quaternion
  T inverse_length;  // of the given one
  T r[3][3];
};

template <class T>
MEDGS_INLINE Rotation<T> rotation_of(const T* quaternion) {
  Rotation<T> q;
  const T squared = quaternion[0] * quaternion[0] + quaternion[1] * quaternion[1] + quaternion[2] * quaternion[2] +
                    quaternion[3] * quaternion[3];
  q.inverse_length = squared > T(0) ? T(1) / std::sqrt(squared) : T(0);  // a zero quaternion does not rotate
  q.w = quaternion[0] * q.inverse_length;
  q.x = quaternion[1] * q.inverse_length;
  q.y = quaternion[2] * q.inverse_length;
  q.z = quaternion[3] * q.inverse_length;
  q.r[0][0] = T(1) - T(2) * (q.y * q.y + q.z * q.z);
  q.r[0][1] = T(2) * (q.x * q.y - q.w * q.z);
  q.r[0][2] = T(2) * (q.x * q.z + q.w * q.y);
  q.r[1][0] = T(2) * (q.x * q.y + q.w * q.z);
  q.r[1][1] = T(1) - T(2) * (q.x * q.x + q.z * q.z);
  q.r[1][2] = T(2) * (q.y * q.z - q.w * q.x);
  q.r[2][0] = T(2) * (q.x * q.z - q.w * q.y);
  q.r[2][1] = T(2) * (q.y * q.z + q.w * q.x);
  q.r[2][2] = T(1) - T(2) * (q.x * q.x + q.y * q.y);
  return q;
}

/// Sigma = M M^T with M = R diag(scale_modifier * scales).
template <class T>
MEDGS_INLINE Symmetric3<T> covariance_of(const T* scales, const T* quaternion, T scale_modifier) {
  const Rotation<T> q = rotation_of(quaternion);
  Vec3<T> row[3];  // of M
  for (int i = 0; i < 3; ++i)
    row[i] = scale_modifier * Vec3<T>{q.r[i][0] * scales[0], q.r[i][1] * scales[1], q.r[i][2] * scales[2]};
  return {dot(row[0], row[0]), dot(row[0], row[1]), dot(row[0], row[2]),
          dot(row[1], row[1]), dot(row[1], row[2]), dot(row[2], row[2])};
}

template <class T>
MEDGS_INLINE void covariance_of_backward(const T* scales, const T* quaternion, T scale_modifier,
                                         const Symmetric3<T>& v_covariance, T* v_scales, T* v_quaternion) {
  const Rotation<T> q = rotation_of(quaternion);
  // dL/dM = 2 G M with G the symmetric matrix of dL/dSigma: each off-diagonal entry takes half of what it holds.
  const Symmetric3<T> twice_g = {T(2) * v_covariance.xx, v_covariance.xy, v_covariance.xz,
                                 T(2) * v_covariance.yy, v_covariance.yz, T(2) * v_covariance.zz};
  T v_r[3][3];
  for (int j = 0; j < 3; ++j) {
    const Vec3<T> axis = {q.r[0][j], q.r[1][j], q.r[2][j]};
    const T scale = scale_modifier * scales[j];
    const Vec3<T> v_axis = twice_g * (scale * axis);  // column j of dL/dM
    v_scales[j] = scale_modifier * dot(v_axis, axis);
    v_r[0][j] = scale * v_axis.x;
    v_r[1][j] = scale * v_axis.y;
    v_r[2][j] = scale * v_axis.z;
  }
  const T v_w = T(2) * (q.x * (v_r[2][1] - v_r[1][2]) + q.y * (v_r[0][2] - v_r[2][0]) + q.z * (v_r[1][0] - v_r[0][1]));
  const T v_x = T(2) * (q.w * (v_r[2][1] - v_r[1][2]) + q.y * (v_r[0][1] + v_r[1][0]) + q.z * (v_r[0][2] + v_r[2][0]) -
                        T(2) * q.x * (v_r[1][1] + v_r[2][2]));
  const T v_y = T(2) * (q.w * (v_r[0][2] - v_r[2][0]) + q.x * (v_r[0][1] + v_r[1][0]) + q.z * (v_r[1][2] + v_r[2][1]) -
                        T(2) * q.y * (v_r[0][0] + v_r[2][2]));
  const T v_z = T(2) * (q.w * (v_r[1][0] - v_r[0][1]) + q.x * (v_r[0][2] + v_r[2][0]) + q.y * (v_r[1][2] + v_r[2][1]) -
                        T(2) * q.z * (v_r[0][0] + v_r[1][1]));
  const T along = q.w * v_w + q.x * v_x + q.y * v_y + q.z * v_z;  // normalisation takes no change of length
  v_quaternion[0] = q.inverse_length * (v_w - along * q.w);
  v_quaternion[1] = q.inverse_length * (v_x - along * q.x);
  v_quaternion[2] = q.inverse_length * (v_y - along * q.y);
  v_quaternion[3] = q.inverse_length * (v_z - along * q.z);
}

// ---- spherical harmonics
// ---------------------------------------------------------------------------------------------

// Normalisations: kSh<l><|m|> of the polynomials below.
constexpr double kSh00 = 0.28209479177387814;
constexpr double kSh1 = 0.4886025119029199;
constexpr double kSh20 = 0.31539156525252005, kSh21 = 1.0925484305920792, kSh22 = 0.5462742152960396;
constexpr double kSh30 = 0.3731763325901154, kSh31 = 0.4570457994644658, kSh32 = 1.445305721320277,
                 kSh33 = 0.5900435899266435;

MEDGS_INLINE int sh_count(int degree) { return (degree + 1) * (degree + 1); }

/// Real spherical harmonics with the Condon-Shortley phase, in the order (0, 0), (1, -1), (1, 0), (1, 1), (2, -2), ...
/// `d` is a unit vector.
template <class T>
MEDGS_INLINE void sh_basis(int degree, Vec3<T> d, T* basis) {
  const T x = d.x, y = d.y, z = d.z;
  basis[0] = T(kSh00);
  if (degree < 1) return;
  basis[1] = -T(kSh1) * y;
  basis[2] = T(kSh1) * z;
  basis[3] = -T(kSh1) * x;
  if (degree < 2) return;
  const T xx = x * x, yy = y * y, zz = z * z;
  basis[4] = T(kSh21) * x * y;
  basis[5] = -T(kSh21) * y * z;
  basis[6] = T(kSh20) * (T(2) * zz - xx - yy);
  basis[7] = -T(kSh21) * x * z;
  basis[8] = T(kSh22) * (xx - yy);
  if (degree < 3) return;
  basis[9] = -T(kSh33) * y * (T(3) * xx - yy);
  basis[10] = T(2) * T(kSh32) * x * y * z;
  basis[11] = -T(kSh31) * y * (T(4) * zz - xx - yy);
  basis[12] = T(kSh30) * z * (T(2) * zz - T(3) * xx - T(3) * yy);
  basis[13] = -T(kSh31) * x * (T(4) * zz - xx - yy);
  basis[14] = T(kSh32) * z * (xx - yy);
  basis[15] = -T(kSh33) * x * (xx - T(3) * yy);
}

/// dL/dd of the polynomials above, given dL/dbasis `v`.
template <class T>
MEDGS_INLINE Vec3<T> sh_basis_backward(int degree, Vec3<T> d, const T* v) {
  const T x = d.x, y = d.y, z = d.z;
  Vec3<T> v_d = {T(0), T(0), T(0)};
  if (degree < 1) return v_d;
  v_d = T(kSh1) * Vec3<T>{-v[3], -v[1], v[2]};
  if (degree < 2) return v_d;
  const T xx = x * x, yy = y * y, zz = z * z;
  v_d = v_d + (T(kSh21) * v[4]) * Vec3<T>{y, x, T(0)};
  v_d = v_d + (-T(kSh21) * v[5]) * Vec3<T>{T(0), z, y};
  v_d = v_d + (T(2) * T(kSh20) * v[6]) * Vec3<T>{-x, -y, T(2) * z};
  v_d = v_d + (-T(kSh21) * v[7]) * Vec3<T>{z, T(0), x};
  v_d = v_d + (T(2) * T(kSh22) * v[8]) * Vec3<T>{x, -y, T(0)};
  if (degree < 3) return v_d;
  v_d = v_d + (-T(3) * T(kSh33) * v[9]) * Vec3<T>{T(2) * x * y, xx - yy, T(0)};
  v_d = v_d + (T(2) * T(kSh32) * v[10]) * Vec3<T>{y * z, x * z, x * y};
  v_d = v_d + (-T(kSh31) * v[11]) * Vec3<T>{-T(2) * x * y, T(4) * zz - xx - T(3) * yy, T(8) * y * z};
  v_d = v_d + (T(3) * T(kSh30) * v[12]) * Vec3<T>{-T(2) * x * z, -T(2) * y * z, T(2) * zz - xx - yy};
  v_d = v_d + (-T(kSh31) * v[13]) * Vec3<T>{T(4) * zz - T(3) * xx - yy, -T(2) * x * y, T(8) * x * z};
  v_d = v_d + (T(kSh32) * v[14]) * Vec3<T>{T(2) * x * z, -T(2) * y * z, xx - yy};
  v_d = v_d + (-T(3) * T(kSh33) * v[15]) * Vec3<T>{xx - yy, -T(2) * x * y, T(0)};
  return v_d;
}

/// The direction in which the camera sees the mean, and one over their distance.
template <class T>
MEDGS_INLINE Vec3<T> viewing_direction(Vec3<T> mean, Vec3<T> campos, T& inverse_distance) {
  const Vec3<T> offset = mean + T(-1) * campos;
  const T squared = dot(offset, offset);
  inverse_distance = squared > T(0) ? T(1) / std::sqrt(squared) : T(0);
  return inverse_distance * offset;
}

/// Colour before the clamp at 0.
template <class T>
MEDGS_INLINE Vec3<T> sh_sum(const T* basis, const T* shs, int count) {
  Vec3<T> colour = {T(0.5), T(0.5), T(0.5)};
  for (int k = 0; k < count; ++k) colour = colour + basis[k] * load3(shs + 3 * k);
  return colour;
}

template <class T>
MEDGS_INLINE Vec3<T> sh_colour(const T* shs, int degree, Vec3<T> mean, Vec3<T> campos) {
  T inverse_distance, basis[kMaxShCount];
  sh_basis(degree, viewing_direction(mean, campos, inverse_distance), basis);
  const Vec3<T> colour = sh_sum(basis, shs, sh_count(degree));
  return {colour.x > T(0) ? colour.x : T(0), colour.y > T(0) ? colour.y : T(0), colour.z > T(0) ? colour.z : T(0)};
}

/// Writes dL/dshs and returns dL/dmean. The gradient is 0 where the colour is clamped.
template <class T>
MEDGS_INLINE Vec3<T> sh_colour_backward(const T* shs, int degree, Vec3<T> mean, Vec3<T> campos, Vec3<T> v_colour,
                                        T* v_shs) {
  T inverse_distance, basis[kMaxShCount], v_basis[kMaxShCount];
  const Vec3<T> direction = viewing_direction(mean, campos, inverse_distance);
  sh_basis(degree, direction, basis);
  const Vec3<T> colour = sh_sum(basis, shs, sh_count(degree));
  const Vec3<T> v = {colour.x > T(0) ? v_colour.x : T(0), colour.y > T(0) ? v_colour.y : T(0),
                     colour.z > T(0) ? v_colour.z : T(0)};
  for (int k = 0; k < sh_count(degree); ++k) {
    // A channel that is clamped, as one that is not a number, must not reach the mean through 0 times it.
    const Vec3<T> sh = load3(shs + 3 * k);
    v_basis[k] =
        (v.x != T(0) ? v.x * sh.x : T(0)) + (v.y != T(0) ? v.y * sh.y : T(0)) + (v.z != T(0) ? v.z * sh.z : T(0));
    store3(v_shs + 3 * k, basis[k] * v);
  }
  const Vec3<T> v_direction = sh_basis_backward(degree, direction, v_basis);
  return inverse_distance * (v_direction + (-dot(v_direction, direction)) * direction);
}

// ---- footprint
// -------------------------------------------------------------------------------------------------------

/// All that both directions need of one Gaussian before it knows whether it is visible.
template <class T>
struct Projection {
  Vec3<T> mean;  // world
  T x, y, z;     // view-space mean
  T clip_w, ndc_x, ndc_y;
  T ratio_x, ratio_y;        // x / z and y / z, clamped
  bool inside_x, inside_y;   // not clamped
  T focal_x, focal_y;        // px
  Vec3<T> row_x, row_y;      // of J W
  Symmetric3<T> covariance;  // world
  T xx, xy, yy;              // J W Sigma W^T J^T, px^2, before the low-pass filter
  T low_pass;

  MEDGS_INLINE T determinant() const { return xx * yy - xy * xy; }
  MEDGS_INLINE T filtered_determinant() const { return (xx + low_pass) * (yy + low_pass) - xy * xy; }
};

template <class T>
MEDGS_INLINE Projection<T> project_mean(const ProjectionCamera<T>& camera, const Gaussians3d<const T>& gaussians,
                                        int64_t n) {
  Projection<T> p;
  p.mean = load3(gaussians.means + 3 * n);
  p.low_pass = camera.low_pass;
  p.x = transform(camera.viewmatrix, 0, p.mean);
  p.y = transform(camera.viewmatrix, 1, p.mean);
  p.z = transform(camera.viewmatrix, 2, p.mean);
  p.clip_w = transform(camera.projmatrix, 3, p.mean);
  p.ndc_x = transform(camera.projmatrix, 0, p.mean) / p.clip_w;
  p.ndc_y = transform(camera.projmatrix, 1, p.mean) / p.clip_w;
  return p;
}

template <class T>
MEDGS_INLINE void project_covariance(const ProjectionCamera<T>& camera, const Gaussians3d<const T>& gaussians,
                                     int64_t n, Projection<T>& p) {
  if (gaussians.covariances) {
    const T* c = gaussians.covariances + 6 * n;
    p.covariance = {c[0], c[1], c[2], c[3], c[4], c[5]};
  } else {
    p.covariance = covariance_of(gaussians.scales + 3 * n, gaussians.quaternions + 4 * n, camera.scale_modifier);
  }
  const T limit_x = T(kViewMargin) * camera.tanfovx, limit_y = T(kViewMargin) * camera.tanfovy;
  p.ratio_x = clamp(p.x / p.z, limit_x);
  p.ratio_y = clamp(p.y / p.z, limit_y);
  p.inside_x = p.ratio_x > -limit_x && p.ratio_x < limit_x;
  p.inside_y = p.ratio_y > -limit_y && p.ratio_y < limit_y;
  p.focal_x = T(camera.width) / (T(2) * camera.tanfovx);
  p.focal_y = T(camera.height) / (T(2) * camera.tanfovy);

  // J = [[fx / z, 0, -fx x / z^2], [0, fy / z, -fy y / z^2]] and W's rows are the columns of the row-vector view
  // matrix.
  const Vec3<T> forward = column(camera.viewmatrix, 2);
  p.row_x = (p.focal_x / p.z) * (column(camera.viewmatrix, 0) + (-p.ratio_x) * forward);
  p.row_y = (p.focal_y / p.z) * (column(camera.viewmatrix, 1) + (-p.ratio_y) * forward);
  const Vec3<T> sigma_x = p.covariance * p.row_x;
  p.xx = dot(p.row_x, sigma_x);
  p.xy = dot(p.row_y, sigma_x);
  p.yy = dot(p.row_y, p.covariance * p.row_y);
}

/// ceil(3 standard deviations) along the longer axis, px, of the filtered covariance.
template <class T>
MEDGS_INLINE T radius_of(T xx, T xy, T yy) {
  const T half_gap = T(0.5) * (xx - yy);
  const T gap = half_gap * half_gap + xy * xy;  // mid^2 - det, without its cancellation
  const T larger = T(0.5) * (xx + yy) + std::sqrt(gap > T(kMinEigenvalueGap) ? gap : T(kMinEigenvalueGap));
  return bounded_radius(std::ceil(T(kRadiusSigmas) * std::sqrt(larger)));
}

/// Does [centre - radius, centre + radius] touch the tiles that cover 0 .. size along one axis?
template <class T>
MEDGS_INLINE bool touches_tiles(T centre, T radius, int size) {
  const int covered = ceil_div(size, kVisibilityTile) * kVisibilityTile;
  return centre + radius >= T(0) && centre - radius < T(covered);
}

/// Fills entry n of `footprints` and `radii`; a Gaussian that is not visible has radius 0 and zeros everywhere.
/// Every test reads "visible if", so that an input that is not a number is culled.
template <class T>
MEDGS_INLINE void project_gaussian(const ProjectionCamera<T>& camera, const Gaussians3d<const T>& gaussians, int64_t n,
                                   const Footprints<T>& footprints, int32_t* radii) {
  Projection<T> p = project_mean(camera, gaussians, n);
  T u = T(0), v = T(0), determinant = T(0), radius = T(0);
  bool visible = p.z > T(kNearPlane);
  if (visible) {
    project_covariance(camera, gaussians, n, p);
    determinant = p.filtered_determinant();
    u = T(0.5) * ((p.ndc_x + T(1)) * T(camera.width) - T(1));
    v = T(0.5) * ((p.ndc_y + T(1)) * T(camera.height) - T(1));
    radius = radius_of(p.xx + p.low_pass, p.xy, p.yy + p.low_pass);
    // A covariance that was given may have a negative eigenvalue; then no ellipse bounds the footprint.
    visible = determinant > T(0) && p.xx + p.low_pass > T(0) && touches_tiles(u, radius, camera.width) &&
              touches_tiles(v, radius, camera.height);
  }
  T* mean2d = footprints.means2d + 2 * n;
  T* conic = footprints.conics + 3 * n;
  radii[n] = visible ? int32_t(radius) : 0;
  mean2d[0] = visible ? u : T(0);
  mean2d[1] = visible ? v : T(0);
  conic[0] = visible ? (p.yy + p.low_pass) / determinant : T(0);
  conic[1] = visible ? -p.xy / determinant : T(0);
  conic[2] = visible ? (p.xx + p.low_pass) / determinant : T(0);
  footprints.depths[n] = visible ? p.z : T(0);

  T compensation = visible ? T(1) : T(0);
  if (visible && camera.antialiasing) {
    const T ratio = p.determinant() / determinant;
    compensation = std::sqrt(ratio > T(kMinCompensation) ? ratio : T(kMinCompensation));
  }
  footprints.compensations[n] = compensation;

  if (gaussians.shs) {
    Vec3<T> colour = {T(0), T(0), T(0)};
    if (visible)
      colour = sh_colour(gaussians.shs + 3 * gaussians.sh_count * n, camera.sh_degree, p.mean, load3(camera.campos));
    store3(footprints.colours + 3 * n, colour);
  }
}

/// Writes entry n of `v_gaussians`, which starts as zeros: nothing is written for a Gaussian that is not visible.
template <class T>
MEDGS_INLINE void project_gaussian_backward(const ProjectionCamera<T>& camera, const Gaussians3d<const T>& gaussians,
                                            int64_t n, const int32_t* radii, const Footprints<const T>& v_footprints,
                                            const Gaussians3d<T>& v_gaussians) {
  if (radii[n] == 0) return;
  Projection<T> p = project_mean(camera, gaussians, n);
  project_covariance(camera, gaussians, n, p);

  // Conic = Cov^-1, so dL/dCov = -Conic (dL/dConic) Conic; v_xy is for the entry that stands twice.
  const T filtered_xx = p.xx + p.low_pass, filtered_yy = p.yy + p.low_pass;
  const T inverse_determinant = T(1) / p.filtered_determinant();
  const T a = filtered_yy * inverse_determinant, b = -p.xy * inverse_determinant, c = filtered_xx * inverse_determinant;
  const T v_a = v_footprints.conics[3 * n], v_b = v_footprints.conics[3 * n + 1], v_c = v_footprints.conics[3 * n + 2];
  T v_xx = -(a * a * v_a + a * b * v_b + b * b * v_c);
  T v_xy = -(T(2) * a * b * v_a + (a * c + b * b) * v_b + T(2) * b * c * v_c);
  T v_yy = -(b * b * v_a + b * c * v_b + c * c * v_c);

  if (camera.antialiasing) {
    const T ratio = p.determinant() * inverse_determinant;
    if (ratio > T(kMinCompensation)) {
      const T v_ratio = v_footprints.compensations[n] / (T(2) * std::sqrt(ratio)) * inverse_determinant;
      v_xx = v_xx + v_ratio * (p.yy - ratio * filtered_yy);
      v_xy = v_xy + v_ratio * T(2) * p.xy * (ratio - T(1));
      v_yy = v_yy + v_ratio * (p.xx - ratio * filtered_xx);
    }
  }

  // Cov = rows Sigma rows^T.
  const Vec3<T> rx = p.row_x, ry = p.row_y;
  const Symmetric3<T> v_covariance = {
      v_xx * rx.x * rx.x + v_xy * rx.x * ry.x + v_yy * ry.x * ry.x,
      T(2) * v_xx * rx.x * rx.y + v_xy * (rx.x * ry.y + rx.y * ry.x) + T(2) * v_yy * ry.x * ry.y,
      T(2) * v_xx * rx.x * rx.z + v_xy * (rx.x * ry.z + rx.z * ry.x) + T(2) * v_yy * ry.x * ry.z,
      v_xx * rx.y * rx.y + v_xy * rx.y * ry.y + v_yy * ry.y * ry.y,
      T(2) * v_xx * rx.y * rx.z + v_xy * (rx.y * ry.z + rx.z * ry.y) + T(2) * v_yy * ry.y * ry.z,
      v_xx * rx.z * rx.z + v_xy * rx.z * ry.z + v_yy * ry.z * ry.z};
  if (gaussians.covariances) {
    T* v = v_gaussians.covariances + 6 * n;
    v[0] = v_covariance.xx;
    v[1] = v_covariance.xy;
    v[2] = v_covariance.xz;
    v[3] = v_covariance.yy;
    v[4] = v_covariance.yz;
    v[5] = v_covariance.zz;
  } else {
    covariance_of_backward(gaussians.scales + 3 * n, gaussians.quaternions + 4 * n, camera.scale_modifier, v_covariance,
                           v_gaussians.scales + 3 * n, v_gaussians.quaternions + 4 * n);
  }

  // row_x = (fx / z) (W_0 - ratio_x W_2) depends on the mean through z and, where it is not clamped, ratio_x.
  const Vec3<T> sigma_x = p.covariance * rx, sigma_y = p.covariance * ry;
  const Vec3<T> v_row_x = (T(2) * v_xx) * sigma_x + v_xy * sigma_y;
  const Vec3<T> v_row_y = (T(2) * v_yy) * sigma_y + v_xy * sigma_x;
  const Vec3<T> forward = column(camera.viewmatrix, 2);
  const T inverse_z = T(1) / p.z;
  T v_x = T(0), v_y = T(0), v_z = v_footprints.depths[n] - inverse_z * (dot(v_row_x, rx) + dot(v_row_y, ry));
  if (p.inside_x) {
    v_x = -p.focal_x * inverse_z * inverse_z * dot(v_row_x, forward);
    v_z = v_z - v_x * p.ratio_x;
  }
  if (p.inside_y) {
    v_y = -p.focal_y * inverse_z * inverse_z * dot(v_row_y, forward);
    v_z = v_z - v_y * p.ratio_y;
  }
  Vec3<T> v_mean =
      v_x * column(camera.viewmatrix, 0) + v_y * column(camera.viewmatrix, 1) + v_z * column(camera.viewmatrix, 2);

  // The centre: ndc = clip / clip_w.
  const T v_clip_x = T(0.5) * T(camera.width) * v_footprints.means2d[2 * n] / p.clip_w;
  const T v_clip_y = T(0.5) * T(camera.height) * v_footprints.means2d[2 * n + 1] / p.clip_w;
  const T v_clip_w = -(v_clip_x * p.ndc_x + v_clip_y * p.ndc_y);
  v_mean = v_mean + v_clip_x * column(camera.projmatrix, 0) + v_clip_y * column(camera.projmatrix, 1) +
           v_clip_w * column(camera.projmatrix, 3);

  if (gaussians.shs) {
    const int64_t offset = 3 * gaussians.sh_count * n;
    v_mean = v_mean + sh_colour_backward(gaussians.shs + offset, camera.sh_degree, p.mean, load3(camera.campos),
                                         load3(v_footprints.colours + 3 * n), v_gaussians.shs + offset);
  }
  store3(v_gaussians.means + 3 * n, v_mean);
}

}  // namespace MEDGS_ISA
}  // namespace medgs
