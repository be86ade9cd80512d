// What every instruction set needs: unrolling, and 16-bit floats one at a time.
#pragma once

#include <stdint.h>

namespace slm {
namespace SLM_ISA {
namespace {

#define SLM_INLINE __attribute__((always_inline))

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

// f(0) .. f(N - 1) with constant arguments. Not a loop: loops are unrolled too late for arrays to become
// registers.
template <int N, int I = 0, class F>
SLM_INLINE inline void repeat(const F& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    repeat<N, I + 1>(f);
  }
}

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

inline uint32_t bits_of(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

inline float widen(float f) { return f; }
inline float widen(bf16_t h) { return float_of(static_cast<uint32_t>(h.bits) << 16); }
inline float widen(f16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t magnitude = h.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 rebiases the exponent and is exact for subnormals too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline void narrow(float f, float* out) { *out = f; }
inline void narrow(float f, bf16_t* out) {
  const uint32_t u = bits_of(f);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  out->bits = static_cast<uint16_t>((nan ? u | 0x400000 : u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void narrow(float f, f16_t* out) {
  const uint32_t u = bits_of(f);
  const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the fp32 adder round to a multiple of 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace SLM_ISA
}  // namespace slm
