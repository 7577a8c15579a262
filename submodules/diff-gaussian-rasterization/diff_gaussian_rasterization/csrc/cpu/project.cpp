// `project` and its gradient on the CPU, and the schemas of both. See general.py for the meaning of the arguments.
#include "../common/project_op.h"

namespace medgs {
namespace {

constexpr int64_t kWorthThreads = 1024;  // Gaussians below which starting threads costs more than it saves

ProjectOutputs project(const Tensor& means3d, const OptionalTensor& scales, const OptionalTensor& quaternions,
                       const OptionalTensor& covariances, const OptionalTensor& shs, const Tensor& viewmatrix,
                       const Tensor& projmatrix, const Tensor& campos, double tanfovx, double tanfovy,
                       double scale_modifier, int64_t width, int64_t height, int64_t sh_degree, bool antialiasing,
                       double low_pass) {
  const auto arguments =
      check_project_arguments(means3d, scales, quaternions, covariances, shs, viewmatrix, projmatrix, campos, tanfovx,
                              tanfovy, scale_modifier, width, height, sh_degree, antialiasing, low_pass);
  return project_with(
      arguments, [](const auto& camera, const auto& gaussians, int64_t count, const auto& footprints, int32_t* radii) {
#pragma omp parallel for schedule(static) num_threads(count < kWorthThreads ? 1 : medgs::threads())
        for (int64_t n = 0; n < count; ++n) project_gaussian(camera, gaussians, n, footprints, radii);
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
  const auto arguments =
      check_project_arguments(means3d, scales, quaternions, covariances, shs, viewmatrix, projmatrix, campos, tanfovx,
                              tanfovy, scale_modifier, width, height, sh_degree, antialiasing, low_pass);
  return project_backward_with(arguments, v_means2d, v_conics, v_colours, v_depths, v_compensations, radii,
                               [](const auto& camera, const auto& gaussians, int64_t count, const int32_t* radii,
                                  const auto& v_footprints, const auto& v_gaussians) {
#pragma omp parallel for schedule(static) num_threads(count < kWorthThreads ? 1 : medgs::threads())
                                 for (int64_t n = 0; n < count; ++n)
                                   project_gaussian_backward(camera, gaussians, n, radii, v_footprints, v_gaussians);
                               });
}

}  // namespace
}  // namespace medgs

STABLE_TORCH_LIBRARY_FRAGMENT(diff_gaussian_rasterization, m) {
  m.def(
      "project(Tensor means3d, Tensor? scales, Tensor? quaternions, Tensor? covariances, Tensor? shs, "
      "Tensor viewmatrix, Tensor projmatrix, Tensor campos, float tanfovx, float tanfovy, float scale_modifier, "
      "int width, int height, int sh_degree, bool antialiasing, float low_pass=0.3) -> "
      "(Tensor means2d, Tensor conics, Tensor colours, Tensor depths, Tensor compensations, Tensor radii)");
  m.def(
      "project_backward(Tensor v_means2d, Tensor v_conics, Tensor v_colours, Tensor v_depths, "
      "Tensor v_compensations, Tensor radii, Tensor means3d, Tensor? scales, Tensor? quaternions, "
      "Tensor? covariances, Tensor? shs, Tensor viewmatrix, Tensor projmatrix, Tensor campos, float tanfovx, "
      "float tanfovy, float scale_modifier, int width, int height, int sh_degree, bool antialiasing, float "
      "low_pass=0.3) -> "
      "(Tensor v_means3d, Tensor v_scales, Tensor v_quaternions, Tensor v_covariances, Tensor v_shs)");
}

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CPU, m) {
  m.impl("project", TORCH_BOX(&medgs::project));
  m.impl("project_backward", TORCH_BOX(&medgs::project_backward));
}
