// torch.ops.simple_knn.mean_squared_distances: checks, scratch memory and the Morton order; the kernels are in knn.cu.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "knn.h"

namespace simple_knn {
namespace {

at::Tensor mean_squared_distances(const at::Tensor& points) {  // [N, 3] -> [N]
  TORCH_CHECK_VALUE(points.dim() == 2 && points.size(1) == 3 && points.size(0) > 0,
                    "points must have shape (N, 3) with N > 0, not ", points.sizes());
  const c10::cuda::CUDAGuard guard(points.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t n = points.size(0);
  const auto input = points.contiguous();
  const auto lowest = input.amin(0);
  const auto highest = input.amax(0);
  const auto codes = at::empty({n}, input.options().dtype(at::kLong));
  const auto boxes = at::empty({box_count(n), 6}, input.options());
  const auto means = at::empty({n}, input.options());

  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "mean_squared_distances", [&] {
    launch_morton_codes(input.const_data_ptr<scalar_t>(), lowest.const_data_ptr<scalar_t>(),
                        highest.const_data_ptr<scalar_t>(), n, codes.mutable_data_ptr<int64_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const auto order = codes.argsort();
    const auto sorted = input.index_select(0, order);
    launch_bounding_boxes(sorted.const_data_ptr<scalar_t>(), n, boxes.mutable_data_ptr<scalar_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    launch_mean_squared_distances(sorted.const_data_ptr<scalar_t>(), order.const_data_ptr<int64_t>(),
                                  boxes.const_data_ptr<scalar_t>(), n, means.mutable_data_ptr<scalar_t>(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return means;
}

/// See self_test in diff_gaussian_rasterization.
int64_t self_test(int64_t number) {
  TORCH_CHECK_VALUE(number >= 0, "self_test: must not be negative, got ", number);
  return number;
}

}  // namespace

TORCH_LIBRARY(simple_knn, m) {
  m.def("mean_squared_distances(Tensor points) -> Tensor");
  m.def("self_test(int number) -> int", &self_test);
}

TORCH_LIBRARY_IMPL(simple_knn, CUDA, m) { m.impl("mean_squared_distances", &mean_squared_distances); }

}  // namespace simple_knn
