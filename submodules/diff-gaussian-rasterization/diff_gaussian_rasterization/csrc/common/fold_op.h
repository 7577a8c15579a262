// The operator `fold` on tensors, the same on every device but for the kernels. `Device` is what runs them:
// `fold(arguments)`, `fold_backward(arguments)`, and `kFoldChunk`, the number of Gaussians behind one partial sum of
// dL/dt.
#pragma once

#include "checks.h"

namespace medgs {

using FoldOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // as the schema in cpu/fold.cpp
using FoldGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// What both directions take, checked and contiguous.
struct FoldInputs {
  Tensor xyz, w1, m, sigma, scaling, rotation, times, signs;
  double pixels_per_unit;
  int64_t width, height;

  FoldInputs(const Tensor& xyz_, const Tensor& w1_, const Tensor& m_, const Tensor& sigma_, const Tensor& scaling_,
             const Tensor& rotation_, const Tensor& times_, const Tensor& signs_, double pixels_per_unit_,
             int64_t width_, int64_t height_)
      : pixels_per_unit(pixels_per_unit_), width(width_), height(height_) {
    check_real(xyz_, "xyz");
    TORCH_CHECK_VALUE(xyz_.dim() == 2, "xyz must have shape (N, 3), got ", xyz_.sizes());
    const int64_t n = xyz_.size(0);
    TORCH_CHECK_VALUE(n < (int64_t(1) << 31), "at most 2^31 Gaussians, got ", n);
    TORCH_CHECK_VALUE(w1_.dim() == 2 && w1_.size(1) % 2 == 0, "w1 must have shape (N, 2 P), got ", w1_.sizes());
    TORCH_CHECK_VALUE(w1_.size(1) <= 2 * generic::kMaxDegree, "the polynomial degree may be at most ",
                      generic::kMaxDegree, ", got ", w1_.size(1) / 2);
    TORCH_CHECK_VALUE(times_.dim() == 1, "times must have shape (V,), got ", times_.sizes());
    const auto checked = [&](const Tensor& tensor, const char* name, IntArrayRef shape) {
      check_float(tensor, name, shape, xyz_);
      return tensor.contiguous();
    };
    xyz = checked(xyz_, "xyz", {n, 3});
    w1 = checked(w1_, "w1", {n, w1_.size(1)});
    m = checked(m_, "m", {n});
    sigma = checked(sigma_, "sigma", {n});
    scaling = checked(scaling_, "scaling", {n, 3});
    rotation = checked(rotation_, "rotation", {n});
    times = checked(times_, "times", {times_.size(0)});
    signs = checked(signs_, "signs", {times_.size(0)});
    check_image(width, height);
  }

  template <class S>
  FoldArguments<S> arguments() const {
    FoldArguments<S> in{};
    in.gaussians = xyz.size(0);
    in.views = times.size(0);
    in.degree = w1.size(1) / 2;
    in.xyz = xyz.const_data_ptr<S>();
    in.w1 = w1.const_data_ptr<S>();
    in.m = m.const_data_ptr<S>();
    in.sigma = sigma.const_data_ptr<S>();
    in.scaling = scaling.const_data_ptr<S>();
    in.rotation = rotation.const_data_ptr<S>();
    in.times = times.const_data_ptr<S>();
    in.signs = signs.const_data_ptr<S>();
    in.pixels_per_unit = S(pixels_per_unit);
    in.width = width;
    in.height = height;
    return in;
  }
};

template <class Device>
FoldOutputs fold_op(const Tensor& xyz, const Tensor& w1, const Tensor& m, const Tensor& sigma, const Tensor& scaling,
                    const Tensor& rotation, const Tensor& times, const Tensor& signs, double pixels_per_unit,
                    int64_t width, int64_t height) {
  const typename Device::Guard guard(xyz.device());
  const FoldInputs inputs(xyz, w1, m, sigma, scaling, rotation, times, signs, pixels_per_unit, width, height);
  const int64_t v = times.size(0), n = xyz.size(0);
  const Tensor means2d = at::empty({v, n, 2}, xyz.options()), conics = at::empty({v, n, 3}, xyz.options());
  const Tensor radii = at::empty({v, n}, xyz.options().dtype(at::kInt));
  const Tensor active = at::empty({v, n}, xyz.options().dtype(at::kByte));
  AT_DISPATCH_FLOATING_TYPES(xyz.scalar_type(), "fold", [&] {
    auto in = inputs.arguments<scalar_t>();
    in.means2d = means2d.mutable_data_ptr<scalar_t>();
    in.conics = conics.mutable_data_ptr<scalar_t>();
    in.radii = radii.mutable_data_ptr<int32_t>();
    in.active = active.mutable_data_ptr<uint8_t>();
    Device::fold(in);
  });
  return {means2d, conics, radii, active};
}

template <class Device>
FoldGradients fold_backward_op(const Tensor& v_means2d, const Tensor& v_conics, const Tensor& radii, const Tensor& xyz,
                               const Tensor& w1, const Tensor& m, const Tensor& sigma, const Tensor& scaling,
                               const Tensor& rotation, const Tensor& times, const Tensor& signs, double pixels_per_unit,
                               int64_t width, int64_t height) {
  const typename Device::Guard guard(xyz.device());
  const FoldInputs inputs(xyz, w1, m, sigma, scaling, rotation, times, signs, pixels_per_unit, width, height);
  const int64_t v = times.size(0), n = xyz.size(0);
  check_float(v_means2d, "v_means2d", {v, n, 2}, xyz);
  check_float(v_conics, "v_conics", {v, n, 3}, xyz);
  check_ints(radii, "radii", {v, n}, xyz);
  const Tensor g_means2d = v_means2d.contiguous(), g_conics = v_conics.contiguous(), r = radii.contiguous();
  const Tensor v_xyz = at::empty_like(inputs.xyz), v_w1 = at::empty_like(inputs.w1), v_m = at::empty_like(inputs.m);
  const Tensor v_sigma = at::empty_like(inputs.sigma), v_scaling = at::empty_like(inputs.scaling);
  const Tensor v_rotation = at::empty_like(inputs.rotation);
  const Tensor v_times = at::empty({generic::ceil_div(n, int64_t(Device::kFoldChunk)), v}, xyz.options());
  AT_DISPATCH_FLOATING_TYPES(xyz.scalar_type(), "fold_backward", [&] {
    auto in = inputs.arguments<scalar_t>();
    in.forward_radii = r.const_data_ptr<int32_t>();
    in.v_means2d = g_means2d.const_data_ptr<scalar_t>();
    in.v_conics = g_conics.const_data_ptr<scalar_t>();
    in.v_xyz = v_xyz.mutable_data_ptr<scalar_t>();
    in.v_w1 = v_w1.mutable_data_ptr<scalar_t>();
    in.v_m = v_m.mutable_data_ptr<scalar_t>();
    in.v_sigma = v_sigma.mutable_data_ptr<scalar_t>();
    in.v_scaling = v_scaling.mutable_data_ptr<scalar_t>();
    in.v_rotation = v_rotation.mutable_data_ptr<scalar_t>();
    in.v_times = v_times.mutable_data_ptr<scalar_t>();
    Device::fold_backward(in);
  });
  return {v_xyz, v_w1, v_m, v_sigma, v_scaling, v_rotation, v_times.sum(0)};
}

/// Registers both directions for a device.
template <class Device>
void register_fold(torch::Library& m) {
  m.impl("fold", &fold_op<Device>);
  m.impl("fold_backward", &fold_backward_op<Device>);
}

}  // namespace medgs
