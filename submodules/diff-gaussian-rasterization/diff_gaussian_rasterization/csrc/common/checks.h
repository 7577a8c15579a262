// Arguments of the operators, checked once for the CPU and the CUDA side (torch only; kernels never see this file).
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "arguments.h"
#include "constants.h"

namespace medgs {

using at::IntArrayRef;
using at::Tensor;

/// One line that names the argument, what was wanted and what came.
inline void check_shape(const Tensor& tensor, const char* name, IntArrayRef shape, const Tensor& like) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on ", like.device(), ", got ", tensor.device());
}

inline void check_float(const Tensor& tensor, const char* name, IntArrayRef shape, const Tensor& like) {
  check_shape(tensor, name, shape, like);
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(), ", got ",
                   tensor.scalar_type());
}

inline void check_real(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
                   " must be float32 or float64, got ", tensor.scalar_type());
}

inline void check_image(int64_t width, int64_t height) {
  TORCH_CHECK_VALUE(width >= 1 && height >= 1 && width <= 32768 && height <= 32768,
                    "width and height must be 1 ... 32768 pixels, got ", width, " x ", height);
}

[[gnu::noinline]] inline void check_fold(const Tensor& xyz, const Tensor& w1, const Tensor& m, const Tensor& sigma,
                                         const Tensor& scaling, const Tensor& rotation, const Tensor& times,
                                         const Tensor& signs, int64_t width, int64_t height) {
  check_real(xyz, "xyz");
  TORCH_CHECK_VALUE(xyz.dim() == 2, "xyz must have shape (N, 3), got ", xyz.sizes());
  const int64_t n = xyz.size(0);
  TORCH_CHECK_VALUE(n < (int64_t(1) << 31), "at most 2^31 Gaussians, got ", n);
  TORCH_CHECK_VALUE(w1.dim() == 2 && w1.size(1) % 2 == 0, "w1 must have shape (N, 2 P), got ", w1.sizes());
  TORCH_CHECK_VALUE(w1.size(1) <= 2 * generic::kMaxDegree, "the polynomial degree may be at most ", generic::kMaxDegree,
                    ", got ", w1.size(1) / 2);
  TORCH_CHECK_VALUE(times.dim() == 1, "times must have shape (V,), got ", times.sizes());
  check_float(xyz, "xyz", {n, 3}, xyz);
  check_float(w1, "w1", {n, w1.size(1)}, xyz);
  check_float(m, "m", {n}, xyz);
  check_float(sigma, "sigma", {n}, xyz);
  check_float(scaling, "scaling", {n, 3}, xyz);
  check_float(rotation, "rotation", {n}, xyz);
  check_float(times, "times", {times.size(0)}, xyz);
  check_float(signs, "signs", {times.size(0)}, xyz);
  check_image(width, height);
}

[[gnu::noinline]] inline void check_blend(const Tensor& means2d, const Tensor& conics, const Tensor& active,
                                          const Tensor& opacities, const Tensor& colours, const Tensor& backgrounds,
                                          const std::optional<Tensor>& screen, IntArrayRef views, IntArrayRef heads,
                                          IntArrayRef bits, int64_t width, int64_t height, int64_t capacity) {
  check_real(means2d, "means2d");
  TORCH_CHECK_VALUE(means2d.dim() == 3, "means2d must have shape (V, N, 2), got ", means2d.sizes());
  TORCH_CHECK_VALUE(colours.dim() == 3, "colours must have shape (heads, N, C), got ", colours.sizes());
  const int64_t v = means2d.size(0), n = means2d.size(1), h = colours.size(0), c = colours.size(2);
  const int64_t r = int64_t(views.size());
  TORCH_CHECK_VALUE(v * n < (int64_t(1) << 31), "views times Gaussians must stay under 2^31, got ", v, " x ", n);
  TORCH_CHECK_VALUE(c >= 1 && c <= 4, "colours must have 1 to 4 channels, got ", c);
  check_float(means2d, "means2d", {v, n, 2}, means2d);
  check_float(conics, "conics", {v, n, 3}, means2d);
  check_shape(active, "active", {v, n}, means2d);
  TORCH_CHECK_TYPE(active.scalar_type() == at::kByte, "active must be uint8, got ", active.scalar_type());
  check_float(opacities, "opacities", {h, n}, means2d);
  check_float(colours, "colours", {h, n, c}, means2d);
  check_float(backgrounds, "backgrounds", {r, c}, means2d);
  if (screen) check_float(*screen, "screen", {h, v, n, 2}, means2d);
  TORCH_CHECK_VALUE(heads.size() == views.size() && bits.size() == views.size(),
                    "views, heads and bits must be equally long, got ", views.size(), ", ", heads.size(), ", ",
                    bits.size());
  for (int64_t i = 0; i < r; ++i) {
    TORCH_CHECK_VALUE(views[i] >= 0 && views[i] < v, "views[", i, "] = ", views[i], " is not one of the ", v, " views");
    TORCH_CHECK_VALUE(heads[i] >= 0 && heads[i] < h, "heads[", i, "] = ", heads[i], " is not one of the ", h, " heads");
    TORCH_CHECK_VALUE(bits[i] >= 1 && bits[i] <= 255, "bits[", i, "] = ", bits[i], " must be 1 ... 255");
  }
  TORCH_CHECK_VALUE(r <= kMaxRenders && v <= kMaxRenders, "at most ", kMaxRenders,
                    " views and renders in one call, got ", v, " and ", r);
  TORCH_CHECK_VALUE(capacity >= 0 && capacity < (int64_t(1) << 31), "capacity must be 0 ... 2^31 - 1, got ", capacity);
  check_image(width, height);
}

/// Activations of raw appearance: opacity = sigmoid(raw), colour = max(0, C0 raw + 0.5).
constexpr double kHarmonic0 = 0.28209479177387814;

inline Tensor active_opacities(const Tensor& opacities, bool raw) {
  return raw ? at::sigmoid(opacities).contiguous() : opacities.contiguous();
}

inline Tensor active_colours(const Tensor& colours, bool raw) {
  return raw ? colours.mul(kHarmonic0).add_(0.5).clamp_min_(0).contiguous() : colours.contiguous();
}

/// Gradients by active appearance, in place to those by raw appearance.
inline void to_raw(const Tensor& opacities, const Tensor& colours, Tensor& v_opacities, Tensor& v_colours) {
  v_opacities = at::sigmoid_backward(v_opacities, opacities);
  v_colours = at::threshold_backward(v_colours, colours, 0).mul_(kHarmonic0);
}

/// Bits that some render of each view asks for: a pair that no render would draw is not made.
inline std::vector<int64_t> bits_of_views(int64_t view_count, IntArrayRef views, IntArrayRef bits) {
  std::vector<int64_t> out(view_count, 0);
  for (size_t r = 0; r < views.size(); ++r) out[views[r]] |= bits[r];
  return out;
}

/// A render whose bit is all that its view was binned for need not look at the masks again.
inline std::unique_ptr<bool[]> renders_to_check(const std::vector<int64_t>& view_bits, IntArrayRef views,
                                                IntArrayRef bits) {
  std::unique_ptr<bool[]> check(new bool[views.size()]);
  for (size_t r = 0; r < views.size(); ++r) check[r] = view_bits[views[r]] != bits[r];
  return check;
}

/// The k-th render of a view uses layer k of what is kept for each pair: how many layers there are, at least one.
inline int64_t layers_of(IntArrayRef views) {
  int64_t layers = 1;
  for (const int64_t view : views) layers = std::max<int64_t>(layers, std::count(views.begin(), views.end(), view));
  return layers;
}

/// The arguments that the forward and the backward pass share; all tensors contiguous.
template <class S>
BlendArguments<S> blend_arguments(const Tensor& means2d, const Tensor& conics, const Tensor& active,
                                  const Tensor& opacities, const Tensor& colours, const Tensor& tile_offsets,
                                  const Tensor& pair_gaussians, const Tensor& pair_slots, IntArrayRef views,
                                  IntArrayRef heads, IntArrayRef bits, const bool* check_bits, int64_t width,
                                  int64_t height, int tile) {
  BlendArguments<S> in{};
  in.gaussians = means2d.size(1);
  in.view_count = means2d.size(0);
  in.renders = int64_t(views.size());
  in.channels = colours.size(2);
  in.width = width;
  in.height = height;
  in.tiles_x = (width + tile - 1) / tile;
  in.tiles_y = (height + tile - 1) / tile;
  in.views = views.data();
  in.heads = heads.data();
  in.bits = bits.data();
  in.check_bits = check_bits;
  in.means2d = means2d.const_data_ptr<S>();
  in.conics = conics.const_data_ptr<S>();
  in.active = active.const_data_ptr<uint8_t>();
  in.opacities = opacities.const_data_ptr<S>();
  in.colours = colours.const_data_ptr<S>();
  in.tile_offsets = tile_offsets.const_data_ptr<int32_t>();
  in.pair_gaussians = pair_gaussians.const_data_ptr<int32_t>();
  in.pair_slots = pair_slots.const_data_ptr<int32_t>();
  return in;
}

/// And those of `fold`.
template <class S>
FoldArguments<S> fold_arguments(const Tensor& xyz, const Tensor& w1, const Tensor& m, const Tensor& sigma,
                                const Tensor& scaling, const Tensor& rotation, const Tensor& times, const Tensor& signs,
                                double pixels_per_unit, int64_t width, int64_t height) {
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

}  // namespace medgs
