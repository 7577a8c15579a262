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
  MEDGS_CHECK_VALUE(images.dim() == 4 && images.numel() > 0, "images must have shape (B, C, H, W), got ",
                    shape_of(images));
  check_float(targets, "targets", shape_of(images), images);
  const Tensor x = packed(images), y = packed(targets);
  const Tensor gradient = with_gradient ? new_like(x) : empty({0}, x);
  const Tensor maps = empty({with_gradient ? 3 : 0, x.numel()}, x);
  const Tensor sums = empty({parts, 2}, x), l1 = empty({}, x), ssim = empty({}, x);
  with_scalar(x, [&](auto zero) {
    using S = decltype(zero);
    SimilarityArguments<S> in{};
    in.planes = x.size(0) * x.size(1);
    in.height = x.size(2);
    in.width = x.size(3);
    in.images = data<S>(x);
    in.targets = data<S>(y);
    double window[kWindow], total = 0;
    for (int k = 0; k < kWindow; ++k)
      total += window[k] = std::exp(-(k - kHalo) * (k - kHalo) / (2 * kWindowSigma * kWindowSigma));
    for (int k = 0; k < kWindow; ++k) in.window[k] = S(window[k] / total);
    in.c1 = S(kSimilarityC1);
    in.c2 = S(kSimilarityC2);
    in.maps = writable<S>(maps);
    in.sums = writable<S>(sums);
    in.parts = parts;
    in.l1 = writable<S>(l1);
    in.ssim = writable<S>(ssim);
    in.gradient = with_gradient ? writable<S>(gradient) : nullptr;
    run(in);
  });
  return {l1, ssim, gradient};
}

}  // namespace medgs
