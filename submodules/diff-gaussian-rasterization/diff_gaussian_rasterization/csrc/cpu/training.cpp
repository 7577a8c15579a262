// `adam_step`, `observe` and `sigma_outside`. Schemas and CPU side.
#include "../common/statistics.h"
#include "../common/training_op.h"
#include "kernels.h"

namespace medgs {
namespace {

void adam_step_cpu(const Tensors& parameters, const Tensors& gradients, const Tensors& first_moments,
                   const Tensors& second_moments, const Tensors& steps, const std::vector<double>& rates, double beta1,
                   double beta2, double epsilon) {
  adam_step_op(parameters, gradients, first_moments, second_moments, steps, rates, beta1, beta2, epsilon,
               [](const auto& tensors, const auto& constants) {
                 using S = std::decay_t<decltype(constants.beta1)>;
                 for (const auto& tensor : tensors) kernels<S>().adam(tensor, constants, medgs::threads());
               });
}

void observe_cpu(const Tensor& radii, const Tensor& active, const Tensor& screen_gradients, const Tensor& m_gradients,
                 int64_t bit, double half_width, double half_height, Tensor max_radii, Tensor xyz_gradient_accum,
                 Tensor m_gradient_accum, Tensor denom, Tensor m_denom) {
  observe_op(radii, active, screen_gradients, m_gradients, bit, half_width, half_height, max_radii, xyz_gradient_accum,
             m_gradient_accum, denom, m_denom, [](const auto& in) {
               torch::stable::parallel_for(0, in.gaussians, 4096, [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n) generic::observe_gaussian(in, n);
               });
             });
}

std::tuple<Tensor, Tensor> sigma_outside_cpu(const Tensor& raw, double low, double high) {
  constexpr int64_t kParts = 16;
  return sigma_outside_op(raw, low, high, kParts, [](const auto& in) {
    using S = std::decay_t<decltype(in.low)>;
    kernels<S>().sigma_outside(in, medgs::threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diff_gaussian_rasterization, m) {
  m.def(
      "adam_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] first_moments, Tensor(c!)[] second_moments, "
      "Tensor(d!)[] steps, float[] rates, float beta1, float beta2, float epsilon) -> ()");
  m.def(
      "observe(Tensor radii, Tensor active, Tensor screen_gradients, Tensor m_gradients, int bit, float half_width, "
      "float half_height, Tensor(a!) max_radii, Tensor(b!) xyz_gradient_accum, Tensor(c!) m_gradient_accum, Tensor(d!) "
      "denom, "
      "Tensor(e!) m_denom) -> ()");
  m.def("sigma_outside(Tensor raw, float low, float high) -> (Tensor loss, Tensor gradient)");
}

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CPU, m) {
  m.impl("adam_step", TORCH_BOX(&adam_step_cpu));
  m.impl("observe", TORCH_BOX(&observe_cpu));
  m.impl("sigma_outside", TORCH_BOX(&sigma_outside_cpu));
}

}  // namespace medgs
