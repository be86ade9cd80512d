// 4 fp32 lanes with the compiler's vector extension: SSE2 on x86-64, NEON on AArch64, plain code elsewhere.
#pragma once

#include "scalar.h"

namespace slm {
namespace SLM_ISA {
namespace {

typedef float V __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int kAxpyVectors = 2;
constexpr int kTileT = SLM_TILE_T;

inline V set1(float a) { return V{a, a, a, a}; }
inline V zero() { return set1(0.0f); }
inline V add(V a, V b) { return a + b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V clamp(V a, float lo, float hi) {
  for (int i = 0; i < W; ++i) a[i] = a[i] < lo ? lo : a[i] > hi ? hi : a[i];
  return a;
}
// 2^n of an integer n that sits in the low bits of `biased`, as kRounder + n leaves it there.
inline V pow2(V biased) {
  for (int i = 0; i < W; ++i) biased[i] = float_of((bits_of(biased[i]) + 127) << 23);
  return biased;
}
inline V fma(V a, V b, V c) { return a * b + c; }  // two roundings: built with -ffp-contract=off
inline V max(V a, V b) { return a > b ? a : b; }
inline V abs(V a) { return max(a, -a); }
inline bool any_greater(V a, V b) { return a[0] > b[0] || a[1] > b[1] || a[2] > b[2] || a[3] > b[3]; }
inline bool any_not_less(V a, V b) {
  return !(a[0] < b[0] && a[1] < b[1] && a[2] < b[2] && a[3] < b[3]);
}  // NaN is not

inline V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline V load(const T* p) {
  return V{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
inline V load_n(const T* p, int n) {
  V v = zero();
  for (int i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}

inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
template <class T>
inline void store_n(T* p, V v, int n) {
  for (int i = 0; i < n; ++i) narrow(v[i], p + i);
}
template <class T>
inline void store(T* p, V v) {
  store_n(p, v, W);
}

// v as a T would hold it.
template <class T>
inline V rounded(V v, T) {
  T lane[W];
  store(lane, v);
  return load(lane);
}

inline float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// out[t * stride + j] = sum(v[t * NJ + j])
template <int NT, int NJ>
inline void sums(const V* v, float* out, int64_t stride) {
  repeat<NT * NJ>([&](auto i) SLM_INLINE { out[i / NJ * stride + i % NJ] = sum(v[i]); });
}

// Integers: what a step of the product of quantised keys takes.
typedef int32_t I __attribute__((vector_size(16)));
inline I set1(int32_t a) { return I{a, a, a, a}; }
inline I add(I a, I b) { return a + b; }
inline I load_bytes(const uint8_t* p) {
  I v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(int32_t* p, I a) { __builtin_memcpy(p, &a, sizeof a); }

// Each 32-bit lane's sum of products of its 4 unsigned bytes of ka, kb with the signed ones of qa, qb.
constexpr bool kSumsIn16Bits = true;
typedef int16_t Halves __attribute__((vector_size(16)));
typedef uint16_t UnsignedHalves __attribute__((vector_size(16)));
inline Halves pair_sums(I k, I q) {
  const UnsignedHalves ks = (UnsignedHalves)k;
  const Halves qs = (Halves)q, low = (Halves)((UnsignedHalves)q << 8) >> 8;
  return (Halves)(ks & 255) * low + (Halves)(ks >> 8) * (qs >> 8);
}
inline I products(I ka, I qa, I kb, I qb) {
  const I sums = (I)(pair_sums(ka, qa) + pair_sums(kb, qb));
  return (sums << 16 >> 16) + (sums >> 16);
}

}  // namespace
}  // namespace SLM_ISA
}  // namespace slm
