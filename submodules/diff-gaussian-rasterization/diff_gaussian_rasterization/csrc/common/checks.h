// Checks of single arguments, in one style for all operators (torch only; kernels never see this file).
#pragma once

#include <algorithm>
#include <memory>

#include "arguments.h"
#include "constants.h"
#include "tensors.h"

namespace medgs {

/// One line that names the argument, what was wanted and what came.
inline void check_shape(const Tensor& tensor, const char* name, const Shape& shape, const Tensor& like) {
  MEDGS_CHECK_VALUE(shape_of(tensor) == shape, name, " must have shape ", shape, ", got ", shape_of(tensor));
  MEDGS_CHECK_VALUE(device_of(tensor) == device_of(like), name, " must be on ", device_of(like), ", got ",
                    device_of(tensor));
}

inline void check_float(const Tensor& tensor, const char* name, const Shape& shape, const Tensor& like) {
  check_shape(tensor, name, shape, like);
  MEDGS_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(), ", got ",
                   tensor.scalar_type());
}

inline void check_ints(const Tensor& tensor, const char* name, const Shape& shape, const Tensor& like) {
  check_shape(tensor, name, shape, like);
  MEDGS_CHECK_TYPE(tensor.scalar_type() == ScalarType::Int, name, " must be int32, got ", tensor.scalar_type());
}

inline void check_bytes(const Tensor& tensor, const char* name, const Shape& shape, const Tensor& like) {
  check_shape(tensor, name, shape, like);
  MEDGS_CHECK_TYPE(tensor.scalar_type() == ScalarType::Byte, name, " must be uint8, got ", tensor.scalar_type());
}

inline void check_real(const Tensor& tensor, const char* name) {
  MEDGS_CHECK_TYPE(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double, name,
                   " must be float32 or float64, got ", tensor.scalar_type());
}

inline void check_image(int64_t width, int64_t height) {
  MEDGS_CHECK_VALUE(width >= 1 && height >= 1 && width <= 32768 && height <= 32768,
                    "width and height must be 1 ... 32768 pixels, got ", width, " x ", height);
}

}  // namespace medgs
