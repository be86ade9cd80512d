// The arithmetic of key search, written once: the CUDA kernel (nvcc, or NVRTC through CuPy), its emulation on
// the CPU and the CPU's own search call these functions. Sums have a fixed order and fused multiply-adds are
// explicit, so the kernel and its emulation agree bit for bit in the scores; the weights differ by the two
// libraries' expf.
//
// A `lane` of `lanes` works on every lanes-th item and calls `sync` where the others' writes must be visible;
// on the CPU it is lane 0 of 1 and sync does nothing.
#pragma once

#ifdef __CUDACC_RTC__
namespace slm {
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int32_t = int;
using int64_t = long long;
}  // namespace slm
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#endif

#ifdef __CUDACC__
#define SLM_HD __host__ __device__ inline
#define SLM_UNROLL _Pragma("unroll")
#define SLM_ROLLED _Pragma("unroll 1")  // for what runs rarely: the instruction cache is small
#else
#define SLM_HD inline
#define SLM_UNROLL
#define SLM_ROLLED
#endif

namespace slm {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Weighting : int { similarity = 0, softmax = 1, uniform = 2 };

constexpr int kLanes = 32;
constexpr int kWarps = 16;  // of a block
constexpr int kThreads = kWarps * kLanes;
constexpr int kTileKeys = 4;  // keys that a warp scores at once

SLM_HD float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
SLM_HD uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
SLM_HD float minus_infinity() { return float_of(0xff800000); }
SLM_HD float not_a_number() { return float_of(0x7fc00000); }
SLM_HD bool is_finite(float f) { return (bits_of(f) & 0x7f800000) != 0x7f800000; }

SLM_HD float widen_f16(uint32_t half) {
#ifdef __CUDA_ARCH__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(static_cast<unsigned short>(half)));
  return f;
#else
  const uint32_t sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Scaling by 2^112 rebiases the exponent and is exact for subnormals too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
#endif
}

// ---- scores

// 16 bytes of a key: what a lane loads at once.
struct alignas(16) Chunk {
  uint32_t word[4];
};

template <int kType>
constexpr int kValues = kType == static_cast<int>(DType::f32) ? 4 : 8;  // of a chunk

// Elements of a key that a warp reads in one step: lane l takes l * kValues onwards.
template <int kType>
constexpr int kStep = kLanes * kValues<kType>;

template <int kType>
SLM_HD void unpack(const Chunk& chunk, float* values) {
  SLM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = chunk.word[i];
    if (kType == static_cast<int>(DType::f32)) {
      values[i] = float_of(word);
    } else if (kType == static_cast<int>(DType::bf16)) {
      values[2 * i] = float_of(word << 16);
      values[2 * i + 1] = float_of(word & 0xffff0000);
    } else {
      values[2 * i] = widen_f16(word & 0xffff);
      values[2 * i + 1] = widen_f16(word >> 16);
    }
  }
}

// Where element e of a query lies in its staged row. A lane reads its 8 values as two 16-byte halves; the
// first halves of all lanes lie together, then the second ones, so that neither read meets a bank twice.
template <int kType>
SLM_HD int64_t staged_at(int64_t e) {
  if (kValues<kType> == 4) return e;
  const int64_t in_step = e % kStep<kType>;
  return e - in_step + in_step % 8 / 4 * (kStep<kType> / 2) + in_step / 8 * 4 + in_step % 4;
}

template <int kType>
SLM_HD float multiply_add(const float* key, const float* query, float sum) {
  SLM_UNROLL
  for (int i = 0; i < kValues<kType>; ++i) sum = fmaf(key[i], query[i], sum);
  return sum;
}

// Sum each of kCount values (a power of two up to 32) over the lanes; lane l ends with value l * kCount / 32.
// While a lane has several, it keeps one half, sends the other to the lane across `kOffset` and adds what
// comes back; with one left, both lanes add both. Addition commutes, so the bits of a sum do not depend on
// kCount.
template <int kCount, class Warp, int kOffset = kLanes / 2>
SLM_HD typename Warp::Float sum_over_lanes(typename Warp::Float* v) {
  if constexpr (kCount > 1) {
    SLM_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      const typename Warp::Float keep = Warp::where_bit(kOffset, v[i + kCount / 2], v[i]);
      const typename Warp::Float send = Warp::where_bit(kOffset, v[i], v[i + kCount / 2]);
      v[i] = keep + Warp::exchange(send, kOffset);
    }
    return sum_over_lanes<kCount / 2, Warp, kOffset / 2>(v);
  } else if constexpr (kOffset > 0) {
    v[0] = v[0] + Warp::exchange(v[0], kOffset);
    return sum_over_lanes<1, Warp, kOffset / 2>(v);
  } else {
    return v[0];
  }
}

SLM_HD float square_sum(const float* x, int64_t n, int lane) {
  float sum = 0.0f;
  SLM_ROLLED
  for (int64_t i = lane; i < n; i += kLanes) sum = fmaf(x[i], x[i], sum);
  return sum;
}

SLM_HD float group_norm(float square_sum) { return fmaxf(sqrtf(square_sum), 1e-12f); }

// Slices begin at multiples of `unit` keys.
SLM_HD int64_t slice_begin(int64_t slice, int64_t slices, int64_t num_keys, int64_t unit) {
  const int64_t begin = (num_keys + unit - 1) / unit * slice / slices * unit;
  return begin < num_keys ? begin : num_keys;
}

// ---- top-k lists

struct Entry {
  float score;
  int32_t index;
};

// The total order of picks: a list's content does not depend on the order in which entries were offered.
SLM_HD bool before(Entry a, Entry b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// The best top_k entries so far, sorted; a pick that does not exist has score -inf and index 0.
struct List {
  float* scores;
  int32_t* indices;
  int top_k;

  SLM_HD Entry at(int i) const { return {scores[i], indices[i]}; }
  SLM_HD void set(int i, Entry e) const {
    scores[i] = e.score;
    indices[i] = e.index;
  }
  SLM_HD Entry last() const { return at(top_k - 1); }
};

// Of all warps of a block.
SLM_HD int64_t list_bytes(int64_t queries, int64_t top_k) {
  return kWarps * queries * top_k * static_cast<int64_t>(sizeof(float) + sizeof(int32_t));
}

struct NoSync {
  SLM_HD void operator()() const {}
};

template <class Sync>
SLM_HD void clear(const List& list, int lane, int lanes, Sync sync) {
  SLM_ROLLED
  for (int i = lane; i < list.top_k; i += lanes) list.set(i, {minus_infinity(), 0});
  sync();
}

// Put `fresh` where the order wants it and drop the last entry; one that the last beats changes nothing. From
// the far end, so that every slot still sees its old left neighbour.
template <class Sync>
SLM_HD void insert(const List& list, Entry fresh, int lane, int lanes, Sync sync) {
  SLM_ROLLED
  for (int base = (list.top_k - 1) / lanes * lanes; base >= 0; base -= lanes) {
    const int slot = base + lane;
    Entry next = fresh;
    if (slot < list.top_k) {
      const Entry held = list.at(slot);
      if (!before(fresh, held))
        next = held;
      else if (slot > 0 && before(fresh, list.at(slot - 1)))
        next = list.at(slot - 1);
    }
    sync();
    if (slot < list.top_k) list.set(slot, next);
    sync();
  }
}

// reference.mixture_weights of a sorted list, and 0 everywhere when the best score is below min_similarity.
template <class Sync>
SLM_HD void weigh(const float* scores, int top_k, Weighting weighting, float temperature,
                  float min_similarity, float* weights, int lane, int lanes, Sync sync) {
  int count = 0;
  while (count < top_k && scores[count] > minus_infinity()) ++count;
  const bool base_model = count == 0 || scores[0] < min_similarity;
  SLM_ROLLED
  for (int i = lane; i < top_k; i += lanes) {
    float w = 0.0f;
    if (!base_model && i < count)
      w = weighting == Weighting::softmax ? expf((scores[i] - scores[0]) / temperature)
                                          : fmaxf(scores[i], 0.0f);
    weights[i] = w;
  }
  sync();
  float total = 0.0f;
  SLM_ROLLED
  for (int i = 0; i < count; ++i) total += weights[i];
  sync();
  const bool even = weighting == Weighting::uniform || (weighting == Weighting::similarity && total < 1e-6f);
  if (base_model) return;
  SLM_ROLLED
  for (int i = lane; i < count; i += lanes)
    weights[i] = even ? 1.0f / static_cast<float>(count) : weights[i] / total;
}

}  // namespace slm
