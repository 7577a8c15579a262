// `similarity`: L1 and SSIM of renders against frames in one pass. Schema and CPU side.
#include "../common/similarity_op.h"
#include "kernels.h"

namespace medgs {
namespace {

std::tuple<Tensor, Tensor, Tensor> similarity_cpu(const Tensor& images, const Tensor& targets, bool with_gradient) {
  const int64_t bands = images.dim() == 4 ? generic::ceil_div(images.size(2), int64_t(kBand)) : 0;
  const int64_t parts = images.dim() == 4 ? images.size(0) * images.size(1) * bands : 0;
  return similarity_op(images, targets, with_gradient, parts, [&](const auto& in) {
    using S = std::decay_t<decltype(in.c1)>;
    MEDGS_CHECK(kernels<S>().similarity(in, medgs::threads()), "similarity: out of memory on the CPU");
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diff_gaussian_rasterization, m) {
  m.def("similarity(Tensor images, Tensor targets, bool with_gradient) -> (Tensor l1, Tensor ssim, Tensor gradient)");
}

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CPU, m) { m.impl("similarity", TORCH_BOX(&similarity_cpu)); }

}  // namespace medgs
