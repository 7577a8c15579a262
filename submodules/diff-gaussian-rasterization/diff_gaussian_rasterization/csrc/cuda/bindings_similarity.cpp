// `similarity` for CUDA tensors.
#include "../common/similarity_op.h"
#include "bindings.h"

namespace medgs {
namespace {

std::tuple<Tensor, Tensor, Tensor> similarity_cuda(const Tensor& images, const Tensor& targets, bool with_gradient) {
  const c10::cuda::CUDAGuard guard(images.device());
  const auto squares = [](int64_t size) { return (size + cuda::kSimilarityTile - 1) / cuda::kSimilarityTile; };
  const int64_t parts =
      images.dim() == 4 ? images.size(0) * images.size(1) * squares(images.size(2)) * squares(images.size(3)) : 0;
  return similarity_op(images, targets, with_gradient, parts, [&](const auto& in) {
    C10_CUDA_CHECK(cuda::launch_similarity(in, at::cuda::getCurrentCUDAStream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) { m.impl("similarity", &similarity_cuda); }

}  // namespace medgs
