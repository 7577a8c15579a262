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
    MEDGS_CHECK_VALUE(xyz_.dim() == 2, "xyz must have shape (N, 3), got ", shape_of(xyz_));
    const int64_t n = xyz_.size(0);
    MEDGS_CHECK_VALUE(n < (int64_t(1) << 31), "at most 2^31 Gaussians, got ", n);
    MEDGS_CHECK_VALUE(w1_.dim() == 2 && w1_.size(1) % 2 == 0, "w1 must have shape (N, 2 P), got ", shape_of(w1_));
    MEDGS_CHECK_VALUE(w1_.size(1) <= 2 * generic::kMaxDegree, "the polynomial degree may be at most ",
                      generic::kMaxDegree, ", got ", w1_.size(1) / 2);
    MEDGS_CHECK_VALUE(times_.dim() == 1, "times must have shape (V,), got ", shape_of(times_));
    const auto checked = [&](const Tensor& tensor, const char* name, const Shape& shape) {
      check_float(tensor, name, shape, xyz_);
      return packed(tensor);
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
    in.xyz = data<S>(xyz);
    in.w1 = data<S>(w1);
    in.m = data<S>(m);
    in.sigma = data<S>(sigma);
    in.scaling = data<S>(scaling);
    in.rotation = data<S>(rotation);
    in.times = data<S>(times);
    in.signs = data<S>(signs);
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
  const typename Device::Guard guard(xyz);
  const FoldInputs inputs(xyz, w1, m, sigma, scaling, rotation, times, signs, pixels_per_unit, width, height);
  const int64_t v = times.size(0), n = xyz.size(0);
  const Tensor means2d = empty({v, n, 2}, xyz), conics = empty({v, n, 3}, xyz);
  const Tensor radii = empty({v, n}, xyz, ScalarType::Int);
  const Tensor active = empty({v, n}, xyz, ScalarType::Byte);
  with_scalar(xyz, [&](auto zero) {
    using S = decltype(zero);
    auto in = inputs.arguments<S>();
    in.means2d = writable<S>(means2d);
    in.conics = writable<S>(conics);
    in.radii = writable<int32_t>(radii);
    in.active = writable<uint8_t>(active);
    Device::fold(in);
  });
  return {means2d, conics, radii, active};
}

template <class Device>
FoldGradients fold_backward_op(const Tensor& v_means2d, const Tensor& v_conics, const Tensor& radii, const Tensor& xyz,
                               const Tensor& w1, const Tensor& m, const Tensor& sigma, const Tensor& scaling,
                               const Tensor& rotation, const Tensor& times, const Tensor& signs, double pixels_per_unit,
                               int64_t width, int64_t height) {
  const typename Device::Guard guard(xyz);
  const FoldInputs inputs(xyz, w1, m, sigma, scaling, rotation, times, signs, pixels_per_unit, width, height);
  const int64_t v = times.size(0), n = xyz.size(0);
  check_float(v_means2d, "v_means2d", {v, n, 2}, xyz);
  check_float(v_conics, "v_conics", {v, n, 3}, xyz);
  check_ints(radii, "radii", {v, n}, xyz);
  const Tensor g_means2d = packed(v_means2d), g_conics = packed(v_conics), r = packed(radii);
  const Tensor v_xyz = new_like(inputs.xyz), v_w1 = new_like(inputs.w1), v_m = new_like(inputs.m);
  const Tensor v_sigma = new_like(inputs.sigma), v_scaling = new_like(inputs.scaling);
  const Tensor v_rotation = new_like(inputs.rotation);
  const Tensor v_times = empty({generic::ceil_div(n, int64_t(Device::kFoldChunk)), v}, xyz);
  with_scalar(xyz, [&](auto zero) {
    using S = decltype(zero);
    auto in = inputs.arguments<S>();
    in.forward_radii = data<int32_t>(r);
    in.v_means2d = data<S>(g_means2d);
    in.v_conics = data<S>(g_conics);
    in.v_xyz = writable<S>(v_xyz);
    in.v_w1 = writable<S>(v_w1);
    in.v_m = writable<S>(v_m);
    in.v_sigma = writable<S>(v_sigma);
    in.v_scaling = writable<S>(v_scaling);
    in.v_rotation = writable<S>(v_rotation);
    in.v_times = writable<S>(v_times);
    Device::fold_backward(in);
  });
  return {v_xyz, v_w1, v_m, v_sigma, v_scaling, v_rotation, sum_rows(v_times)};
}

/// Registers both directions for a device.
template <class Device>
void register_fold(torch::stable::detail::StableLibrary& m) {
  m.impl("fold", TORCH_BOX(&fold_op<Device>));
  m.impl("fold_backward", TORCH_BOX(&fold_backward_op<Device>));
}

}  // namespace medgs
