// Keys as 8-bit codes with one scale each, and what bounds the error of a score computed with them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../ops.h"
#include "kernels.h"
#include "parallel.h"

namespace slm {
namespace {

constexpr double kUp = 1.0 + 0x1p-20;  // covers the roundings of a bound
constexpr float kRounder = 0x1.8p23f;  // added and subtracted: to the nearest integer, ties to even

void widen(const void* keys, DType dtype, int64_t begin, int64_t dim, float* key) {
  if (dtype == DType::f32) {
    std::copy_n(static_cast<const float*>(keys) + begin, dim, key);
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(keys) + begin;
  for (int64_t d = 0; d < dim; ++d)
    key[d] = dtype == DType::bf16 ? float_of(static_cast<uint32_t>(halves[d]) << 16) : widen_f16(halves[d]);
}

float above(double bound) { return static_cast<float>(bound * kUp); }

void encode(const float* key, int64_t dim, uint8_t* codes, float* bounds) {
  const int64_t steps = (dim + 7) / 8;
  float size = 0.0f;
  double squares = 0.0, decoded_squares = 0.0, errors = 0.0;
  for (int64_t d = 0; d < dim; ++d) {
    size = std::max(size, std::fabs(key[d]));
    squares += static_cast<double>(key[d]) * key[d];
  }
  const bool known = squares >= kLeastNorm * kLeastNorm && squares <= kMostNorm * kMostNorm;
  const float scale = known ? size / 127.0f : 0.0f, inverse = known ? 127.0f / size : 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float code =
        known ? std::min(std::max(key[d] * inverse + kRounder - kRounder, -127.0f), 127.0f) : 0.0f;
    const double decoded = static_cast<double>(scale) * code, off = key[d] - decoded;
    decoded_squares += decoded * decoded;
    errors += off * off;
    const int64_t row = d / steps;  // of [2][4]
    codes[(d % steps * 2 + row / 4) * 4 * kCodeKeys + row % 4] = static_cast<uint8_t>(code + 128.0f);
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  bounds[0] = scale;
  bounds[kCodeKeys] = known ? above(std::sqrt(errors)) : kInfinity;
  bounds[2 * kCodeKeys] = known ? above(std::sqrt(std::max(squares, decoded_squares))) : kInfinity;
}

}  // namespace

void key_codes(const void* keys, DType key_dtype, int64_t num_keys, int64_t dim, const int64_t* rows,
               int64_t num_rows, uint8_t* codes, float* bounds, int num_threads) {
  const int64_t count = rows ? num_rows : num_keys, block_bytes = (dim + 7) / 8 * 8 * kCodeKeys;
  parallel_for((count + kCodeKeys - 1) / kCodeKeys, num_threads, [&](int64_t chunk) {
    std::vector<float> key(dim);
    for (int64_t i = chunk * kCodeKeys; i < std::min((chunk + 1) * kCodeKeys, count); ++i) {
      const int64_t row = rows ? rows[i] : i, block = row / kCodeKeys, j = row % kCodeKeys;
      widen(keys, key_dtype, row * dim, dim, key.data());
      encode(key.data(), dim, codes + block * block_bytes + 4 * j,
             bounds + block * kCodeBounds * kCodeKeys + j);
    }
  });
}

}  // namespace slm
