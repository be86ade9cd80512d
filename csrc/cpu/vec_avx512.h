// 16 fp32 lanes. Included by the AVX-512 translation units only.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace slm {
namespace SLM_ISA {
namespace {

using V = __m512;
constexpr int W = 16;
constexpr int kAxpyVectors = 4;
constexpr int kTileT = SLM_TILE_T;

inline __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float a) { return _mm512_set1_ps(a); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V clamp(V a, float lo, float hi) { return _mm512_min_ps(_mm512_max_ps(a, set1(lo)), set1(hi)); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V abs(V a) { return _mm512_abs_ps(a); }
inline bool any_greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline bool any_not_less(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ) != 0; }  // NaN is not

// 2^n of an integer n that sits in the low bits of `biased`, as kRounder + n leaves it there.
inline V pow2(V biased) {
  const __m512i n = _mm512_add_epi32(_mm512_castps_si512(biased), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
}

inline V from(__m256i h, bf16_t) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline V from(__m256i h, f16_t) { return _mm512_cvtph_ps(h); }

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
template <class T>
inline V load(const T* p) {
  return from(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline V load_n(const T* p, int n) {
  return from(_mm256_maskz_loadu_epi16(lanes(n), p), T{});
}

#ifdef SLM_DPBF16
inline __m256i to(V v, bf16_t) {
  return (__m256i)_mm512_cvtneps_pbh(v);
}  // subnormals become 0, as in products
#else
inline __m256i to(V v, bf16_t) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
#endif
inline __m256i to(V v, f16_t) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// v as a T would hold it.
template <class T>
inline V rounded(V v, T) {
  return from(to(v, T{}), T{});
}

inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline void store_n(float* p, V v, int n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
template <class T>
inline void store(T* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to(v, T{}));
}
template <class T>
inline void store_n(T* p, V v, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), to(v, T{}));
}

// The lanes are always summed in the same tree: halves, quarters, then within the quarter. sum16 does the
// same for 16 vectors at once.
inline float sum(V v) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

inline V fold_halves(V a, V b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
inline V fold_quarters(V ab, V cd) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

// out[t * stride + j] = sum(v[t * 4 + j]) for 4 x 4 vectors. No loops: the vectors must stay in registers.
inline void sum16(const V* v, float* out, int64_t stride) {
  const V r0 = fold_quarters(fold_halves(v[0], v[4]), fold_halves(v[8], v[12]));
  const V r1 = fold_quarters(fold_halves(v[1], v[5]), fold_halves(v[9], v[13]));
  const V r2 = fold_quarters(fold_halves(v[2], v[6]), fold_halves(v[10], v[14]));
  const V r3 = fold_quarters(fold_halves(v[3], v[7]), fold_halves(v[11], v[15]));
  const V s = _mm512_add_ps(_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
  const V t = _mm512_add_ps(_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(s), _mm512_castps_pd(t));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(s), _mm512_castps_pd(t));
  const V all = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  _mm_storeu_ps(out, _mm512_castps512_ps128(all));
  _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(all, 1));
  _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(all, 2));
  _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(all, 3));
}

// out[t * stride + j] = sum(v[t * NJ + j])
template <int NT, int NJ>
inline void sums(const V* v, float* out, int64_t stride) {
  if constexpr (NT * NJ == 16) {
    sum16(v, out, stride);
  } else {
    repeat<NT * NJ>([&](auto i) SLM_INLINE { out[i / NJ * stride + i % NJ] = sum(v[i]); });
  }
}

// Integers: what a step of the product of quantised keys takes.
using I = __m512i;
inline I set1(int32_t a) { return _mm512_set1_epi32(a); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(int32_t* p, I a) { _mm512_storeu_si512(p, a); }

// Each 32-bit lane's sum of products of its 4 unsigned bytes of ka, kb with the signed ones of qa, qb.
#ifdef __AVX512VNNI__
constexpr bool kSumsIn16Bits = false;
inline I products(I ka, I qa, I kb, I qb) {
  return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ka, qa), kb, qb);
}
#else
constexpr bool kSumsIn16Bits = true;
inline I products(I ka, I qa, I kb, I qb) {
  const I sums = _mm512_add_epi16(_mm512_maddubs_epi16(ka, qa), _mm512_maddubs_epi16(kb, qb));
  return _mm512_madd_epi16(sums, _mm512_set1_epi16(1));
}
#endif

}  // namespace
}  // namespace SLM_ISA
}  // namespace slm
