#include "project.h"

namespace medgs {
namespace {

constexpr int kThreads = 128;

unsigned blocks(int64_t count) { return unsigned(ceil_div(count, int64_t(kThreads))); }

template <class T>
__global__ void __launch_bounds__(kThreads) project_kernel(ProjectionCamera<T> camera, Gaussians3d<const T> gaussians,
                                                           int64_t count, Footprints<T> footprints, int32_t* radii) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n < count) project_gaussian(camera, gaussians, n, footprints, radii);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    project_backward_kernel(ProjectionCamera<T> camera, Gaussians3d<const T> gaussians, int64_t count,
                            const int32_t* radii, Footprints<const T> v_footprints, Gaussians3d<T> v_gaussians) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n < count) project_gaussian_backward(camera, gaussians, n, radii, v_footprints, v_gaussians);
}

}  // namespace

template <class T>
void launch_project(const ProjectionCamera<T>& camera, const Gaussians3d<const T>& gaussians, int64_t count,
                    const Footprints<T>& footprints, int32_t* radii, cudaStream_t stream) {
  if (count == 0) return;  // a launch of no blocks is an error
  project_kernel<T><<<blocks(count), kThreads, 0, stream>>>(camera, gaussians, count, footprints, radii);
}

template <class T>
void launch_project_backward(const ProjectionCamera<T>& camera, const Gaussians3d<const T>& gaussians, int64_t count,
                             const int32_t* radii, const Footprints<const T>& v_footprints,
                             const Gaussians3d<T>& v_gaussians, cudaStream_t stream) {
  if (count == 0) return;
  project_backward_kernel<T>
      <<<blocks(count), kThreads, 0, stream>>>(camera, gaussians, count, radii, v_footprints, v_gaussians);
}

template void launch_project(const ProjectionCamera<float>&, const Gaussians3d<const float>&, int64_t,
                             const Footprints<float>&, int32_t*, cudaStream_t);
template void launch_project(const ProjectionCamera<double>&, const Gaussians3d<const double>&, int64_t,
                             const Footprints<double>&, int32_t*, cudaStream_t);
template void launch_project_backward(const ProjectionCamera<float>&, const Gaussians3d<const float>&, int64_t,
                                      const int32_t*, const Footprints<const float>&, const Gaussians3d<float>&,
                                      cudaStream_t);
template void launch_project_backward(const ProjectionCamera<double>&, const Gaussians3d<const double>&, int64_t,
                                      const int32_t*, const Footprints<const double>&, const Gaussians3d<double>&,
                                      cudaStream_t);

}  // namespace medgs
