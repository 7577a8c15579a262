// `adam_step`, `observe` and `sigma_outside` for CUDA tensors.
#include "../common/training_op.h"
#include "bindings.h"

namespace medgs {
namespace {

void adam_step_cuda(const Tensors& parameters, const Tensors& gradients, const Tensors& first_moments,
                    const Tensors& second_moments, const Tensors& steps, const std::vector<double>& rates, double beta1,
                    double beta2, double epsilon) {
  if (parameters.empty()) return;
  const CudaGuard guard(parameters[0]);
  adam_step_op(parameters, gradients, first_moments, second_moments, steps, rates, beta1, beta2, epsilon,
               [](const auto& tensors, const auto& constants) {
                 MEDGS_CUDA_CHECK(cuda::launch_adam(tensors.data(), int(tensors.size()), constants, current_stream()));
               });
}

void observe_cuda(const Tensor& radii, const Tensor& active, const Tensor& screen_gradients, const Tensor& m_gradients,
                  int64_t bit, double half_width, double half_height, Tensor max_radii, Tensor xyz_gradient_accum,
                  Tensor m_gradient_accum, Tensor denom, Tensor m_denom) {
  const CudaGuard guard(radii);
  observe_op(radii, active, screen_gradients, m_gradients, bit, half_width, half_height, max_radii, xyz_gradient_accum,
             m_gradient_accum, denom, m_denom,
             [](const auto& in) { MEDGS_CUDA_CHECK(cuda::launch_observe(in, current_stream())); });
}

std::tuple<Tensor, Tensor> sigma_outside_cuda(const Tensor& raw, double low, double high) {
  constexpr int64_t kParts = 256;
  const CudaGuard guard(raw);
  return sigma_outside_op(raw, low, high, kParts,
                          [](const auto& in) { MEDGS_CUDA_CHECK(cuda::launch_sigma_outside(in, current_stream())); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) {
  m.impl("adam_step", TORCH_BOX(&adam_step_cuda));
  m.impl("observe", TORCH_BOX(&observe_cuda));
  m.impl("sigma_outside", TORCH_BOX(&sigma_outside_cuda));
}

}  // namespace medgs
