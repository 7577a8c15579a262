// The operators that a training step needs beside renders, on tensors: `adam_step`, `observe` and `sigma_outside`.
// A device passes the kernels that it runs.
#pragma once

#include <cmath>

#include "checks.h"

namespace medgs {

using Tensors = std::vector<Tensor>;

/// Adam (Kingma and Ba 2015) on several tensors; steps are float32 scalars on the CPU, as torch.optim.Adam keeps them.
template <class Run>
void adam_step_op(const Tensors& parameters, const Tensors& gradients, const Tensors& first_moments,
                  const Tensors& second_moments, const Tensors& steps, const std::vector<double>& rates, double beta1,
                  double beta2, double epsilon, const Run& run) {
  const size_t count = parameters.size();
  MEDGS_CHECK_VALUE(gradients.size() == count && first_moments.size() == count && second_moments.size() == count &&
                        steps.size() == count && rates.size() == count,
                    "adam_step: every parameter needs a gradient, two moments, a step and a rate");
  if (count == 0) return;
  const Tensor& like = parameters[0];
  check_real(like, "parameters[0]");
  std::vector<Tensor> kept;  // gradients made contiguous
  with_scalar(like, [&](auto zero) {
    using S = decltype(zero);
    std::vector<AdamTensor<S>> tensors;
    for (size_t i = 0; i < count; ++i) {
      const Shape shape = shape_of(parameters[i]);
      check_float(parameters[i], "parameters", shape, like);
      check_float(gradients[i], "gradients", shape, like);
      check_float(first_moments[i], "first_moments", shape, like);
      check_float(second_moments[i], "second_moments", shape, like);
      MEDGS_CHECK_VALUE(
          parameters[i].is_contiguous() && first_moments[i].is_contiguous() && second_moments[i].is_contiguous(),
          "adam_step: parameters and moments must be contiguous");
      MEDGS_CHECK_VALUE(steps[i].numel() == 1 && steps[i].is_cpu() && steps[i].scalar_type() == ScalarType::Float,
                        "adam_step: steps must be float32 scalars on the CPU");
      const double step = *data<float>(steps[i]) + 1.0;  // written once every tensor has passed
      kept.push_back(packed(gradients[i]));
      AdamTensor<S> t;
      t.size = parameters[i].numel();
      t.parameter = writable<S>(parameters[i]);
      t.gradient = data<S>(kept.back());
      t.first_moment = writable<S>(first_moments[i]);
      t.second_moment = writable<S>(second_moments[i]);
      t.rate = S(rates[i] / (1 - std::pow(beta1, step)));
      t.correction = S(1 / std::sqrt(1 - std::pow(beta2, step)));
      if (t.size > 0) tensors.push_back(t);
    }
    for (size_t i = 0; i < count; ++i) *writable<float>(steps[i]) += 1;
    run(tensors, AdamConstants<S>{S(beta1), S(beta2), S(1 - beta1), S(1 - beta2), S(epsilon)});
  });
}

template <class Run>
void observe_op(const Tensor& radii, const Tensor& active, const Tensor& screen_gradients, const Tensor& m_gradients,
                int64_t bit, double half_width, double half_height, Tensor max_radii, Tensor xyz_gradient_accum,
                Tensor m_gradient_accum, Tensor denom, Tensor m_denom, const Run& run) {
  MEDGS_CHECK_VALUE(radii.dim() == 2, "radii must have shape (V, N), got ", shape_of(radii));
  const int64_t v = radii.size(0), n = radii.size(1);
  check_real(screen_gradients, "screen_gradients");
  check_shape(active, "active", {v, n}, radii);
  check_shape(screen_gradients, "screen_gradients", {v, n, 2}, radii);
  MEDGS_CHECK_TYPE(radii.scalar_type() == ScalarType::Int && active.scalar_type() == ScalarType::Byte,
                   "radii must be int32 and active uint8");
  check_float(m_gradients, "m_gradients", {n, 1}, screen_gradients);
  check_float(max_radii, "max_radii", {n}, screen_gradients);
  MEDGS_CHECK_VALUE(max_radii.is_contiguous(), "statistics must be contiguous");
  for (const Tensor& t : {xyz_gradient_accum, m_gradient_accum, denom, m_denom}) {
    check_float(t, "a statistic", {n, 1}, screen_gradients);
    MEDGS_CHECK_VALUE(t.is_contiguous(), "statistics must be contiguous");
  }
  const Tensor r = packed(radii), a = packed(active), g = packed(screen_gradients), m = packed(m_gradients);
  with_scalar(g, [&](auto zero) {
    using S = decltype(zero);
    ObserveArguments<S> in{};
    in.gaussians = n;
    in.views = v;
    in.bit = uint8_t(bit);
    in.half_width = S(half_width);
    in.half_height = S(half_height);
    in.radii = data<int32_t>(r);
    in.active = data<uint8_t>(a);
    in.screen_gradients = data<S>(g);
    in.m_gradients = data<S>(m);
    in.max_radii = writable<S>(max_radii);
    in.xyz_gradient_accum = writable<S>(xyz_gradient_accum);
    in.m_gradient_accum = writable<S>(m_gradient_accum);
    in.denom = writable<S>(denom);
    in.m_denom = writable<S>(m_denom);
    run(in);
  });
}

/// The loss and its gradient by the raw values; `parts` rows of partial sums are the kernel's scratch.
template <class Run>
std::tuple<Tensor, Tensor> sigma_outside_op(const Tensor& raw, double low, double high, int64_t parts, const Run& run) {
  check_real(raw, "raw");
  MEDGS_CHECK_VALUE(raw.dim() == 1, "raw must have shape (N,), got ", shape_of(raw));
  const Tensor x = packed(raw);
  auto sums = zeros({parts, 4}, x);
  auto loss = zeros({}, x);
  auto gradient = new_like(x);
  if (x.numel() == 0) return {loss, gradient};
  with_scalar(x, [&](auto zero) {
    using S = decltype(zero);
    SigmaArguments<S> in{};
    in.gaussians = x.numel();
    in.parts = parts;
    in.low = S(low);
    in.high = S(high);
    in.raw = data<S>(x);
    in.sums = writable<S>(sums);
    in.loss = writable<S>(loss);
    in.gradient = writable<S>(gradient);
    run(in);
  });
  return {loss, gradient};
}

}  // namespace medgs
