// What the torch side of every CUDA operator needs: the current stream, the device guard, and checked launches.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/checks.h"
#include "launch.h"

namespace medgs {

/// Makes the device of a tensor the current one: to torch, and to the CUDA runtime of this library, which is its own.
struct CudaGuard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit CudaGuard(const Tensor& tensor) : guard(device_of(tensor).index) {
    const cudaError_t error = cudaSetDevice(device_of(tensor).index);
    MEDGS_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
  }
};

/// torch's stream on the current device.
cudaStream_t current_stream();

}  // namespace medgs

#define MEDGS_CUDA_CHECK(call)                                                    \
  do {                                                                            \
    const cudaError_t error = (call);                                             \
    MEDGS_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error)); \
  } while (0)
