// What the torch side of every CUDA operator needs: the current stream, the device guard, and checked launches.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/checks.h"
#include "launch.h"

namespace medgs {

/// An error is taken off the runtime, too: else the next launch would report it once more.
inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();
  MEDGS_CHECK(false, "CUDA error: ", cudaGetErrorString(error));
}

/// The GPU that a tensor lies on.
inline int32_t gpu_of(const Tensor& tensor) {
  const Device device = device_of(tensor);
  MEDGS_CHECK_VALUE(device.type == aoti_torch_device_type_cuda(), "all tensors must be on one device, got one on ",
                    device, " beside others on a GPU");
  return device.index;
}

/// Makes the device of a tensor the current one: to torch, and to the CUDA runtime of this library, which is its own.
struct CudaGuard {
  torch::stable::accelerator::DeviceGuard guard;
  explicit CudaGuard(const Tensor& tensor) : guard(gpu_of(tensor)) { check_cuda(cudaSetDevice(gpu_of(tensor))); }
};

/// torch's stream on the current device.
cudaStream_t current_stream();

}  // namespace medgs

#define MEDGS_CUDA_CHECK(call) ::medgs::check_cuda(call)
