// Which set of kernels this processor gets, decided once.
#include <cstdlib>
#include <cstring>

#include "../common/checks.h"
#include "kernels.h"

namespace medgs {
namespace {

template <class S>
struct Table;
template <>
struct Table<float> {
  static const Kernels<float>& generic() { return generic::kernels_float; }
#if defined(__x86_64__) && defined(__GNUC__)
  static const Kernels<float>& avx2() { return avx2::kernels_float; }
  static const Kernels<float>& avx512() { return avx512::kernels_float; }
#endif
};
template <>
struct Table<double> {
  static const Kernels<double>& generic() { return generic::kernels_double; }
#if defined(__x86_64__) && defined(__GNUC__)
  static const Kernels<double>& avx2() { return avx2::kernels_double; }
  static const Kernels<double>& avx512() { return avx512::kernels_double; }
#endif
};

template <class S>
const Kernels<S>& choose() {
  const char* wanted = std::getenv("MEDGS_CPU_KERNELS");
  const bool free = wanted == nullptr || *wanted == 0;
  if (!free && std::strcmp(wanted, "portable") == 0) return Table<S>::generic();
#if defined(__x86_64__) && defined(__GNUC__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (free || std::strcmp(wanted, "avx512") == 0)) return Table<S>::avx512();
  if (has_avx2 && (free || std::strcmp(wanted, "avx2") == 0)) return Table<S>::avx2();
#endif
  MEDGS_CHECK(free, "MEDGS_CPU_KERNELS=", wanted, ": not one of portable, avx2, avx512, or not for this processor");
  return Table<S>::generic();
}

}  // namespace

template <class S>
const Kernels<S>& kernels() {
  static const Kernels<S>& chosen = choose<S>();
  return chosen;
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();

std::string cpu_kernels() {
  const char* name = kernels<float>().name;
  return std::strcmp(name, "generic") == 0 ? "portable" : name;
}

/// Refuses every negative number. The loader asks for it once after compiling, to see that an error raised here, with a
/// number in its message, arrives in Python.
int64_t self_test(int64_t number) {
  MEDGS_CHECK_VALUE(number >= 0, "self_test: must not be negative, got ", number);
  return number;
}

STABLE_TORCH_LIBRARY_FRAGMENT(diff_gaussian_rasterization, m) {
  m.def("cpu_kernels() -> str");
  m.def("self_test(int number) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(diff_gaussian_rasterization, CompositeImplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&cpu_kernels));
  m.impl("self_test", TORCH_BOX(&self_test));
}

}  // namespace medgs
