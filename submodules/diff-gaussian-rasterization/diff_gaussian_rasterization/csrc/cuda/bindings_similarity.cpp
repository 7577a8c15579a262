// `similarity` for CUDA tensors.
#include "../common/similarity_op.h"
#include "bindings.h"

namespace medgs {
namespace {

std::tuple<Tensor, Tensor, Tensor> similarity_cuda(const Tensor& images, const Tensor& targets, bool with_gradient) {
  const CudaGuard guard(images);
  const auto squares = [](int64_t size) { return generic::ceil_div(size, int64_t(cuda::kSimilarityTile)); };
  const int64_t parts =
      images.dim() == 4 ? images.size(0) * images.size(1) * squares(images.size(2)) * squares(images.size(3)) : 0;
  // The planes are the third number of a launch's blocks.
  MEDGS_CHECK_VALUE(images.dim() != 4 || images.size(0) * images.size(1) <= 65535,
                    "similarity: at most 65535 planes (B x C) in one call on CUDA, got ", images.size(0), " x ",
                    images.size(1));
  return similarity_op(images, targets, with_gradient, parts,
                       [&](const auto& in) { MEDGS_CUDA_CHECK(cuda::launch_similarity(in, current_stream())); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) { m.impl("similarity", TORCH_BOX(&similarity_cuda)); }

}  // namespace medgs
