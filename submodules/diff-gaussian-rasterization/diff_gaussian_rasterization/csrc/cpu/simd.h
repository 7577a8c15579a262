// Vectors of the compiler (GCC and Clang vector extensions) and the few functions of them that the kernels need.
// No intrinsics: the same source serves AVX-512, AVX2 and whatever the portable build has (SSE2, NEON).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "../common/constants.h"

namespace medgs {
namespace MEDGS_ISA {

template <class S, int W>
struct Simd {
  typedef S type __attribute__((vector_size(W * sizeof(S))));
};
template <class S>
struct Integer;
template <>
struct Integer<float> {
  using type = int32_t;
};
template <>
struct Integer<double> {
  using type = int64_t;
};

template <class S>
constexpr int kLanes = MEDGS_VECTOR_BYTES / sizeof(S);
template <class S>
using Vec = typename Simd<S, kLanes<S>>::type;
template <class S>
using Mask = typename Simd<typename Integer<S>::type, kLanes<S>>::type;  // -1 in the lanes that are set, 0 elsewhere

/// The first half of the lanes plus the second, as a vector half as wide: the reductions fold until one lane is left.
template <class S, int W>
MEDGS_INLINE typename Simd<S, W / 2>::type fold_halves(typename Simd<S, W>::type v) {
  typename Simd<S, W / 2>::type low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return low + high;
}

template <class S, int W>
MEDGS_INLINE S sum_lanes(typename Simd<S, W>::type v) {
  if constexpr (W == 2)
    return v[0] + v[1];
  else
    return sum_lanes<S, W / 2>(fold_halves<S, W>(v));
}

/// Pairwise: log2(W) additions deep, in the same order for every caller.
template <class S>
MEDGS_INLINE S sum(Vec<S> v) {
  return sum_lanes<S, kLanes<S>>(v);
}

/// u and v hold segments of 2 H lanes each; the result holds, for each of them in turn, the H sums of its two halves.
template <class S, int H>
MEDGS_INLINE Vec<S> fold_segments(Vec<S> u, Vec<S> v) {
#if defined(__clang__)
  Vec<S> first, second;
  for (int i = 0; i < kLanes<S>; ++i) {
    const int at = i / H * 2 * H + i % H;
    first[i] = at < kLanes<S> ? u[at] : v[at - kLanes<S>];
    second[i] = at + H < kLanes<S> ? u[at + H] : v[at + H - kLanes<S>];
  }
  return first + second;
#else
  Mask<S> low;
  for (int i = 0; i < kLanes<S>; ++i) low[i] = i / H * 2 * H + i % H;
  return __builtin_shuffle(u, v, low) + __builtin_shuffle(u, v, low + H);
#endif
}

/// The sums over the lanes of eight vectors, `out[i]` of `v[i]`: 7 log-steps of two shuffles and an addition instead of
/// eight separate reductions.
template <class S>
MEDGS_INLINE void sum8(Vec<S>* v, S* out) {
  constexpr int W = kLanes<S>;
  int count = 8;
  const auto halve = [&](auto half) {
    constexpr int H = decltype(half)::value;
    if constexpr (H >= 1 && 2 * H <= W) {
      if (count == 1) {
        v[0] = fold_segments<S, H>(v[0], v[0]);
      } else {
        for (int i = 0; i < count / 2; ++i) v[i] = fold_segments<S, H>(v[2 * i], v[2 * i + 1]);
        count /= 2;
      }
    }
  };
  halve(std::integral_constant<int, 8>{});
  halve(std::integral_constant<int, 4>{});
  halve(std::integral_constant<int, 2>{});
  halve(std::integral_constant<int, 1>{});
  std::memcpy(out, v, 8 * sizeof(S));
}

template <class M>
MEDGS_INLINE bool any(M mask) {
// (not __AVX512F__: g++ reads the whole file before it heeds the target)
#if defined(__x86_64__) && defined(__GNUC__) && MEDGS_VECTOR_BYTES == 64
  __m512i words;
  std::memcpy(&words, &mask, sizeof mask);
  return _mm512_test_epi32_mask(words, words) != 0;
#elif defined(__x86_64__) && defined(__GNUC__) && MEDGS_VECTOR_BYTES == 32
  __m256i words;
  std::memcpy(&words, &mask, sizeof mask);
  return !_mm256_testz_si256(words, words);
#else
  using Words = typename Simd<int64_t, sizeof(M) / 8>::type;
  Words words;
  std::memcpy(&words, &mask, sizeof mask);
  int64_t all = 0;
  for (size_t i = 0; i < sizeof(M) / 8; ++i) all |= words[i];
  return all != 0;
#endif
}

namespace math {

/// e^x within 2 ulp (float): x = n ln 2 + r, a polynomial in r, and n into the exponent's bits.
MEDGS_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  using M = Mask<float>;
  x = x < -87.0f ? V{} - 87.0f : x;
  x = x > 88.0f ? V{} + 88.0f : x;
  const V shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const V n = shifted - 12582912.0f;
  V r = x - n * 0.693145751953125f;
  r = r - n * 1.428606820309417e-6f;
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  M bits, exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;  // the low bits of `shifted` hold n; the rest is shifted out
  V out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// float64 serves the gradient checks: exact library functions, lane by lane.
MEDGS_INLINE Vec<double> exp(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}

template <class V>
MEDGS_INLINE V sqrt(V x) {
  for (size_t l = 0; l < sizeof(V) / sizeof(x[0]); ++l) x[l] = std::sqrt(x[l]);
  return x;
}

template <class V>
MEDGS_INLINE V ceil(V x) {
  for (size_t l = 0; l < sizeof(V) / sizeof(x[0]); ++l) x[l] = std::ceil(x[l]);
  return x;
}

/// Sine and cosine of 2 pi `turns`, turns in [0, 1]: reduced to a quarter turn before anything is rounded.
MEDGS_INLINE void sincos_turns(Vec<float> turns, Vec<float>& sine, Vec<float>& cosine) {
  using V = Vec<float>;
  using M = Mask<float>;
  const V shifted = turns * 4.0f + 12582912.0f;
  const V quarter = shifted - 12582912.0f;  // 0 ... 4
  M q;
  std::memcpy(&q, &shifted, sizeof q);
  const V r = (turns - 0.25f * quarter) * 6.283185307179586f;  // [-pi/4, pi/4]
  const V r2 = r * r;
  const V s = ((-1.9515295891e-4f * r2 + 8.3321608736e-3f) * r2 - 1.6666654611e-1f) * r2 * r + r;
  const V c =
      ((2.443315711809948e-5f * r2 - 1.388731625493765e-3f) * r2 + 4.166664568298827e-2f) * r2 * r2 - 0.5f * r2 + 1.0f;
  const M odd = (q & 1) != 0;
  const M sine_negative = (q & 2) != 0;
  const M cosine_negative = ((q + 1) & 2) != 0;
  sine = odd ? c : s;
  cosine = odd ? s : c;
  sine = sine_negative ? -sine : sine;
  cosine = cosine_negative ? -cosine : cosine;
}

MEDGS_INLINE void sincos_turns(Vec<double> turns, Vec<double>& sine, Vec<double>& cosine) {
  for (int l = 0; l < kLanes<double>; ++l) {
    sine[l] = std::sin(6.283185307179586 * turns[l]);
    cosine[l] = std::cos(6.283185307179586 * turns[l]);
  }
}

/// That number in every lane.
template <class V, class S>
MEDGS_INLINE V splat(S x) {
  return V{} + x;
}

// Of blending; on a GPU these are the hardware's fast forms.
template <class V>
MEDGS_INLINE V blending_exp(V x) {
  return exp(x);
}
template <class V>
MEDGS_INLINE V blending_divide(V x, V y) {
  return x / y;
}

}  // namespace math
}  // namespace MEDGS_ISA
}  // namespace medgs
