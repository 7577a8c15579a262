// Checks of single arguments, in one style for all operators (torch only; kernels never see this file).
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
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

inline void check_ints(const Tensor& tensor, const char* name, IntArrayRef shape, const Tensor& like) {
  check_shape(tensor, name, shape, like);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt, name, " must be int32, got ", tensor.scalar_type());
}

inline void check_real(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, name,
                   " must be float32 or float64, got ", tensor.scalar_type());
}

inline void check_image(int64_t width, int64_t height) {
  TORCH_CHECK_VALUE(width >= 1 && height >= 1 && width <= 32768 && height <= 32768,
                    "width and height must be 1 ... 32768 pixels, got ", width, " x ", height);
}

}  // namespace medgs
