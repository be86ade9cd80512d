// 8 fp32 lanes with FMA and F16C. Included by the AVX2 translation unit only.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace slm {
namespace SLM_ISA {
namespace {

using V = __m256;
constexpr int W = 8;
constexpr int kAxpyVectors = 2;
constexpr int kTileT = SLM_TILE_T;

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float a) { return _mm256_set1_ps(a); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
inline V clamp(V a, float lo, float hi) { return _mm256_min_ps(_mm256_max_ps(a, set1(lo)), set1(hi)); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V abs(V a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline bool any_greater(V a, V b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline bool any_not_less(V a, V b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)) != 0;
}  // NaN is not

// 2^n of an integer n that sits in the low bits of `biased`, as kRounder + n leaves it there.
inline V pow2(V biased) {
  const __m256i n = _mm256_add_epi32(_mm256_castps_si256(biased), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}

inline V from(__m128i h, bf16_t) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline V from(__m128i h, f16_t) { return _mm256_cvtph_ps(h); }

inline V load(const float* p) { return _mm256_loadu_ps(p); }
template <class T>
inline V load(const T* p) {
  return from(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
inline V load_n(const T* p, int n) {
  T lane[W] = {};
  for (int i = 0; i < n; ++i) lane[i] = p[i];
  return load(lane);
}

inline __m128i to(V v, bf16_t) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i to(V v, f16_t) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// v as a T would hold it.
template <class T>
inline V rounded(V v, T) {
  return from(to(v, T{}), T{});
}

inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
template <class T>
inline void store(T* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to(v, T{}));
}
template <class T>
inline void store_n(T* p, V v, int n) {
  T lane[W];
  store(lane, v);
  for (int i = 0; i < n; ++i) p[i] = lane[i];
}

inline float sum(V v) {
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

// The same tree as sum, for four vectors at once.
inline __m128 quarter(V v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
inline void sum4(V a, V b, V c, V d, float* out) {
  const __m128 qa = quarter(a), qb = quarter(b), qc = quarter(c), qd = quarter(d);
  const __m128 s = _mm_add_ps(_mm_unpacklo_ps(qa, qb), _mm_unpackhi_ps(qa, qb));
  const __m128 t = _mm_add_ps(_mm_unpacklo_ps(qc, qd), _mm_unpackhi_ps(qc, qd));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(s, t), _mm_movehl_ps(t, s)));
}

// out[t * stride + j] = sum(v[t * NJ + j])
template <int NT, int NJ>
inline void sums(const V* v, float* out, int64_t stride) {
  if constexpr (NJ % 4 == 0) {
    repeat<NT * NJ / 4>([&](auto q) SLM_INLINE {
      constexpr int i = 4 * q;
      sum4(v[i], v[i + 1], v[i + 2], v[i + 3], out + i / NJ * stride + i % NJ);
    });
  } else {
    repeat<NT * NJ>([&](auto i) SLM_INLINE { out[i / NJ * stride + i % NJ] = sum(v[i]); });
  }
}

// Integers: what a step of the product of quantised keys takes.
using I = __m256i;
inline I set1(int32_t a) { return _mm256_set1_epi32(a); }
inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
inline void store(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<I*>(p), a); }

// Each 32-bit lane's sum of products of its 4 unsigned bytes of ka, kb with the signed ones of qa, qb.
constexpr bool kSumsIn16Bits = true;
inline I products(I ka, I qa, I kb, I qb) {
  const I sums = _mm256_add_epi16(_mm256_maddubs_epi16(ka, qa), _mm256_maddubs_epi16(kb, qb));
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

}  // namespace
}  // namespace SLM_ISA
}  // namespace slm
