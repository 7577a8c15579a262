// The operators that a training step needs beside renders, on tensors: `adam_step`, `observe` and `sigma_outside`.
// A device passes the kernels that it runs.
#pragma once

#include <cmath>

#include "checks.h"

namespace medgs {

using at::TensorList;

/// Adam (Kingma and Ba 2015) on several tensors; steps are float32 scalars on the CPU, as torch.optim.Adam keeps them.
template <class Run>
void adam_step_op(TensorList parameters, TensorList gradients, TensorList first_moments, TensorList second_moments,
                  TensorList steps, at::ArrayRef<double> rates, double beta1, double beta2, double epsilon,
                  const Run& run) {
  const size_t count = parameters.size();
  TORCH_CHECK_VALUE(gradients.size() == count && first_moments.size() == count && second_moments.size() == count &&
                        steps.size() == count && rates.size() == count,
                    "adam_step: every parameter needs a gradient, two moments, a step and a rate");
  if (count == 0) return;
  const Tensor& like = parameters[0];
  check_real(like, "parameters[0]");
  std::vector<Tensor> kept;  // gradients made contiguous
  AT_DISPATCH_FLOATING_TYPES(like.scalar_type(), "adam_step", [&] {
    std::vector<AdamTensor<scalar_t>> tensors;
    for (size_t i = 0; i < count; ++i) {
      const auto shape = parameters[i].sizes();
      check_float(parameters[i], "parameters", shape, like);
      check_float(gradients[i], "gradients", shape, like);
      check_float(first_moments[i], "first_moments", shape, like);
      check_float(second_moments[i], "second_moments", shape, like);
      TORCH_CHECK_VALUE(
          parameters[i].is_contiguous() && first_moments[i].is_contiguous() && second_moments[i].is_contiguous(),
          "adam_step: parameters and moments must be contiguous");
      TORCH_CHECK_VALUE(steps[i].numel() == 1 && steps[i].is_cpu() && steps[i].scalar_type() == at::kFloat,
                        "adam_step: steps must be float32 scalars on the CPU");
      const double step = *steps[i].data_ptr<float>() + 1.0;  // written once every tensor has passed
      kept.push_back(gradients[i].contiguous());
      AdamTensor<scalar_t> t;
      t.size = parameters[i].numel();
      t.parameter = parameters[i].template mutable_data_ptr<scalar_t>();
      t.gradient = kept.back().template const_data_ptr<scalar_t>();
      t.first_moment = first_moments[i].template mutable_data_ptr<scalar_t>();
      t.second_moment = second_moments[i].template mutable_data_ptr<scalar_t>();
      t.rate = scalar_t(rates[i] / (1 - std::pow(beta1, step)));
      t.correction = scalar_t(1 / std::sqrt(1 - std::pow(beta2, step)));
      if (t.size > 0) tensors.push_back(t);
    }
    for (size_t i = 0; i < count; ++i) *steps[i].data_ptr<float>() += 1;
    run(tensors, AdamConstants<scalar_t>{scalar_t(beta1), scalar_t(beta2), scalar_t(1 - beta1), scalar_t(1 - beta2),
                                         scalar_t(epsilon)});
  });
}

template <class Run>
void observe_op(const Tensor& radii, const Tensor& active, const Tensor& screen_gradients, const Tensor& m_gradients,
                int64_t bit, double half_width, double half_height, Tensor max_radii, Tensor xyz_gradient_accum,
                Tensor m_gradient_accum, Tensor denom, Tensor m_denom, const Run& run) {
  TORCH_CHECK_VALUE(radii.dim() == 2, "radii must have shape (V, N), got ", radii.sizes());
  const int64_t v = radii.size(0), n = radii.size(1);
  check_real(screen_gradients, "screen_gradients");
  check_shape(active, "active", {v, n}, radii);
  check_shape(screen_gradients, "screen_gradients", {v, n, 2}, radii);
  TORCH_CHECK_TYPE(radii.scalar_type() == at::kInt && active.scalar_type() == at::kByte,
                   "radii must be int32 and active uint8");
  check_float(m_gradients, "m_gradients", {n, 1}, screen_gradients);
  check_float(max_radii, "max_radii", {n}, screen_gradients);
  TORCH_CHECK_VALUE(max_radii.is_contiguous(), "statistics must be contiguous");
  for (const Tensor& t : {xyz_gradient_accum, m_gradient_accum, denom, m_denom}) {
    check_float(t, "a statistic", {n, 1}, screen_gradients);
    TORCH_CHECK_VALUE(t.is_contiguous(), "statistics must be contiguous");
  }
  const Tensor r = radii.contiguous(), a = active.contiguous(), g = screen_gradients.contiguous(),
               m = m_gradients.contiguous();
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "observe", [&] {
    ObserveArguments<scalar_t> in{};
    in.gaussians = n;
    in.views = v;
    in.bit = uint8_t(bit);
    in.half_width = scalar_t(half_width);
    in.half_height = scalar_t(half_height);
    in.radii = r.const_data_ptr<int32_t>();
    in.active = a.const_data_ptr<uint8_t>();
    in.screen_gradients = g.const_data_ptr<scalar_t>();
    in.m_gradients = m.const_data_ptr<scalar_t>();
    in.max_radii = max_radii.mutable_data_ptr<scalar_t>();
    in.xyz_gradient_accum = xyz_gradient_accum.mutable_data_ptr<scalar_t>();
    in.m_gradient_accum = m_gradient_accum.mutable_data_ptr<scalar_t>();
    in.denom = denom.mutable_data_ptr<scalar_t>();
    in.m_denom = m_denom.mutable_data_ptr<scalar_t>();
    run(in);
  });
}

/// The loss and its gradient by the raw values; `parts` rows of partial sums are the kernel's scratch.
template <class Run>
std::tuple<Tensor, Tensor> sigma_outside_op(const Tensor& raw, double low, double high, int64_t parts, const Run& run) {
  check_real(raw, "raw");
  TORCH_CHECK_VALUE(raw.dim() == 1, "raw must have shape (N,), got ", raw.sizes());
  const Tensor x = raw.contiguous();
  auto sums = at::zeros({parts, 4}, x.options());
  auto loss = at::zeros({}, x.options());
  auto gradient = at::empty_like(x);
  if (x.numel() == 0) return {loss, gradient};
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sigma_outside", [&] {
    SigmaArguments<scalar_t> in{};
    in.gaussians = x.numel();
    in.parts = parts;
    in.low = scalar_t(low);
    in.high = scalar_t(high);
    in.raw = x.const_data_ptr<scalar_t>();
    in.sums = sums.mutable_data_ptr<scalar_t>();
    in.loss = loss.mutable_data_ptr<scalar_t>();
    in.gradient = gradient.mutable_data_ptr<scalar_t>();
    run(in);
  });
  return {loss, gradient};
}

}  // namespace medgs
