// The operator `project` on tensors: checks, allocation and the choice of the scalar type, the same on every device.
// A device passes what runs over the Gaussians: a loop on the CPU, a kernel launch on CUDA.
#pragma once

#include <ATen/Dispatch.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "projection.h"

namespace medgs {
using namespace MEDGS_ISA;
using OptionalTensor = std::optional<Tensor>;

using ProjectOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // as the schema in cpu/project.cpp
using ProjectGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The tensor arguments that both directions share, checked and contiguous; an absent one is undefined.
struct ProjectArguments {
  Tensor means3d, scales, quaternions, covariances, shs, viewmatrix, projmatrix, campos;
  double tanfovx, tanfovy, scale_modifier;
  int64_t width, height, sh_degree;
  bool antialiasing;
  double low_pass;

  int64_t count() const { return means3d.size(0); }

  template <class T>
  ProjectionCamera<T> camera() const {
    return {viewmatrix.const_data_ptr<T>(),
            projmatrix.const_data_ptr<T>(),
            campos.const_data_ptr<T>(),
            T(tanfovx),
            T(tanfovy),
            T(scale_modifier),
            int(width),
            int(height),
            int(sh_degree),
            antialiasing,
            T(low_pass)};
  }
  template <class T>
  Gaussians3d<const T> gaussians() const {
    const auto pointer = [](const Tensor& t) -> const T* { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
    return {pointer(means3d),     pointer(scales), pointer(quaternions),
            pointer(covariances), pointer(shs),    shs.defined() ? shs.size(1) : 0};
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
  TORCH_CHECK_VALUE(means3d.dim() == 2, "means3D must have shape (N, 3), got ", means3d.sizes());
  TORCH_CHECK_VALUE(scales.has_value() == quaternions.has_value() && scales.has_value() != covariances.has_value(),
                    "give exactly one of scales with rotations and cov3D_precomp");
  TORCH_CHECK_VALUE(sh_degree >= 0 && sh_degree <= 3, "sh_degree must be 0 ... 3, got ", sh_degree);
  TORCH_CHECK_VALUE(low_pass >= 0, "kernel_size must not be negative, got ", low_pass);
  check_image(width, height);

  const int64_t n = means3d.size(0), needed = sh_count(int(sh_degree));
  const int64_t coefficients = shs.has_value() && shs->dim() == 3 ? shs->size(1) : needed;
  TORCH_CHECK_VALUE(coefficients >= needed, "shs must have at least ", needed, " coefficients for sh_degree ",
                    sh_degree, ", got ", coefficients);
  const auto checked = [&](const OptionalTensor& tensor, const char* name, IntArrayRef shape) {
    if (!tensor.has_value()) return Tensor();
    check_float(*tensor, name, shape, means3d);
    return tensor->contiguous();
  };
  return {checked(means3d, "means3D", {n, 3}),
          checked(scales, "scales", {n, 3}),
          checked(quaternions, "rotations", {n, 4}),
          checked(covariances, "cov3D_precomp", {n, 6}),
          checked(shs, "shs", {n, coefficients, 3}),
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
  const auto options = arguments.means3d.options();
  const Tensor means2d = at::empty({n, 2}, options), conics = at::empty({n, 3}, options);
  const Tensor colours = at::empty({arguments.shs.defined() ? n : 0, 3}, options);
  const Tensor depths = at::empty({n}, options), compensations = at::empty({n}, options);
  const Tensor radii = at::empty({n}, options.dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(arguments.means3d.scalar_type(), "project", [&] {
    using T = scalar_t;
    const Footprints<T> footprints = {means2d.mutable_data_ptr<T>(), conics.mutable_data_ptr<T>(),
                                      colours.mutable_data_ptr<T>(), depths.mutable_data_ptr<T>(),
                                      compensations.mutable_data_ptr<T>()};
    run(arguments.camera<T>(), arguments.gaussians<T>(), n, footprints, radii.mutable_data_ptr<int32_t>());
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
  const auto options = arguments.means3d.options();
  const auto zeros_like = [&](const Tensor& input) {
    return input.defined() ? at::zeros(input.sizes(), options) : at::empty({0}, options);
  };
  const Tensor v_means3d = zeros_like(arguments.means3d), v_scales = zeros_like(arguments.scales);
  const Tensor v_quaternions = zeros_like(arguments.quaternions), v_covariances = zeros_like(arguments.covariances);
  const Tensor v_shs = zeros_like(arguments.shs);

  const auto checked = [&](const Tensor& tensor, const char* name, IntArrayRef shape) {
    check_float(tensor, name, shape, v_means3d);
    return tensor.contiguous();
  };
  const Tensor g_means2d = checked(v_means2d, "v_means2d", {n, 2});
  const Tensor g_conics = checked(v_conics, "v_conics", {n, 3});
  const Tensor g_colours = checked(v_colours, "v_colours", {arguments.shs.defined() ? n : 0, 3});
  const Tensor g_depths = checked(v_depths, "v_depths", {n});
  const Tensor g_compensations = checked(v_compensations, "v_compensations", {n});
  check_shape(radii, "radii", {n}, v_means3d);
  TORCH_CHECK_TYPE(radii.scalar_type() == at::kInt, "radii must be int32, got ", radii.scalar_type());
  const Tensor visible = radii.contiguous();
  AT_DISPATCH_FLOATING_TYPES(v_means3d.scalar_type(), "project_backward", [&] {
    using T = scalar_t;
    const Footprints<const T> v_footprints = {g_means2d.const_data_ptr<T>(), g_conics.const_data_ptr<T>(),
                                              g_colours.const_data_ptr<T>(), g_depths.const_data_ptr<T>(),
                                              g_compensations.const_data_ptr<T>()};
    const Gaussians3d<T> v_gaussians = {v_means3d.mutable_data_ptr<T>(),     v_scales.mutable_data_ptr<T>(),
                                        v_quaternions.mutable_data_ptr<T>(), v_covariances.mutable_data_ptr<T>(),
                                        v_shs.mutable_data_ptr<T>(),         arguments.gaussians<T>().sh_count};
    run(arguments.camera<T>(), arguments.gaussians<T>(), n, visible.const_data_ptr<int32_t>(), v_footprints,
        v_gaussians);
  });
  return {v_means3d, v_scales, v_quaternions, v_covariances, v_shs};
}

}  // namespace medgs
