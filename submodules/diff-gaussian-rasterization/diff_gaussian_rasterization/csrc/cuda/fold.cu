// `fold` on a GPU: one thread per Gaussian, looping over the views, so that what does not depend on t is done once.
#include "../common/folding.h"
#include "launch.h"
#include "warp.cuh"

namespace medgs {
namespace cuda {
namespace {

using namespace generic;

constexpr int kThreads = 128;

/// The common degrees are compiled in, so that the path stays in registers; -1 takes any up to kMaxDegree.
template <int P>
constexpr int kPathSize = P < 0 ? 2 * kMaxDegree : (P == 0 ? 1 : 2 * P);

template <class S, int P>
struct Loaded {
  FoldedGaussian<S> gaussian;
  S path[kPathSize<P>];
  int degree;

  __device__ Loaded(const FoldArguments<S>& in, int64_t n) : degree(P < 0 ? int(in.degree) : P) {
#pragma unroll
    for (int k = 0; k < (P < 0 ? 2 * degree : 2 * P); ++k) path[k] = in.w1[2 * in.degree * n + k];
    gaussian = activate<S, S>(in.xyz[3 * n], in.xyz[3 * n + 2], in.m[n], in.sigma[n], in.scaling[3 * n],
                              in.scaling[3 * n + 2], in.rotation[n]);
  }
};

template <class S, int P>
__global__ void __launch_bounds__(kThreads) fold_kernel(const FoldArguments<S> in) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= in.gaussians) return;
  const Loaded<S, P> g(in, n);
  const auto path = [&](int j, int axis) { return g.path[2 * j + axis]; };
  const S width = S(in.width), height = S(in.height);
  const S grid_width = S(ceil_div(in.width, int64_t(kVisibilityTile)) * kVisibilityTile);
  const S grid_height = S(ceil_div(in.height, int64_t(kVisibilityTile)) * kVisibilityTile);
  for (int64_t view = 0; view < in.views; ++view) {
    const auto c = cut<S, S>(g.gaussian, path, P < 0 ? g.degree : P, in.times[view], in.signs[view], in.pixels_per_unit,
                             width, height);
    const bool active = (c.time_weight > S(kMinTimeWeight)) & touches_tiles(c, grid_width, grid_height);
    const bool segmented = active & (c.scale_x > S(kMinSegmentationScale)) & (c.scale_z > S(kMinSegmentationScale));
    const int64_t row = view * in.gaussians + n;
    in.means2d[2 * row] = c.u;
    in.means2d[2 * row + 1] = c.v;
    in.conics[3 * row] = c.a;
    in.conics[3 * row + 1] = c.b;
    in.conics[3 * row + 2] = c.c;
    in.radii[row] = active ? int32_t(bounded_radius(c.radius)) : 0;
    in.active[row] = (active ? kActive : 0) | (segmented ? kActiveSegmentation : 0);
  }
}

template <class S, int P>
__global__ void __launch_bounds__(kThreads) fold_backward_kernel(const FoldArguments<S> in) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t warp = n / 32;  // whole warps stay, for the sum over their lanes
  if (warp * 32 >= in.gaussians) return;
  const bool exists = n < in.gaussians;
  const Loaded<S, P> g(in, exists ? n : in.gaussians - 1);
  const auto path = [&](int j, int axis) { return g.path[2 * j + axis]; };
  S v_path[kPathSize<P>];
#pragma unroll
  for (int k = 0; k < (P < 0 ? 2 * g.degree : 2 * P); ++k) v_path[k] = 0;
  const auto path_gradient = [&](int j, int axis, S value) { v_path[2 * j + axis] += value; };
  FoldedGradient<S> v{};
  for (int64_t view = 0; view < in.views; ++view) {
    const int64_t row = view * in.gaussians + n;
    S v_time = 0;
    if (exists && in.forward_radii[row] > 0)
      v_time =
          cut_backward<S, S>(g.gaussian, path, P < 0 ? g.degree : P, in.times[view], in.signs[view], in.pixels_per_unit,
                             in.v_means2d[2 * row], in.v_means2d[2 * row + 1], in.v_conics[3 * row],
                             in.v_conics[3 * row + 1], in.v_conics[3 * row + 2], v, path_gradient);
    v_time = warp_sum(v_time);
    if (threadIdx.x % 32 == 0) in.v_times[warp * in.views + view] = v_time;
  }
  if (!exists) return;
  finish<S, S>(g.gaussian, v);
  in.v_xyz[3 * n] = v.x;
  in.v_xyz[3 * n + 1] = 0;
  in.v_xyz[3 * n + 2] = v.z;
  in.v_scaling[3 * n] = v.scale_x;
  in.v_scaling[3 * n + 1] = 0;
  in.v_scaling[3 * n + 2] = v.scale_z;
  in.v_m[n] = v.m;
  in.v_sigma[n] = v.sigma;
  in.v_rotation[n] = v.rotation;
#pragma unroll
  for (int k = 0; k < (P < 0 ? 2 * g.degree : 2 * P); ++k) in.v_w1[2 * in.degree * n + k] = v_path[k];
}

}  // namespace

template <class S>
cudaError_t launch_fold(const FoldArguments<S>& in, cudaStream_t stream) {
  if (in.gaussians == 0 || in.views == 0) return cudaSuccess;
  const unsigned blocks = unsigned(ceil_div(in.gaussians, int64_t(kThreads)));
  if (in.degree == 7)
    fold_kernel<S, 7><<<blocks, kThreads, 0, stream>>>(in);
  else if (in.degree == 2)
    fold_kernel<S, 2><<<blocks, kThreads, 0, stream>>>(in);
  else
    fold_kernel<S, -1><<<blocks, kThreads, 0, stream>>>(in);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_fold_backward(const FoldArguments<S>& in, cudaStream_t stream) {
  if (in.gaussians == 0) return cudaSuccess;
  const unsigned blocks = unsigned(ceil_div(in.gaussians, int64_t(kThreads)));
  if (in.degree == 7)
    fold_backward_kernel<S, 7><<<blocks, kThreads, 0, stream>>>(in);
  else if (in.degree == 2)
    fold_backward_kernel<S, 2><<<blocks, kThreads, 0, stream>>>(in);
  else
    fold_backward_kernel<S, -1><<<blocks, kThreads, 0, stream>>>(in);
  return cudaGetLastError();
}

template cudaError_t launch_fold(const FoldArguments<float>&, cudaStream_t);
template cudaError_t launch_fold(const FoldArguments<double>&, cudaStream_t);
template cudaError_t launch_fold_backward(const FoldArguments<float>&, cudaStream_t);
template cudaError_t launch_fold_backward(const FoldArguments<double>&, cudaStream_t);

}  // namespace cuda
}  // namespace medgs
