// The operator `project` on tensors: checks, allocation and the choice of the scalar type, the same on every device.
// A device passes what runs over the Gaussians: a loop on the CPU, a kernel launch on CUDA.
#pragma once

#include <optional>
#include <tuple>

#include "checks.h"
#include "projection.h"

namespace medgs {
using namespace MEDGS_ISA;
using OptionalTensor = std::optional<Tensor>;

using ProjectOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // as the schema in cpu/project.cpp
using ProjectGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The tensor arguments that both directions share, checked and contiguous.
struct ProjectArguments {
  Tensor means3d;
  OptionalTensor scales, quaternions, covariances, shs;
  Tensor viewmatrix, projmatrix, campos;
  double tanfovx, tanfovy, scale_modifier;
  int64_t width, height, sh_degree;
  bool antialiasing;
  double low_pass;

  int64_t count() const { return means3d.size(0); }

  template <class T>
  ProjectionCamera<T> camera() const {
    return {data<T>(viewmatrix), data<T>(projmatrix), data<T>(campos), T(tanfovx),   T(tanfovy), T(scale_modifier),
            int(width),          int(height),         int(sh_degree),  antialiasing, T(low_pass)};
  }
  template <class T>
  Gaussians3d<const T> gaussians() const {
    return {data<T>(means3d),     data<T>(scales), data<T>(quaternions),
            data<T>(covariances), data<T>(shs),    shs ? shs->size(1) : 0};
  }
};

/// Errors name the arguments as the drop-in interface does.
inline ProjectArguments check_project_arguments(const Tensor& means3d, const OptionalTensor& scales,
                                                const OptionalTensor& quaternions, const OptionalTensor& covariances,
                                                const OptionalTensor& shs, const Tensor& viewmatrix,
                                                const Tensor& projmatrix, const Tensor& campos, double tanfovx,
                                                double tanfovy, double scale_modifier, int64_t width, int64_t height,
                                                int64_t sh_degree, bool antialiasing, double low_pass) {
  check_real(means3d, "means3D");
  MEDGS_CHECK_VALUE(means3d.dim() == 2, "means3D must have shape (N, 3), got ", shape_of(means3d));
  MEDGS_CHECK_VALUE(scales.has_value() == quaternions.has_value() && scales.has_value() != covariances.has_value(),
                    "give exactly one of scales with rotations and cov3D_precomp");
  MEDGS_CHECK_VALUE(sh_degree >= 0 && sh_degree <= 3, "sh_degree must be 0 ... 3, got ", sh_degree);
  MEDGS_CHECK_VALUE(low_pass >= 0, "kernel_size must not be negative, got ", low_pass);
  check_image(width, height);

  const int64_t n = means3d.size(0), needed = sh_count(int(sh_degree));
  const int64_t coefficients = shs.has_value() && shs->dim() == 3 ? shs->size(1) : needed;
  MEDGS_CHECK_VALUE(coefficients >= needed, "shs must have at least ", needed, " coefficients for sh_degree ",
                    sh_degree, ", got ", coefficients);
  const auto checked = [&](const Tensor& tensor, const char* name, const Shape& shape) {
    check_float(tensor, name, shape, means3d);
    return packed(tensor);
  };
  const auto perhaps = [&](const OptionalTensor& tensor, const char* name, const Shape& shape) {
    return tensor ? OptionalTensor(checked(*tensor, name, shape)) : std::nullopt;
  };
  return {checked(means3d, "means3D", {n, 3}),
          perhaps(scales, "scales", {n, 3}),
          perhaps(quaternions, "rotations", {n, 4}),
          perhaps(covariances, "cov3D_precomp", {n, 6}),
          perhaps(shs, "shs", {n, coefficients, 3}),
          checked(viewmatrix, "viewmatrix", {4, 4}),
          checked(projmatrix, "projmatrix", {4, 4}),
          checked(campos, "campos", {3}),
          tanfovx,
          tanfovy,
          scale_modifier,
          width,
          height,
          sh_degree,
          antialiasing,
          low_pass};
}

/// `run(camera, gaussians, count, footprints, radii)`, with T = float or double.
template <class Run>
ProjectOutputs project_with(const ProjectArguments& arguments, const Run& run) {
  const int64_t n = arguments.count();
  const Tensor& like = arguments.means3d;
  const Tensor means2d = empty({n, 2}, like), conics = empty({n, 3}, like);
  const Tensor colours = empty({arguments.shs ? n : 0, 3}, like);
  const Tensor depths = empty({n}, like), compensations = empty({n}, like);
  const Tensor radii = empty({n}, like, ScalarType::Int);
  with_scalar(arguments.means3d, [&](auto zero) {
    using T = decltype(zero);
    const Footprints<T> footprints = {writable<T>(means2d), writable<T>(conics), writable<T>(colours),
                                      writable<T>(depths), writable<T>(compensations)};
    run(arguments.camera<T>(), arguments.gaussians<T>(), n, footprints, writable<int32_t>(radii));
  });
  return {means2d, conics, colours, depths, compensations, radii};
}

/// `run(camera, gaussians, count, radii, v_footprints, v_gaussians)`, with T = float or double. The gradient of an
/// absent input is an empty tensor.
template <class Run>
ProjectGradients project_backward_with(const ProjectArguments& arguments, const Tensor& v_means2d,
                                       const Tensor& v_conics, const Tensor& v_colours, const Tensor& v_depths,
                                       const Tensor& v_compensations, const Tensor& radii, const Run& run) {
  const int64_t n = arguments.count();
  const auto zeros_like = [&](const OptionalTensor& input) {
    return input ? zeros(shape_of(*input), arguments.means3d) : empty({0}, arguments.means3d);
  };
  const Tensor v_means3d = zeros_like(arguments.means3d), v_scales = zeros_like(arguments.scales);
  const Tensor v_quaternions = zeros_like(arguments.quaternions), v_covariances = zeros_like(arguments.covariances);
  const Tensor v_shs = zeros_like(arguments.shs);

  const auto checked = [&](const Tensor& tensor, const char* name, const Shape& shape) {
    check_float(tensor, name, shape, v_means3d);
    return packed(tensor);
  };
  const Tensor g_means2d = checked(v_means2d, "v_means2d", {n, 2});
  const Tensor g_conics = checked(v_conics, "v_conics", {n, 3});
  const Tensor g_colours = checked(v_colours, "v_colours", {arguments.shs ? n : 0, 3});
  const Tensor g_depths = checked(v_depths, "v_depths", {n});
  const Tensor g_compensations = checked(v_compensations, "v_compensations", {n});
  check_ints(radii, "radii", {n}, v_means3d);
  const Tensor visible = packed(radii);
  with_scalar(v_means3d, [&](auto zero) {
    using T = decltype(zero);
    const Footprints<const T> v_footprints = {data<T>(g_means2d), data<T>(g_conics), data<T>(g_colours),
                                              data<T>(g_depths), data<T>(g_compensations)};
    const Gaussians3d<T> v_gaussians = {writable<T>(v_means3d),     writable<T>(v_scales),
                                        writable<T>(v_quaternions), writable<T>(v_covariances),
                                        writable<T>(v_shs),         arguments.gaussians<T>().sh_count};
    run(arguments.camera<T>(), arguments.gaussians<T>(), n, data<int32_t>(visible), v_footprints, v_gaussians);
  });
  return {v_means3d, v_scales, v_quaternions, v_covariances, v_shs};
}

}  // namespace medgs
