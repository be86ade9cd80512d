// Key search on CUDA: transform of the query, inner products, bias, mask, top-k and weights in one pass over
// the keys; [num_queries, num_keys] scores exist nowhere.
//
// Bytes: num_keys * dim * size once for up to 8 queries, plus 4 a key for the bias and 1 for the mask.
// 1,000,000 keys of 768 bf16 are 1.536 GB: at least 0.46 ms at an H100's 3.35 TB/s, 0.32 ms at an H200's 4.8
// TB/s. Expected, not measured: 85-95% of copy bandwidth for one query. Each SM of an H100 then needs about
// 20 KB of loads in flight (3 TB/s times 0.8 us over 132 SMs). Every warp keeps the next 4 x 512 bytes on
// their way while it multiplies: 64 KB with two blocks on an SM (one query), 32 KB with one (2 to 8 queries).
// In the time of 2 KB an SM issues 630 instructions at 3 TB/s (430 at an H200's 4.4); 2 KB of bf16 cost 167
// with one query, 264 with four and 406 with eight, where an H200 may be bound by them.
//
// Grid: (groups of kQueries queries, slices of the keys): the groups of a slice run side by side and share
// its keys through L2. A warp scores 4 keys at once. Its lists live in shared memory; they change rarely
// (about k ln(n / k) times for n keys), so an entry that beats the last one is inserted by the whole warp.
// One slice: the block finishes the weights. Several: each leaves its lists [num_queries, top_k, slices] and
// the merge kernel ends the work. Who computed a score and when shows nowhere: the order of a sum is fixed
// and the picks follow a total order.
//
// Compiled by nvcc or, without the launcher, by NVRTC through CuPy (slm_fast/cuda_search.py, which also
// plans).
#include "../key_search_math.h"
#ifndef __CUDACC_RTC__
#include "check.h"
#include "key_search_plan.h"
#endif

namespace slm {

struct WarpSync {
  __device__ void operator()() const { __syncwarp(); }
};

__device__ inline int lane_id() { return threadIdx.x % kLanes; }
__device__ inline int warp_id() { return threadIdx.x / kLanes; }

struct DeviceWarp {
  using Float = float;
  static __device__ float where_bit(int offset, float set, float clear) {
    return lane_id() & offset ? set : clear;
  }
  static __device__ float exchange(float x, int offset) { return __shfl_xor_sync(~0u, x, offset); }
};

// The lists of all warps and queries of a block.
struct BlockLists {
  float* scores;  // [kWarps, queries, top_k], followed by the indices
  int queries, top_k;

  __device__ List of(int warp, int query) const {
    const int at = (warp * queries + query) * top_k;
    return {scores + at, reinterpret_cast<int32_t*>(scores + kWarps * queries * top_k) + at, top_k};
  }
};

// Every lane offers an entry to this warp's list of `query`; those that beat its last entry go in.
__device__ inline void offer(const BlockLists& lists, int warp, int query, Entry fresh, bool offered) {
  unsigned pending = __ballot_sync(~0u, offered && before(fresh, lists.of(warp, query).last()));
  while (pending) {
    const int source = __ffs(pending) - 1;
    pending &= pending - 1;
    const Entry entry{__shfl_sync(~0u, fresh.score, source), __shfl_sync(~0u, fresh.index, source)};
    insert(lists.of(warp, __shfl_sync(~0u, query, source)), entry, lane_id(), kLanes, WarpSync{});
  }
}

// Fold the other warps' lists of a query into warp 0's, the best entries of all of them first.
__device__ inline void fold_warps(const BlockLists& lists, int query) {
  const int count = (kWarps - 1) * lists.top_k;
  SLM_ROLLED
  for (int base = 0; base < count; base += kLanes) {
    const int i = base + lane_id();
    const bool exists = i < count;
    const Entry entry =
        exists ? lists.of(1 + i % (kWarps - 1), query).at(i / (kWarps - 1)) : Entry{minus_infinity(), 0};
    offer(lists, 0, query, entry, exists);
  }
}

// Weigh the list of a query and write it out; the weights pass through warp 1's list, which is no longer
// needed.
__device__ inline void finish(const BlockLists& lists, int query, bool poisoned, int weighting,
                              float temperature, float min_similarity, int32_t* indices, float* weights,
                              float* scores) {
  const List list = lists.of(0, query);
  float* const w = lists.of(1, query).scores;
  weigh(list.scores, list.top_k, static_cast<Weighting>(weighting), temperature, min_similarity, w, lane_id(),
        kLanes, WarpSync{});
  __syncwarp();
  SLM_ROLLED
  for (int i = lane_id(); i < list.top_k; i += kLanes) {
    indices[i] = poisoned ? 0 : list.indices[i];
    scores[i] = poisoned ? not_a_number() : list.scores[i];
    weights[i] = poisoned ? not_a_number() : w[i];
  }
}

// Write phi(query) into `row`, laid out as staged_at and padded with zeros; returns, to all threads, whether
// a value is not finite.
template <int kType>
__device__ inline bool stage(const float* query, const float* shift, int num_groups, int64_t dim,
                             int row_size, float* row) {
  bool bad = false;
  if (num_groups > 0) {
    const int64_t width = dim / num_groups;
    SLM_ROLLED
    for (int64_t g = warp_id(); g < num_groups; g += kWarps) {
      const float* const x = query + g * width;
      float sum = square_sum(x, width, lane_id());
      const float norm = group_norm(sum_over_lanes<1, DeviceWarp>(&sum));
      SLM_ROLLED
      for (int64_t i = lane_id(); i < width; i += kLanes) {
        const float value = x[i] / norm;
        bad |= !is_finite(value);
        row[staged_at<kType>(g * width + i)] = value;
      }
    }
  } else {
    SLM_ROLLED
    for (int64_t d = threadIdx.x; d < dim; d += kThreads) {
      const float value = shift ? query[d] - shift[d] : query[d];
      bad |= !is_finite(value);
      row[staged_at<kType>(d)] = value;
    }
  }
  SLM_ROLLED
  for (int64_t d = dim + threadIdx.x; d < row_size; d += kThreads) row[staged_at<kType>(d)] = 0.0f;
  return __syncthreads_or(bad);
}

// The chunk of a key that starts at element e; kWide promises 16-byte alignment and dim % kValues == 0.
template <int kType, bool kWide>
__device__ inline Chunk load_chunk(const void* keys, int64_t key, int64_t dim, int64_t e) {
  Chunk chunk{{0, 0, 0, 0}};
  const int64_t at = key * dim + e;
  if (kWide) {
    if (e < dim) {
      const uint4 word =
          __ldg(reinterpret_cast<const uint4*>(static_cast<const char*>(keys) + at * (16 / kValues<kType>)));
      chunk = {{word.x, word.y, word.z, word.w}};
    }
  } else if (kType == static_cast<int>(DType::f32)) {
    SLM_UNROLL
    for (int i = 0; i < 4; ++i)
      if (e + i < dim) chunk.word[i] = __ldg(static_cast<const uint32_t*>(keys) + at + i);
  } else {
    SLM_UNROLL
    for (int i = 0; i < 8; ++i)
      if (e + i < dim)
        chunk.word[i / 2] |= static_cast<uint32_t>(__ldg(static_cast<const uint16_t*>(keys) + at + i))
                             << 16 * (i % 2);
  }
  return chunk;
}

// A lane's values of one step of a query. `row` is staged; or, in the narrow kernel, the transformed query
// itself.
template <int kType, bool kWide>
__device__ inline void load_query(const float* row, bool staged, int64_t dim, int64_t step, float* values) {
  if (kWide || staged) {
    SLM_UNROLL
    for (int half = 0; half < kValues<kType> / 4; ++half) {
      const float4 v =
          *reinterpret_cast<const float4*>(row + step + half * (kStep<kType> / 2) + lane_id() * 4);
      values[4 * half] = v.x;
      values[4 * half + 1] = v.y;
      values[4 * half + 2] = v.z;
      values[4 * half + 3] = v.w;
    }
  } else {
    const int64_t e = step + lane_id() * kValues<kType>;
    SLM_UNROLL
    for (int i = 0; i < kValues<kType>; ++i) values[i] = e + i < dim ? __ldg(row + e + i) : 0.0f;
  }
}

// gridDim.y == 1: indices, weights and scores are the outputs. Otherwise indices and scores are the lists of
// the slices. staged == 0 (narrow kernel): `query` is transformed already and too long for shared memory.
template <int kType, int kQueries, bool kWide>
__global__ void __launch_bounds__(kThreads, kWide&& kQueries == 1 ? 2 : 1)
    key_search_kernel(const float* query, const void* keys, const float* bias, const uint8_t* mask,
                      int64_t mask_stride, const float* shift, int num_groups, int staged, int row_size,
                      int64_t num_queries, int64_t num_keys, int64_t dim, int top_k, int weighting,
                      float temperature, float min_similarity, int32_t* indices, float* weights,
                      float* scores) {
  extern __shared__ float4 shared[];
  constexpr int kSums = kTileKeys * kQueries;
  constexpr int kLanesPerSum = kLanes / kSums;
  float* const rows = reinterpret_cast<float*>(shared);  // [kQueries, row_size]
  const BlockLists lists{rows + (kWide || staged ? kQueries * row_size : 0), kQueries, top_k};
  const int64_t first_query = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int lane = lane_id(), warp = warp_id();

  unsigned poisoned = 0;  // bit q: query q is not finite
  SLM_ROLLED
  for (int q = 0; q < kQueries; ++q) {
    clear(lists.of(warp, q), lane, kLanes, WarpSync{});
    const bool exists = first_query + q < num_queries;
    const float* const x = query + (exists ? first_query + q : 0) * dim;
    bool bad = false;
    if (kWide || staged) {
      bad = stage<kType>(x, shift, exists ? num_groups : 0, exists ? dim : 0, row_size, rows + q * row_size);
    } else {
      SLM_ROLLED
      for (int64_t d = threadIdx.x; d < dim; d += kThreads) bad |= !is_finite(x[d]);
      bad = __syncthreads_or(bad);
    }
    poisoned |= static_cast<unsigned>(bad) << q;
  }
  const float* const row = kWide || staged ? rows : query + first_query * dim;

  const int64_t end = slice_begin(blockIdx.y + 1, gridDim.y, num_keys, kTileKeys);
  int64_t tile = slice_begin(blockIdx.y, gridDim.y, num_keys, kTileKeys) + warp * kTileKeys;
  // The key and the query whose sum this lane receives.
  const int own_key = lane / kLanesPerSum / kQueries, own_query = lane / kLanesPerSum % kQueries;
  const bool receives = lane % kLanesPerSum == 0 && first_query + own_query < num_queries;

  Chunk now[kTileKeys], next[kTileKeys];
  const auto fetch = [&](int64_t at, int64_t step) {
    if (at >= end) return;
    SLM_UNROLL
    for (int i = 0; i < kTileKeys; ++i)
      next[i] =
          load_chunk<kType, kWide>(keys, at + i < end ? at + i : end - 1, dim, step + lane * kValues<kType>);
  };
  fetch(tile, 0);
  for (; tile < end; tile += kWarps * kTileKeys) {
    const int64_t key = tile + own_key;
    const bool exists = receives && key < end;
    const float own_bias = exists && bias ? bias[key] : 0.0f;
    const bool allowed = exists && (!mask || mask[(first_query + own_query) * mask_stride + key]);
    float sums[kSums];
    SLM_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    for (int step = 0; step < row_size; step += kStep<kType>) {
      SLM_UNROLL
      for (int i = 0; i < kTileKeys; ++i) now[i] = next[i];
      // The next tile's first chunks are asked for before this tile's sums are known.
      const bool more = step + kStep<kType> < row_size;
      fetch(more ? tile : tile + kWarps * kTileKeys, more ? step + kStep<kType> : 0);
      float values[kTileKeys][kValues<kType>];
      SLM_UNROLL
      for (int i = 0; i < kTileKeys; ++i) unpack<kType>(now[i], values[i]);
      SLM_UNROLL
      for (int q = 0; q < kQueries; ++q) {
        float x[kValues<kType>];
        load_query<kType, kWide>(row + q * row_size, staged, dim, step, x);
        SLM_UNROLL
        for (int i = 0; i < kTileKeys; ++i)
          sums[i * kQueries + q] = multiply_add<kType>(values[i], x, sums[i * kQueries + q]);
      }
    }
    const float score = sum_over_lanes<kSums, DeviceWarp>(sums) + own_bias;
    offer(lists, warp, own_query, {score, static_cast<int32_t>(key)}, allowed);
  }

  __syncthreads();
  const int64_t q = first_query + warp;
  if (warp >= kQueries || q >= num_queries) return;
  fold_warps(lists, warp);
  const bool bad = poisoned >> warp & 1;
  if (gridDim.y == 1) {
    const int64_t at = q * top_k;
    finish(lists, warp, bad, weighting, temperature, min_similarity, indices + at, weights + at, scores + at);
    return;
  }
  const List list = lists.of(0, warp);
  SLM_ROLLED
  for (int i = lane; i < top_k; i += kLanes) {
    const int64_t at = (q * top_k + i) * gridDim.y + blockIdx.y;
    scores[at] = bad ? not_a_number() : list.scores[i];
    indices[at] = list.indices[i];
  }
}

// One block a query: its slices' lists [top_k, slices], the best entries of all slices first. A query that is
// not finite left NaN scores.
__global__ void __launch_bounds__(kThreads)
    key_search_merge_kernel(const int32_t* slice_indices, const float* slice_scores, int slices, int top_k,
                            int weighting, float temperature, float min_similarity, int32_t* indices,
                            float* weights, float* scores) {
  extern __shared__ float4 shared[];
  const BlockLists lists{reinterpret_cast<float*>(shared), 1, top_k};
  const int warp = warp_id(), count = top_k * slices;
  const int64_t from = static_cast<int64_t>(blockIdx.x) * count,
                to = static_cast<int64_t>(blockIdx.x) * top_k;
  clear(lists.of(warp, 0), lane_id(), kLanes, WarpSync{});
  SLM_ROLLED
  for (int base = warp * kLanes; base < count; base += kThreads) {
    const int i = base + lane_id();
    const bool exists = i < count;
    const Entry entry =
        exists ? Entry{slice_scores[from + i], slice_indices[from + i]} : Entry{minus_infinity(), 0};
    offer(lists, warp, 0, entry, exists);
  }
  __syncthreads();
  if (warp > 0) return;
  fold_warps(lists, 0);
  const float first = slice_scores[from];
  finish(lists, 0, first != first, weighting, temperature, min_similarity, indices + to, weights + to,
         scores + to);
}

#ifndef __CUDACC_RTC__
using Kernel = decltype(&key_search_kernel<0, 1, true>);

template <int kType>
Kernel kernel_of(const CudaKeySearch& op) {
  if (!op.wide) return key_search_kernel<kType, 1, false>;
  if (op.queries == 1) return key_search_kernel<kType, 1, true>;
  if (op.queries == 2) return key_search_kernel<kType, 2, true>;
  if (op.queries == 4) return key_search_kernel<kType, 4, true>;
  return key_search_kernel<kType, 8, true>;
}

void key_search_cuda(const CudaKeySearch& op, int device, void* stream_pointer) {
  check_plan(op);
  if (op.num_queries == 0) return;
  check(cudaSetDevice(device));
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const Kernel kernel = op.key_dtype == DType::f32    ? kernel_of<0>(op)
                        : op.key_dtype == DType::bf16 ? kernel_of<1>(op)
                                                      : kernel_of<2>(op);
  const int shared = static_cast<int>(op.shared_bytes), top_k = static_cast<int>(op.top_k);
  if (shared > 48 * 1024)  // what a kernel gets without asking
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  const dim3 grid(static_cast<unsigned>((op.num_queries + op.queries - 1) / op.queries),
                  static_cast<unsigned>(op.slices));
  const int weighting = static_cast<int>(op.weighting);
  const bool merge = op.slices > 1;
  kernel<<<grid, kThreads, shared, stream>>>(
      op.query, op.keys, op.bias, op.mask, op.mask_stride, op.shift, op.num_groups, op.staged, op.row_size,
      op.num_queries, op.num_keys, op.dim, top_k, weighting, op.temperature, op.min_similarity,
      merge ? op.slice_indices : op.indices, op.weights, merge ? op.slice_scores : op.scores);
  check(cudaGetLastError());
  if (!merge) return;
  key_search_merge_kernel<<<static_cast<unsigned>(op.num_queries), kThreads, list_bytes(1, top_k), stream>>>(
      op.slice_indices, op.slice_scores, static_cast<int>(op.slices), top_k, weighting, op.temperature,
      op.min_similarity, op.indices, op.weights, op.scores);
  check(cudaGetLastError());
}
#endif

}  // namespace slm
