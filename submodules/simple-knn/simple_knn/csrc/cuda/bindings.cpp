// torch.ops.simple_knn.mean_squared_distances: checks, scratch memory and the Morton order; the kernels are in knn.cu.
// Of torch only its stable ABI, so that one library serves every version from 2.10 on.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "knn.h"

namespace simple_knn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

/// torch's stream on the current device. Only a torch with CUDA has the function, so it is looked up in what is loaded.
cudaStream_t current_stream() {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  const auto ask =
      reinterpret_cast<CurrentStream>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  void* stream = nullptr;
  if (!ask || ask(torch::stable::accelerator::getCurrentDeviceIndex(), &stream))
    throw std::runtime_error("torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // else the next launch would report it once more
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

template <size_t N>
Tensor call(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

template <typename scalar_t>
void find(const Tensor& input, const Tensor& means) {
  const auto stream = current_stream();
  const int64_t n = input.size(0);
  const std::vector<int64_t> rows{0};
  const auto lowest = call<3>("aten::amin", "", {from(input), from(rows), from(false)});
  const auto highest = call<3>("aten::amax", "", {from(input), from(rows), from(false)});
  const auto codes = torch::stable::new_empty(input, {n}, ScalarType::Long);
  const auto boxes = torch::stable::new_empty(input, {box_count(n), 6});
  const auto data = [](const Tensor& tensor) { return static_cast<const scalar_t*>(tensor.const_data_ptr()); };
  launch_morton_codes(data(input), data(lowest), data(highest), n, static_cast<int64_t*>(codes.mutable_data_ptr()),
                      stream);
  check(cudaGetLastError());
  const auto order = call<3>("aten::argsort", "", {from(codes), from(int64_t(0)), from(false)});
  const auto sorted = call<3>("aten::index_select", "", {from(input), from(int64_t(0)), from(order)});
  launch_bounding_boxes(data(sorted), n, static_cast<scalar_t*>(boxes.mutable_data_ptr()), stream);
  check(cudaGetLastError());
  launch_mean_squared_distances(data(sorted), static_cast<const int64_t*>(order.const_data_ptr()), data(boxes), n,
                                static_cast<scalar_t*>(means.mutable_data_ptr()), stream);
  check(cudaGetLastError());
}

Tensor mean_squared_distances(const Tensor& points) {  // [N, 3] -> [N]
  if (points.dim() != 2 || points.size(1) != 3 || points.size(0) == 0)
    throw std::invalid_argument("points must have shape (N, 3) with N > 0");
  const auto type = points.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double)
    throw std::invalid_argument("points must be float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  check(cudaSetDevice(points.get_device_index()));  // of this library's own runtime
  const auto input = torch::stable::contiguous(points);
  const auto means = torch::stable::new_empty(input, {input.size(0)});
  if (type == ScalarType::Double)
    find<double>(input, means);
  else
    find<float>(input, means);
  return means;
}

/// See self_test in diff_gaussian_rasterization.
int64_t self_test(int64_t number) {
  if (number < 0) throw std::invalid_argument("self_test: must not be negative, got " + std::to_string(number));
  return number;
}

}  // namespace

STABLE_TORCH_LIBRARY(simple_knn, m) {
  m.def("mean_squared_distances(Tensor points) -> Tensor");
  m.def("self_test(int number) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(simple_knn, CUDA, m) { m.impl("mean_squared_distances", TORCH_BOX(&mean_squared_distances)); }

STABLE_TORCH_LIBRARY_IMPL(simple_knn, CompositeImplicitAutograd, m) { m.impl("self_test", TORCH_BOX(&self_test)); }

}  // namespace simple_knn
