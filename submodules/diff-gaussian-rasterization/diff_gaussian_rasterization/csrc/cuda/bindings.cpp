// torch's stream. Only a torch with CUDA has the function that knows it, and this library serves any torch: it is
// looked up in what torch has loaded.
#include "bindings.h"

#include <dlfcn.h>

namespace medgs {

cudaStream_t current_stream() {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const auto ask = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  MEDGS_CHECK(ask != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  MEDGS_CHECK(!ask(torch::stable::accelerator::getCurrentDeviceIndex(), &stream), "torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace medgs
