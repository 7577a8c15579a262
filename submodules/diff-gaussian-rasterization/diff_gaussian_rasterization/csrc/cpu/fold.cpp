// `fold`: Folded-Gaussians cut at V times and projected. Schema and CPU side.
#include "../common/fold_op.h"
#include "kernels.h"

namespace medgs {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static constexpr int64_t kFoldChunk = medgs::kFoldChunk;

  template <class S>
  static void fold(const FoldArguments<S>& in) {
    kernels<S>().fold(in, medgs::threads());
  }
  template <class S>
  static void fold_backward(const FoldArguments<S>& in) {
    kernels<S>().fold_backward(in, medgs::threads());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diff_gaussian_rasterization, m) {
  m.def(
      "fold(Tensor xyz, Tensor w1, Tensor m, Tensor sigma, Tensor scaling, Tensor rotation, Tensor times, "
      "Tensor signs, float pixels_per_unit, int width, int height) "
      "-> (Tensor means2d, Tensor conics, Tensor radii, Tensor active)");
  m.def(
      "fold_backward(Tensor v_means2d, Tensor v_conics, Tensor radii, Tensor xyz, Tensor w1, Tensor m, Tensor sigma, "
      "Tensor scaling, Tensor rotation, Tensor times, Tensor signs, float pixels_per_unit, int width, int height) -> "
      "(Tensor v_xyz, Tensor v_w1, Tensor v_m, Tensor v_sigma, Tensor v_scaling, Tensor v_rotation, Tensor v_times)");
}

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CPU, m) { register_fold<Cpu>(m); }

}  // namespace medgs
