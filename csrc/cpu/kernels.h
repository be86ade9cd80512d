// The micro-kernels that are compiled once per instruction set. Raw pointers only: no std:: code may be
// instantiated in those translation units, or the linker could hand its AVX-512 copy to everyone.
#pragma once

#include <stdint.h>

namespace slm {

constexpr int64_t kBlock = 128;  // columns of one packed panel and of one axpy call

constexpr int64_t kReadPiece = 16 * 1024;
constexpr int64_t kRowsOfBlock = 64;  // rows of a weight that `LinearKernels::rows` multiplies at once
constexpr int64_t kMostTokens = 64;   // tokens that share one pass over the weights
constexpr int64_t kDenseRow = 16;     // tokens of a row whose mixture is worth tile products
constexpr int64_t kRowsOfTile = 16;   // weights are shared out among threads in multiples of this

// The stages of a linear group (linear_group.h). h is what the linears read: after the prologue, rounded to
// the weights' dtype, [num_t, dim]. h32 is the same in fp32.
struct LinearKernels {
  int multiplies_bf16;  // `rows` and `shrink` take bf16 h for bf16 weights and factors; otherwise they take
                        // h32

  // One token, or a part of one without rms_norm. h and h32 may each be null.
  void (*widen)(const void* x, int dtype, int64_t n, float* h32);
  void (*rms_norm)(const void* x, const void* weight, int dtype, float eps, int64_t n, void* h, float* h32);
  void (*silu_mul)(const void* gate, const void* up, int dtype, int64_t n, void* h, float* h32);

  // AMX only, else null: the layout that `rows` reads bf16 tokens from, written in parts (begin:end of
  // packed_parts(dim)), and what a thread does before its first and after its last call of `rows`.
  int64_t (*packed_bytes)(int64_t num_t, int64_t dim);
  int64_t (*packed_parts)(int64_t dim);
  void (*pack)(const void* h, int64_t num_t, int64_t dim, int64_t begin, int64_t end, void* packed);
  void (*enter)(int64_t num_t);
  void (*leave)();
  // Columns begin : begin + width of B's rows `rows` (-1: zeros), a multiple of 32 of them, as further
  // columns of the weights' tiles: [width / 16, rounded up][num_rows / 32][16][32] bf16.
  void (*augment)(const void* B, int64_t stride, const int64_t* rows, int64_t num_rows, int64_t begin,
                  int64_t width, void* tiles);

  // acc[t * kRowsOfBlock + r] = <w[r], h[t]> for num_r <= kRowsOfBlock rows and num_t <= kMostTokens tokens.
  // `next` is the memory that the thread will read after these rows. AMX only: plus the product of num_more
  // further tiles a row tile, from `augment`, with more_packed, from `pack`.
  void (*rows)(const void* w, int w_dtype, int64_t num_r, const void* h, int h_dtype, const void* packed,
               int64_t num_t, int64_t dim, const void* more, const void* more_packed, int64_t num_more,
               const void* next, float* acc);

  // u[m * num_j + j] = coef[m] * <A[j], h[tokens[m]]>
  void (*shrink)(const void* h, int h_dtype, const int32_t* tokens, const float* coef, int64_t num_m,
                 const void* A, int a_dtype, int64_t num_j, int64_t u_stride, int64_t dim, const void* next,
                 float* u);

  // For the num_m tokens of one entry, t = tokens[m], all different:
  // mix[t, :width] = (adds[m] ? mix[t, :width] : 0) + sum_j u[m * num_j + j] * B[j * stride : j * stride +
  // width]
  void (*expand)(const float* u, int64_t num_j, const int32_t* tokens, const uint8_t* adds, int64_t num_m,
                 const void* B, int b_dtype, int64_t stride, int64_t width, const void* next, float* mix,
                 int64_t mix_stride);

  // y[t, :width] = acc[t * kRowsOfBlock, :width] + bias + (mixed[t] ? mix[t] : nothing) + residual[t],
  // rounded once. bias, mixed and residual may be null; residual has y's stride.
  void (*finish)(const float* acc, int64_t num_t, int64_t width, const void* bias, const uint8_t* mixed,
                 const float* mix, int64_t mix_stride, const void* residual, int dtype, int64_t y_stride,
                 void* y);

  // One head in place: the halves of x are turned by the angles, see Rotation.
  void (*rotate)(void* x, const void* cos, const void* sin, int dtype, int64_t head_size);
};

// The layout of quantised keys, reference.KeyCodes: codes [blocks][steps of 8 dims][2][kCodeKeys][4], bounds
// [blocks][kCodeBounds][kCodeKeys]. A search takes them kCodeChunk keys and kCodeQueries queries at a time.
constexpr int64_t kCodeKeys = 32, kCodeBounds = 3, kCodeChunk = 1024, kCodeQueries = 16;
constexpr int64_t kMostPicks = 64;
// Of a query and of a key with a bound: their products neither overflow nor lose subnormals.
constexpr float kLeastNorm = 0x1p-30f, kMostNorm = 0x1p50f;

// Rows of a slab that are read next: row i is `bytes` long, at rows[i] * bytes.
struct SlabRows {
  const char* slab;
  const int64_t* rows;
  int64_t num, bytes;
};

struct Kernels {
  // out[t * out_stride + cols[j]] = <x[t], f[rows[j]]> over `dim`; x and f are contiguous rows of `dim`.
  // scratch: (4 + num_j) * dim floats, rounded up to 64 bytes each row of `pad(dim)`.
  void (*dot)(const void* x, int x_dtype, int64_t num_t, const void* f, int f_dtype, const int64_t* rows,
              const int64_t* cols, int64_t num_j, int64_t dim, float* out, int64_t out_stride,
              float* scratch);

  // dst[n][kBlock] = fp32 of src[rows ? rows[n] : n][col : col + width], zero beyond `width`.
  void (*pack)(const void* src, int dtype, const int64_t* rows, int64_t num_n, int64_t stride, int64_t col,
               int64_t width, float* dst);

  // y[m, :width] = (add ? y[m, :width] : 0) + sum_n s[m * sm + n * sn] * f[n][:width], summed in the order of
  // n.
  void (*axpy)(const float* s, int64_t sm, int64_t sn, int64_t num_m, int64_t num_n, const float* f, void* y,
               int y_dtype, int64_t y_stride, int64_t width, int add);

  // `dot` of one token, to the same bits, which asks for the same rows of the slab `next`, of `next_bytes`
  // each, on the way. scratch: pad(dim).
  void (*dot_one)(const void* x, int x_dtype, const void* f, int f_dtype, const int64_t* rows,
                  const int64_t* cols, int64_t num_j, int64_t dim, const char* next, int64_t next_bytes,
                  float* out, float* scratch);

  // y[begin:end] = (add ? y[begin:end] : 0) + sum_n s[n] f[rows[n]][begin:end], to the bits of `axpy`;
  // asks for the rows of `next` on the way.
  void (*axpy_one)(const float* s, int64_t num_n, const void* f, int f_dtype, const int64_t* rows,
                   int64_t dim, int64_t begin, int64_t end, const SlabRows& next, void* y, int y_dtype,
                   int add);

  // Merge the keys begin:end, in order, into the running top-k lists (scores [num_q, k] sorted, indices
  // [num_q, k]).
  void (*search)(const float* query, int64_t num_q, int64_t dim, const void* keys, int key_dtype,
                 int64_t begin, int64_t end, const float* bias, const uint8_t* mask, int64_t mask_stride,
                 int64_t top_k, float* scores, int32_t* indices);

  // The same lists by way of the keys' codes and bounds; num_q <= kCodeQueries, top_k <= kMostPicks, `begin`
  // a multiple of kCodeKeys. row: [8][steps], words: [num_q][steps][2], both scratch.
  void (*search_codes)(const float* query, int64_t num_q, int64_t dim, const void* keys, int key_dtype,
                       const uint8_t* codes, const float* bounds, int64_t begin, int64_t end,
                       const float* bias, const uint8_t* mask, int64_t mask_stride, int64_t top_k, float* row,
                       uint32_t* words, float* scores, int32_t* indices);

  // The bitwise or of `bytes` bytes, a multiple of kReadPiece.
  uint64_t (*read)(const char* begin, int64_t bytes);

  LinearKernels linear;
};

static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

const Kernels* kernels_baseline();
#ifdef SLM_X86
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
#ifdef SLM_AMX
const Kernels* kernels_amx();
#endif
#endif

}  // namespace slm
