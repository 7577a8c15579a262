// The CPU kernels, and the table of them for the instruction set of this machine.
#pragma once

#include "../common/arguments.h"

namespace medgs {

/// Side of the tile that one vectorised loop blends: 16 pixels, in registers for the whole list. A list may be for
/// several of them, where splats are large.
constexpr int kTile = 4;

/// Threads for a loop over that many cheap items: waking others costs more than a few thousand of them.
inline int threads_for(int64_t items, int threads) { return items < 8192 ? 1 : threads; }

constexpr int64_t kFoldChunk = 1024;  // Gaussians behind one partial sum of dL/dt: fixed, so that its rounding is too
constexpr int kBand = 32;             // rows of a plane that one thread compares at once

template <class S>
struct Kernels {
  const char* name;
  void (*fold)(const FoldArguments<S>&, int threads);
  void (*fold_backward)(const FoldArguments<S>&, int threads);
  void (*bound)(const BoundsArguments<S>&, int64_t begin, int64_t end);
  void (*blend)(const BlendArguments<S>&, int threads);
  void (*blend_backward)(const BlendArguments<S>&, int threads);
  void (*sum_records)(const BlendArguments<S>&, int64_t heads, int threads);
  void (*activate)(const S* raw, int64_t count, S* opacities);     // sigmoid
  bool (*similarity)(const SimilarityArguments<S>&, int threads);  // false: no memory for it
  void (*adam)(const AdamTensor<S>&, const AdamConstants<S>&, int threads);
  void (*sigma_outside)(const SigmaArguments<S>&, int threads);
};

/// The fastest kernels that this processor runs; the environment variable MEDGS_CPU_KERNELS names another set
/// (portable, avx2, avx512), for tests and measurements.
template <class S>
const Kernels<S>& kernels();

namespace generic {
extern const Kernels<float> kernels_float;
extern const Kernels<double> kernels_double;
}  // namespace generic
namespace avx2 {
extern const Kernels<float> kernels_float;
extern const Kernels<double> kernels_double;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> kernels_float;
extern const Kernels<double> kernels_double;
}  // namespace avx512

}  // namespace medgs
