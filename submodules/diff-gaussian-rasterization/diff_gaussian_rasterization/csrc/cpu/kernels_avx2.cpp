// The kernels for processors with AVX2 and FMA (2013 and newer).
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif
// The target starts after the standard headers, which must stay code for any processor.
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MEDGS_ISA avx2
#define MEDGS_VECTOR_BYTES 32
#include "kernels_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
