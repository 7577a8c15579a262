// `project` and its gradient on CUDA tensors; their schemas are in cpu/project.cpp.
#include "project.h"

#include "../common/project_op.h"
#include "bindings.h"

namespace medgs {
namespace {

ProjectOutputs project(const Tensor& means3d, const OptionalTensor& scales, const OptionalTensor& quaternions,
                       const OptionalTensor& covariances, const OptionalTensor& shs, const Tensor& viewmatrix,
                       const Tensor& projmatrix, const Tensor& campos, double tanfovx, double tanfovy,
                       double scale_modifier, int64_t width, int64_t height, int64_t sh_degree, bool antialiasing,
                       double low_pass) {
  const CudaGuard guard(means3d);
  const auto arguments =
      check_project_arguments(means3d, scales, quaternions, covariances, shs, viewmatrix, projmatrix, campos, tanfovx,
                              tanfovy, scale_modifier, width, height, sh_degree, antialiasing, low_pass);
  return project_with(
      arguments, [](const auto& camera, const auto& gaussians, int64_t count, const auto& footprints, int32_t* radii) {
        launch_project(camera, gaussians, count, footprints, radii, current_stream());
        MEDGS_CUDA_CHECK(cudaGetLastError());
      });
}

ProjectGradients project_backward(const Tensor& v_means2d, const Tensor& v_conics, const Tensor& v_colours,
                                  const Tensor& v_depths, const Tensor& v_compensations, const Tensor& radii,
                                  const Tensor& means3d, const OptionalTensor& scales,
                                  const OptionalTensor& quaternions, const OptionalTensor& covariances,
                                  const OptionalTensor& shs, const Tensor& viewmatrix, const Tensor& projmatrix,
                                  const Tensor& campos, double tanfovx, double tanfovy, double scale_modifier,
                                  int64_t width, int64_t height, int64_t sh_degree, bool antialiasing,
                                  double low_pass) {
  const CudaGuard guard(means3d);
  const auto arguments =
      check_project_arguments(means3d, scales, quaternions, covariances, shs, viewmatrix, projmatrix, campos, tanfovx,
                              tanfovy, scale_modifier, width, height, sh_degree, antialiasing, low_pass);
  return project_backward_with(arguments, v_means2d, v_conics, v_colours, v_depths, v_compensations, radii,
                               [](const auto& camera, const auto& gaussians, int64_t count, const int32_t* radii,
                                  const auto& v_footprints, const auto& v_gaussians) {
                                 launch_project_backward(camera, gaussians, count, radii, v_footprints, v_gaussians,
                                                         current_stream());
                                 MEDGS_CUDA_CHECK(cudaGetLastError());
                               });
}

}  // namespace
}  // namespace medgs

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) {
  m.impl("project", TORCH_BOX(&medgs::project));
  m.impl("project_backward", TORCH_BOX(&medgs::project_backward));
}
