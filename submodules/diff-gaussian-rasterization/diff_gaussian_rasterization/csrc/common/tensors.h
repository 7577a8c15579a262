// What the operators use of torch: its stable ABI, which every torch from 2.10 on keeps. One compiled library serves
// them all, and the compiler reads a hundredth of torch's headers. Kernels never see this file.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// An error has to arrive in Python as what it is. torch's binding (pybind11) takes the standard library's
// invalid_argument for ValueError; for others there is only its own class, which it knows by name and layout. The
// symbols are of Python's stable ABI.
extern "C" {
extern struct _object* PyExc_TypeError;
void PyErr_SetString(struct _object*, const char*);
struct _object* PyImport_ImportModule(const char*);
struct _object* PyObject_GetAttrString(struct _object*, const char*);
}
namespace pybind11 {
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};
class __attribute__((visibility("default"))) type_error : public builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override { PyErr_SetString(PyExc_TypeError, what()); }
};
/// torch.OutOfMemoryError, a RuntimeError.
class __attribute__((visibility("default"))) out_of_memory : public builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override {
    struct _object* torch = PyImport_ImportModule("torch");
    struct _object* error = torch ? PyObject_GetAttrString(torch, "OutOfMemoryError") : nullptr;
    if (error) PyErr_SetString(error, what());
  }
};
}  // namespace pybind11

namespace medgs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

struct Device {
  int32_t type, index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline Device device_of(const Tensor& tensor) {
  Device device{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

// ---- errors --------------------------------------------------------------------------------------------------------

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  return out << ']';
}

inline std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.type == aoti_torch_device_type_cpu()) return out << "cpu";
  if (device.type == aoti_torch_device_type_cuda()) return out << "cuda:" << device.index;
  return out << "another device";
}

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

#define MEDGS_CHECK_VALUE(condition, ...)                                \
  do {                                                                   \
    if (!(condition)) throw std::invalid_argument(message(__VA_ARGS__)); \
  } while (0)
#define MEDGS_CHECK_TYPE(condition, ...)                                \
  do {                                                                  \
    if (!(condition)) throw pybind11::type_error(message(__VA_ARGS__)); \
  } while (0)
#define MEDGS_CHECK(condition, ...)                                   \
  do {                                                                \
    if (!(condition)) throw std::runtime_error(message(__VA_ARGS__)); \
  } while (0)

// ---- tensors -------------------------------------------------------------------------------------------------------

/// A contiguous tensor on the device of `like`, of its type or another; what is in it is not set.
inline Tensor empty(const Shape& shape, const Tensor& like, std::optional<ScalarType> type = std::nullopt) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  int32_t dtype = 0;
  if (type)
    dtype = *type == ScalarType::Int    ? aoti_torch_dtype_int32()
            : *type == ScalarType::Byte ? aoti_torch_dtype_uint8()
                                        : aoti_torch_dtype_int64();
  else
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  const Device device = device_of(like);
  AtenTensorHandle handle = nullptr;
  const auto failed = aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype, device.type,
                                               device.index, &handle);
  if (failed || !handle)
    throw pybind11::out_of_memory(message("out of memory on ", device, ": no room for a tensor of shape ", shape));
  return Tensor(handle);
}

inline Tensor zeros(const Shape& shape, const Tensor& like, std::optional<ScalarType> type = std::nullopt) {
  Tensor tensor = empty(shape, like, type);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor.get()));
  return tensor;
}

inline Tensor new_like(const Tensor& like) { return empty(shape_of(like), like); }

/// Contiguous: itself, or a copy.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

/// Sum over the first dimension.
inline Tensor sum_rows(const Tensor& tensor) {
  const int64_t first = 0;
  return torch::stable::sum(tensor, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1));
}

template <class S>
const S* data(const Tensor& tensor) {
  return static_cast<const S*>(tensor.const_data_ptr());
}
/// Null for a tensor that is not there.
template <class S>
const S* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<S>(*tensor) : nullptr;
}
template <class S>
S* writable(const Tensor& tensor) {
  return static_cast<S*>(tensor.mutable_data_ptr());
}

/// Calls `run(S())` with S the type of a tensor that check_real has passed.
template <class Run>
void with_scalar(const Tensor& tensor, const Run& run) {
  if (tensor.scalar_type() == ScalarType::Double)
    run(double());
  else
    run(float());
}

/// As many as torch uses: torch.set_num_threads, OMP_NUM_THREADS.
inline int threads() { return int(torch::stable::get_num_threads()); }

}  // namespace medgs
