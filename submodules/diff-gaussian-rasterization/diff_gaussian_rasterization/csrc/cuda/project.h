// One thread a Gaussian; pointers are device memory, shapes as in common/projection.h. Scalar is float or double.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/projection.h"

namespace medgs {
using namespace MEDGS_ISA;

template <class T>
void launch_project(const ProjectionCamera<T>& camera, const Gaussians3d<const T>& gaussians, int64_t count,
                    const Footprints<T>& footprints, int32_t* radii /* [N] */, cudaStream_t stream);

/// `v_gaussians` starts as zeros.
template <class T>
void launch_project_backward(const ProjectionCamera<T>& camera, const Gaussians3d<const T>& gaussians, int64_t count,
                             const int32_t* radii /* [N] */, const Footprints<const T>& v_footprints,
                             const Gaussians3d<T>& v_gaussians, cudaStream_t stream);

}  // namespace medgs
