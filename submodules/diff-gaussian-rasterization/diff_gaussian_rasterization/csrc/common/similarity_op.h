// The operator `similarity` on tensors, the same on every device but for the kernel it runs.
#pragma once

#include <cmath>

#include "checks.h"

namespace medgs {

constexpr double kWindowSigma = 1.5;                                        // px (Wang et al. 2004)
constexpr double kSimilarityC1 = 0.01 * 0.01, kSimilarityC2 = 0.03 * 0.03;  // for values in [0, 1]

/// `parts` is the number of partial sums that the kernel writes; `run(arguments)` runs it.
template <class Run>
std::tuple<Tensor, Tensor, Tensor> similarity_op(const Tensor& images, const Tensor& targets, bool with_gradient,
                                                 int64_t parts, const Run& run) {
  check_real(images, "images");
  TORCH_CHECK_VALUE(images.dim() == 4 && images.numel() > 0, "images must have shape (B, C, H, W), got ",
                    images.sizes());
  check_float(targets, "targets", images.sizes(), images);
  const Tensor x = images.contiguous(), y = targets.contiguous();
  auto gradient = with_gradient ? at::empty_like(x) : at::empty({0}, x.options());
  auto maps = at::empty({with_gradient ? 3 : 0, x.numel()}, x.options());
  auto sums = at::empty({parts, 2}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "similarity", [&] {
    SimilarityArguments<scalar_t> in{};
    in.planes = x.size(0) * x.size(1);
    in.height = x.size(2);
    in.width = x.size(3);
    in.images = x.const_data_ptr<scalar_t>();
    in.targets = y.const_data_ptr<scalar_t>();
    double window[kWindow], total = 0;
    for (int k = 0; k < kWindow; ++k)
      total += window[k] = std::exp(-(k - kHalo) * (k - kHalo) / (2 * kWindowSigma * kWindowSigma));
    for (int k = 0; k < kWindow; ++k) in.window[k] = scalar_t(window[k] / total);
    in.c1 = scalar_t(kSimilarityC1);
    in.c2 = scalar_t(kSimilarityC2);
    in.maps = maps.mutable_data_ptr<scalar_t>();
    in.sums = sums.mutable_data_ptr<scalar_t>();
    in.gradient = with_gradient ? gradient.mutable_data_ptr<scalar_t>() : nullptr;
    run(in);
  });
  const auto means = sums.sum(0) / double(x.numel());
  return {means.select(0, 0).clone(), means.select(0, 1).clone(), gradient};
}

}  // namespace medgs
