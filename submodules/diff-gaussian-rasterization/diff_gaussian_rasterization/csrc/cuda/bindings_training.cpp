// `adam_step`, `observe` and `sigma_outside` for CUDA tensors.
#include "../common/training_op.h"
#include "bindings.h"

namespace medgs {
namespace {

void adam_step_cuda(TensorList parameters, TensorList gradients, TensorList first_moments, TensorList second_moments,
                    TensorList steps, at::ArrayRef<double> rates, double beta1, double beta2, double epsilon) {
  if (parameters.empty()) return;
  const c10::cuda::CUDAGuard guard(parameters[0].device());
  adam_step_op(parameters, gradients, first_moments, second_moments, steps, rates, beta1, beta2, epsilon,
               [](const auto& tensors, const auto& constants) {
                 C10_CUDA_CHECK(cuda::launch_adam(tensors.data(), int(tensors.size()), constants,
                                                  at::cuda::getCurrentCUDAStream()));
               });
}

void observe_cuda(const Tensor& radii, const Tensor& active, const Tensor& screen_gradients, const Tensor& m_gradients,
                  int64_t bit, double half_width, double half_height, Tensor max_radii, Tensor xyz_gradient_accum,
                  Tensor m_gradient_accum, Tensor denom, Tensor m_denom) {
  const c10::cuda::CUDAGuard guard(radii.device());
  observe_op(radii, active, screen_gradients, m_gradients, bit, half_width, half_height, max_radii, xyz_gradient_accum,
             m_gradient_accum, denom, m_denom,
             [](const auto& in) { C10_CUDA_CHECK(cuda::launch_observe(in, at::cuda::getCurrentCUDAStream())); });
}

std::tuple<Tensor, Tensor> sigma_outside_cuda(const Tensor& raw, double low, double high) {
  constexpr int64_t kParts = 256;
  const c10::cuda::CUDAGuard guard(raw.device());
  return sigma_outside_op(raw, low, high, kParts, [](const auto& in) {
    C10_CUDA_CHECK(cuda::launch_sigma_outside(in, at::cuda::getCurrentCUDAStream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) {
  m.impl("adam_step", &adam_step_cuda);
  m.impl("observe", &observe_cuda);
  m.impl("sigma_outside", &sigma_outside_cuda);
}

}  // namespace medgs
