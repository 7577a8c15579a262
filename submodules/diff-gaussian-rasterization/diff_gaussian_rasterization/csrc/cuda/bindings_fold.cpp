// `fold` for CUDA tensors: checks, allocates, launches.
#include "bindings.h"

namespace medgs {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> fold_cuda(const Tensor& xyz, const Tensor& w1, const Tensor& m,
                                                     const Tensor& sigma, const Tensor& scaling, const Tensor& rotation,
                                                     const Tensor& times, const Tensor& signs, double pixels_per_unit,
                                                     int64_t width, int64_t height) {
  check_fold(xyz, w1, m, sigma, scaling, rotation, times, signs, width, height);
  const c10::cuda::CUDAGuard guard(xyz.device());
  const int64_t v = times.size(0), n = xyz.size(0);
  auto means2d = at::empty({v, n, 2}, xyz.options());
  auto conics = at::empty({v, n, 3}, xyz.options());
  auto radii = at::empty({v, n}, xyz.options().dtype(at::kInt));
  auto active = at::empty({v, n}, xyz.options().dtype(at::kByte));
  const Tensor p[] = {xyz.contiguous(),     w1.contiguous(),       m.contiguous(),     sigma.contiguous(),
                      scaling.contiguous(), rotation.contiguous(), times.contiguous(), signs.contiguous()};
  AT_DISPATCH_FLOATING_TYPES(xyz.scalar_type(), "fold", [&] {
    auto in = fold_arguments<scalar_t>(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], pixels_per_unit, width, height);
    in.means2d = means2d.mutable_data_ptr<scalar_t>();
    in.conics = conics.mutable_data_ptr<scalar_t>();
    in.radii = radii.mutable_data_ptr<int32_t>();
    in.active = active.mutable_data_ptr<uint8_t>();
    C10_CUDA_CHECK(cuda::launch_fold(in, at::cuda::getCurrentCUDAStream()));
  });
  return {means2d, conics, radii, active};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fold_backward_cuda(
    const Tensor& v_means2d, const Tensor& v_conics, const Tensor& radii, const Tensor& xyz, const Tensor& w1,
    const Tensor& m, const Tensor& sigma, const Tensor& scaling, const Tensor& rotation, const Tensor& times,
    const Tensor& signs, double pixels_per_unit, int64_t width, int64_t height) {
  check_fold(xyz, w1, m, sigma, scaling, rotation, times, signs, width, height);
  const c10::cuda::CUDAGuard guard(xyz.device());
  const int64_t v = times.size(0), n = xyz.size(0);
  check_float(v_means2d, "v_means2d", {v, n, 2}, xyz);
  check_float(v_conics, "v_conics", {v, n, 3}, xyz);
  check_shape(radii, "radii", {v, n}, xyz);
  const Tensor p[] = {xyz.contiguous(),     w1.contiguous(),       m.contiguous(),     sigma.contiguous(),
                      scaling.contiguous(), rotation.contiguous(), times.contiguous(), signs.contiguous()};
  const auto means_gradient = v_means2d.contiguous(), conics_gradient = v_conics.contiguous(), r = radii.contiguous();
  Tensor out[6];
  for (int i = 0; i < 6; ++i) out[i] = at::empty_like(p[i]);
  auto v_times = at::empty({(n + cuda::kFoldChunk - 1) / cuda::kFoldChunk, v}, xyz.options());
  AT_DISPATCH_FLOATING_TYPES(xyz.scalar_type(), "fold_backward", [&] {
    auto in = fold_arguments<scalar_t>(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], pixels_per_unit, width, height);
    in.forward_radii = r.const_data_ptr<int32_t>();
    in.v_means2d = means_gradient.const_data_ptr<scalar_t>();
    in.v_conics = conics_gradient.const_data_ptr<scalar_t>();
    in.v_xyz = out[0].mutable_data_ptr<scalar_t>();
    in.v_w1 = out[1].mutable_data_ptr<scalar_t>();
    in.v_m = out[2].mutable_data_ptr<scalar_t>();
    in.v_sigma = out[3].mutable_data_ptr<scalar_t>();
    in.v_scaling = out[4].mutable_data_ptr<scalar_t>();
    in.v_rotation = out[5].mutable_data_ptr<scalar_t>();
    in.v_times = v_times.mutable_data_ptr<scalar_t>();
    C10_CUDA_CHECK(cuda::launch_fold_backward(in, at::cuda::getCurrentCUDAStream()));
  });
  return {out[0], out[1], out[2], out[3], out[4], out[5], v_times.sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CUDA, m) {
  m.impl("fold", &fold_cuda);
  m.impl("fold_backward", &fold_backward_cuda);
}

}  // namespace medgs
