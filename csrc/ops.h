// The extension's ops on raw pointers. slm_fast/reference.py is the specification of what each one computes.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "key_search_math.h"

namespace slm {

inline int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }

struct KeySearch {
  const float* query;  // [num_queries, dim]
  const void* keys;    // [num_keys, dim]
  DType key_dtype;
  const float* bias;    // [num_keys] or null
  const uint8_t* mask;  // nonzero = allowed, or null
  int64_t mask_stride;  // 0: one mask for all queries
  int64_t num_queries, num_keys, dim, top_k;
  Weighting weighting;
  float temperature, min_similarity;
  int32_t* indices;  // [num_queries, top_k]
  float* weights;
  float* scores;
  const uint8_t* codes = nullptr;  // of the keys, see key_codes; or null
  const float* bounds = nullptr;
};

// What only the CUDA search takes: the transform of the query, done inside (at most one of the two), and the
// launch, as slm_fast/cuda_search.py plans it.
struct CudaKeySearch : KeySearch {
  const float* shift;  // [dim] or null
  int num_groups;      // 0: none
  bool wide;           // 16-byte loads of the keys
  bool staged;         // queries fit in shared memory; otherwise they are transformed already
  int queries;         // of a block
  int64_t slices;
  int row_size;  // floats of a staged query
  int64_t shared_bytes;
  int32_t* slice_indices;  // [num_queries, top_k, slices] for several slices
  float* slice_scores;
};

// The slabs and the routing that forward and backward share.
struct Mixture {
  DType x_dtype, factor_dtype;
  const void* A;         // [total_rank, in_features]
  const void* B;         // [total_rank, out_features]
  const int32_t* start;  // [num_entries]
  const int32_t* rank;
  const float* scaling;
  int64_t num_entries, total_rank;
  const int32_t* indices;     // [num_rows, top_k]
  const float* weights;       // [num_rows, top_k]
  const int32_t* cu_seqlens;  // [num_rows + 1], or null: num_tokens / num_rows tokens each
  int64_t num_tokens, num_rows, top_k, in_features, out_features;
  int64_t u_stride;  // top_k * the columns of one pick in u; 0 without u

  int64_t token_begin(int64_t row) const {
    return cu_seqlens ? cu_seqlens[row] : (num_rows ? num_tokens / num_rows * row : 0);
  }
  int64_t columns_of_pick() const { return top_k ? u_stride / top_k : 0; }
};

// Throw std::invalid_argument on arguments that would read or write out of bounds, and on non-finite queries.
void key_search(const KeySearch& op, int num_threads);
// Whether it is so little work that one thread does it whatever num_threads is.
bool searches_alone(const KeySearch& op);
// Quantises the keys `rows` [num_rows], or all; slm_fast/reference.py has the layout of codes and bounds.
void key_codes(const void* keys, DType key_dtype, int64_t num_keys, int64_t dim, const int64_t* rows,
               int64_t num_rows, uint8_t* codes, float* bounds, int num_threads);
// The CUDA kernel's arithmetic lane by lane on the CPU, for tests.
void key_search_emulated(const CudaKeySearch& op);
void mixture_forward(const Mixture& op, const void* x, void* y, float* u, int num_threads);
// dA and dB cover the slab rows owned_begin:owned_end. dw of a weight that is 0 is 0: its u was never
// computed.
void mixture_backward(const Mixture& op, const void* dy, const void* x, const float* u, void* dx, float* dA,
                      float* dB, int64_t owned_begin, int64_t owned_end, float* dw, int num_threads);

// Reads every region of (address, bytes) once, in whole pieces of 16 KiB, shared out among threads. Returns
// the bitwise or of what it read.
uint64_t read_memory(const std::vector<std::pair<const void*, int64_t>>& regions, int num_threads);

std::string isa();
std::vector<std::string> isa_supported();

struct CudaDevice {
  std::string name;
  int major, minor;
  uint64_t total_bytes;
};
// Both throw std::runtime_error with CUDA's message. `stream` is a cudaStream_t of `device`.
std::vector<CudaDevice> cuda_devices();
void key_search_cuda(const CudaKeySearch& op, int device, void* stream);

}  // namespace slm
