// The micro-kernels that are compiled once per instruction set. Raw pointers only: no std:: code may be
// instantiated in those translation units, or the linker could hand its AVX-512 copy to everyone.
#pragma once

#include <stdint.h>

namespace slm {

constexpr int64_t kBlock = 128;  // columns of one packed panel and of one axpy call

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

  // Merge the keys begin:end, in order, into the running top-k lists (scores [num_q, k] sorted, indices
  // [num_q, k]).
  void (*search)(const float* query, int64_t num_q, int64_t dim, const void* keys, int key_dtype,
                 int64_t begin, int64_t end, const float* bias, const uint8_t* mask, int64_t mask_stride,
                 int64_t top_k, float* scores, int32_t* indices);
};

static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

const Kernels* kernels_baseline();
#ifdef SLM_X86
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
#endif

}  // namespace slm
