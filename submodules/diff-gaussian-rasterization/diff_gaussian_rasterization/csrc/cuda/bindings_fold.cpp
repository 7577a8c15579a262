// `fold` for CUDA tensors.
#include "../common/fold_op.h"
#include "bindings.h"

namespace medgs {
namespace {

struct Cuda {
  using Guard = CudaGuard;
  static constexpr int64_t kFoldChunk = cuda::kFoldChunk;

  template <class S>
  static void fold(const FoldArguments<S>& in) {
    MEDGS_CUDA_CHECK(cuda::launch_fold(in, current_stream()));
  }
  template <class S>
  static void fold_backward(const FoldArguments<S>& in) {
    MEDGS_CUDA_CHECK(cuda::launch_fold_backward(in, current_stream()));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) { register_fold<Cuda>(m); }

}  // namespace medgs
