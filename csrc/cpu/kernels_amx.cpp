// bf16 weights on AMX tiles. 16 rows of the weight are the first operand, 32 columns at a time and straight
// from memory; up to 16 tokens, packed once a call, are the second. A tile product takes 16 cycles for a KiB
// of weights and one core reads a KiB in about 170, so 1 to 64 tokens cost the same pass over the weights.
// Each output is one chain of tile products over its columns, whatever the other tokens are.
#define SLM_ISA isa_amx
#define SLM_TILE_T 4

#include "kernels.h"

#include "vec_avx512.h"

namespace slm {
namespace SLM_ISA {
namespace {

constexpr int kTileColumns = 32;  // of a weight, in one tile
// Rows longer than a page are followed by the processor itself, and asking for them gets in the way of the
// tokens.
constexpr int64_t kPageBytes = 4096;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t tiles_of(int64_t dim) { return (dim + kTileColumns - 1) / kTileColumns; }
// Tokens are cut into groups of at most 16, of equal size so that one tile configuration serves them all.
inline int64_t num_groups(int64_t num_t) { return (num_t + 15) / 16; }
inline int64_t group_size(int64_t num_t) { return (num_t + num_groups(num_t) - 1) / num_groups(num_t); }

inline __mmask32 columns(int64_t n) {
  return n >= kTileColumns ? 0xffffffffu : n <= 0 ? 0 : static_cast<__mmask32>((1ull << n) - 1);
}

// The intrinsics do not tell GCC that they read and write memory.
#define SLM_TILE_LOAD(tile, p, stride) \
  do {                                 \
    __asm__ volatile("" ::: "memory"); \
    _tile_loadd(tile, p, stride);      \
  } while (0)
#define SLM_TILE_STORE(tile, p, stride) \
  do {                                  \
    _tile_stored(tile, p, stride);      \
    __asm__ volatile("" ::: "memory");  \
  } while (0)

// Rows become columns.
inline void transpose(__m512* r) {
  __m512 pair[16], quad[16];
  repeat<8>([&](auto i) SLM_INLINE {
    pair[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    pair[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  });
  // quad[4 * i + c]: in lane l, column 4 * l + c of the rows 4 * i .. 4 * i + 3
  repeat<4>([&](auto i) SLM_INLINE {
    repeat<2>([&](auto h) SLM_INLINE {
      const __m512d a = _mm512_castps_pd(pair[4 * i + h]), b = _mm512_castps_pd(pair[4 * i + 2 + h]);
      quad[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      quad[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    });
  });
  repeat<4>([&](auto c) SLM_INLINE {
    const __m512 even0 = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0xdd);
    r[c] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    r[4 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    r[8 + c] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    r[12 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  });
}

int64_t packed_parts(int64_t dim) { return tiles_of(dim); }

// A single token of whole tiles is its own packing.
int64_t packed_bytes(int64_t num_t, int64_t dim) {
  if (num_t == 1 && dim % kTileColumns == 0) return 0;
  return num_groups(num_t) * tiles_of(dim) * 64 * group_size(num_t);
}

// packed [group][tile][pair of columns 16][token of the group] of two bf16
void pack(const void* h, int64_t num_t, int64_t dim, int64_t begin, int64_t end, void* packed) {
  const int64_t groups = num_groups(num_t), size = group_size(num_t);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t k = begin; k < end; ++k) {
      const __mmask32 mask = columns(dim - k * kTileColumns);
      __m512 r[16];
      repeat<16>([&](auto n) SLM_INLINE {
        const int64_t t = g * size + n;
        const bf16_t* row = static_cast<const bf16_t*>(h) + t * dim + k * kTileColumns;
        r[n] = _mm512_castsi512_ps(n < size && t < num_t ? _mm512_maskz_loadu_epi16(mask, row)
                                                         : _mm512_setzero_si512());
      });
      transpose(r);
      float* out = static_cast<float*>(packed) + (g * tiles_of(dim) + k) * 16 * size;
      repeat<16>([&](auto pair) SLM_INLINE { store_n(out + pair * size, r[pair], static_cast<int>(size)); });
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: the products of up to four groups of tokens; 4: weights; 5, 6: tokens.
void enter(int64_t num_t) {
  TileConfig config;
  for (int tile = 0; tile < 7; ++tile) {
    config.rows[tile] = 16;
    config.row_bytes[tile] = static_cast<uint16_t>(tile == 4 ? 64 : 4 * group_size(num_t));
  }
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

// A tile of weights that reaches past the last row or column, filled up with zeros.
inline void stage(const bf16_t* w, int64_t dim, int64_t num_r, int64_t num_c, bf16_t* staged) {
  for (int64_t r = 0; r < 16; ++r)
    _mm512_store_si512(staged + r * kTileColumns, r < num_r
                                                      ? _mm512_maskz_loadu_epi16(columns(num_c), w + r * dim)
                                                      : _mm512_setzero_si512());
}

// Asks for one of the tiles_of(dim) parts of the 16 rows at `next`, as four streams: one alone is read 10%
// slower.
SLM_INLINE inline void ask_ahead(const char* next, int64_t stride, int64_t part) {
  const char* p = next + part * 256;
  repeat<16>([&](auto i) SLM_INLINE { _mm_prefetch(p + (i & 3) * 4 * stride + (i >> 2) * 64, _MM_HINT_T1); });
}

template <int NG>
inline void multiply(const float* packed, int64_t group_stride, int64_t row_bytes) {
  SLM_TILE_LOAD(5, packed, row_bytes);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (NG > 1) {
    SLM_TILE_LOAD(6, packed + group_stride, row_bytes);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (NG > 2) {
    SLM_TILE_LOAD(5, packed + 2 * group_stride, row_bytes);
    _tile_dpbf16ps(2, 4, 5);
  }
  if constexpr (NG > 3) {
    SLM_TILE_LOAD(6, packed + 3 * group_stride, row_bytes);
    _tile_dpbf16ps(3, 4, 6);
  }
}

// The products of group g: acc[t * kRowsOfBlock + r] for 16 rows of the weight.
inline void unpack(const float* tile, int64_t g, int64_t size, int64_t num_t, float* acc) {
  __m512 r[16];
  repeat<16>([&](auto i) SLM_INLINE { r[i] = _mm512_load_ps(tile + i * 16); });
  transpose(r);
  repeat<16>([&](auto n) SLM_INLINE {
    if (n < size && g * size + n < num_t) _mm512_storeu_ps(acc + (g * size + n) * kRowsOfBlock, r[n]);
  });
}

// Row j of B has column j of each tile's row; two of them make the pairs that a tile product multiplies.
void augment(const void* B, int64_t stride, const int64_t* rows, int64_t num_rows, int64_t begin,
             int64_t width, void* tiles) {
  const auto load16 = [&](int64_t row, int64_t at) SLM_INLINE {
    if (row < 0) return _mm512_setzero_si512();
    const auto* p = static_cast<const bf16_t*>(B) + row * stride + begin + at;
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(static_cast<int>(min64(16, width - at))), p));
  };
  float* out = static_cast<float*>(tiles);
  for (int64_t at = 0; at < width; at += 16) {
    for (int64_t k = 0; k < num_rows; k += kTileColumns, out += 16 * 16) {
      __m512 r[16];
      repeat<16>([&](auto pair) SLM_INLINE {
        const __m512i even = load16(rows[k + 2 * pair], at), odd = load16(rows[k + 2 * pair + 1], at);
        r[pair] = _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      });
      transpose(r);
      repeat<16>([&](auto i) SLM_INLINE { _mm512_storeu_ps(out + i * 16, r[i]); });
    }
  }
}

// The further tiles of a row tile.
struct More {
  const float* tiles;
  const float* packed;
  int64_t count;
};

template <int NG>
void rows_of(const bf16_t* w, int64_t num_r, const float* packed, int64_t num_t, int64_t dim, More more,
             const bf16_t* next, float* acc) {
  alignas(64) float products[kRowsOfBlock / 16][NG][16 * 16];
  alignas(64) bf16_t staged[16 * kTileColumns];
  const int64_t size = group_size(num_t), row_bytes = 4 * size, whole = dim / kTileColumns;
  const int64_t stride = dim * 2, group_stride = tiles_of(dim) * 16 * size;
  const bool short_rows = stride <= kPageBytes;
  for (int64_t r = 0; r < num_r; r += 16, w += 16 * dim) {
    const int64_t left = num_r - r;
    const char* ahead = reinterpret_cast<const char*>(left > 16 ? w + 16 * dim : next);
    _tile_zero(0);
    if constexpr (NG > 1) _tile_zero(1);
    if constexpr (NG > 2) _tile_zero(2);
    if constexpr (NG > 3) _tile_zero(3);
    for (int64_t k = 0; k < whole; ++k) {
      if (short_rows) ask_ahead(ahead, stride, k);
      if (left >= 16) {
        SLM_TILE_LOAD(4, w + k * kTileColumns, stride);
      } else {
        stage(w + k * kTileColumns, dim, left, kTileColumns, staged);
        SLM_TILE_LOAD(4, staged, 64);
      }
      multiply<NG>(packed + k * 16 * size, group_stride, row_bytes);
    }
    if (whole * kTileColumns < dim) {
      stage(w + whole * kTileColumns, dim, left, dim - whole * kTileColumns, staged);
      SLM_TILE_LOAD(4, staged, 64);
      multiply<NG>(packed + whole * 16 * size, group_stride, row_bytes);
    }
    for (int64_t k = 0; k < more.count; ++k, more.tiles += 16 * 16) {
      SLM_TILE_LOAD(4, more.tiles, 64);
      multiply<NG>(more.packed + k * 16 * size, more.count * 16 * size, row_bytes);
    }
    if (num_t == 1) {
      SLM_TILE_STORE(0, acc + r, 4);
      continue;
    }
    float (*product)[16 * 16] = products[r / 16];
    SLM_TILE_STORE(0, product[0], 64);
    if constexpr (NG > 1) SLM_TILE_STORE(1, product[1], 64);
    if constexpr (NG > 2) SLM_TILE_STORE(2, product[2], 64);
    if constexpr (NG > 3) SLM_TILE_STORE(3, product[3], 64);
  }
  // Only now, so that no tile waits for the one before to be stored and loaded again.
  for (int64_t r = 0; r < num_r && num_t > 1; r += 16)
    for (int64_t g = 0; g < NG; ++g) unpack(products[r / 16][g], g, size, num_t, acc + r);
}

void rows(const void* w, int w_dtype, int64_t num_r, const void* h, int h_dtype, const void* packed,
          int64_t num_t, int64_t dim, const void* more_tiles, const void* more_packed, int64_t num_more,
          const void* next, float* acc) {
  if (w_dtype != 1)
    return kernels_avx512_bf16()->linear.rows(w, w_dtype, num_r, h, h_dtype, packed, num_t, dim, more_tiles,
                                              more_packed, num_more, next, acc);
  const More more{static_cast<const float*>(more_tiles), static_cast<const float*>(more_packed), num_more};
  const bf16_t* weights = static_cast<const bf16_t*>(w);
  const bf16_t* after = static_cast<const bf16_t*>(next ? next : w);
  const float* tokens = static_cast<const float*>(packed ? packed : h);
  switch (num_groups(num_t)) {
    case 1:
      return rows_of<1>(weights, num_r, tokens, num_t, dim, more, after, acc);
    case 2:
      return rows_of<2>(weights, num_r, tokens, num_t, dim, more, after, acc);
    case 3:
      return rows_of<3>(weights, num_r, tokens, num_t, dim, more, after, acc);
    default:
      return rows_of<4>(weights, num_r, tokens, num_t, dim, more, after, acc);
  }
}

Kernels make_table() {
  Kernels table = *kernels_avx512_bf16();
  table.linear.packed_bytes = packed_bytes;
  table.linear.packed_parts = packed_parts;
  table.linear.pack = pack;
  table.linear.enter = enter;
  table.linear.leave = leave;
  table.linear.augment = augment;
  table.linear.rows = rows;
  return table;
}

}  // namespace
}  // namespace SLM_ISA
}  // namespace slm

const slm::Kernels* slm::kernels_amx() {
  static const Kernels table = SLM_ISA::make_table();
  return &table;
}
