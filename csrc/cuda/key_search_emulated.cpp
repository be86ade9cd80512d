// key_search.cu on the CPU, block by block, warp by warp and lane by lane, with the same functions: what can
// be tested of the kernel where there is no GPU. Lanes that exchange values run side by side as arrays of 32.
#include <vector>

#include "key_search_plan.h"

namespace slm {
namespace {

struct Lanes {
  float of[kLanes];

  Lanes operator+(const Lanes& other) const {
    Lanes sum;
    for (int l = 0; l < kLanes; ++l) sum.of[l] = of[l] + other.of[l];
    return sum;
  }
};

struct EmulatedWarp {
  using Float = Lanes;
  static Lanes where_bit(int offset, const Lanes& set, const Lanes& clear) {
    Lanes out;
    for (int l = 0; l < kLanes; ++l) out.of[l] = l & offset ? set.of[l] : clear.of[l];
    return out;
  }
  static Lanes exchange(const Lanes& x, int offset) {
    Lanes out;
    for (int l = 0; l < kLanes; ++l) out.of[l] = x.of[l ^ offset];
    return out;
  }
};

// A top-k list and the memory behind it.
struct OwnedList {
  std::vector<float> scores;
  std::vector<int32_t> indices;

  explicit OwnedList(int64_t top_k) : scores(top_k), indices(top_k) { clear(list(), 0, 1, NoSync{}); }
  List list() { return {scores.data(), indices.data(), static_cast<int>(scores.size())}; }
};

void offer(const List& list, Entry fresh) {
  if (before(fresh, list.last())) insert(list, fresh, 0, 1, NoSync{});
}

void fold_warps(std::vector<OwnedList>& lists, int64_t queries, int64_t query) {
  const List into = lists[query].list();
  for (int i = 0; i < into.top_k; ++i)
    for (int warp = 1; warp < kWarps; ++warp) offer(into, lists[warp * queries + query].list().at(i));
}

void finish(const CudaKeySearch& op, const List& list, bool poisoned, int64_t query) {
  std::vector<float> weights(op.top_k);
  weigh(list.scores, list.top_k, op.weighting, op.temperature, op.min_similarity, weights.data(), 0, 1,
        NoSync{});
  for (int i = 0; i < list.top_k; ++i) {
    const int64_t at = query * op.top_k + i;
    op.indices[at] = poisoned ? 0 : list.indices[i];
    op.scores[at] = poisoned ? not_a_number() : list.scores[i];
    op.weights[at] = poisoned ? not_a_number() : weights[i];
  }
}

template <int kType>
bool stage(const CudaKeySearch& op, const float* query, float* row) {
  bool bad = false;
  const int64_t width = op.num_groups ? op.dim / op.num_groups : 0;
  float norm = 0.0f;
  for (int64_t d = 0; d < op.dim; ++d) {
    if (width && d % width == 0) {
      Lanes sum;
      for (int l = 0; l < kLanes; ++l) sum.of[l] = square_sum(query + d, width, l);
      norm = group_norm(sum_over_lanes<1, EmulatedWarp>(&sum).of[0]);
    }
    const float value = width ? query[d] / norm : op.shift ? query[d] - op.shift[d] : query[d];
    bad |= !is_finite(value);
    row[staged_at<kType>(d)] = value;
  }
  return bad;
}

template <int kType>
Chunk load_chunk(const CudaKeySearch& op, int64_t key, int64_t e) {
  Chunk chunk{{0, 0, 0, 0}};
  const int64_t size = 16 / kValues<kType>, count = op.dim - e < kValues<kType> ? op.dim - e : kValues<kType>;
  if (count > 0) memcpy(&chunk, static_cast<const char*>(op.keys) + (key * op.dim + e) * size, count * size);
  return chunk;
}

// sums[key * kQueries + query] of a tile, lane by lane.
template <int kType, int kQueries>
void score_tile(const CudaKeySearch& op, const float* rows, int64_t tile, int64_t end, Lanes* sums) {
  for (int i = 0; i < kTileKeys * kQueries; ++i) sums[i] = Lanes{};
  for (int64_t step = 0; step < op.row_size; step += kStep<kType>)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < kTileKeys; ++i) {
        const int64_t key = tile + i < end ? tile + i : end - 1;
        float values[kValues<kType>], x[kValues<kType>];
        unpack<kType>(load_chunk<kType>(op, key, step + lane * kValues<kType>), values);
        for (int q = 0; q < kQueries; ++q) {
          for (int j = 0; j < kValues<kType>; ++j)
            x[j] = rows[q * op.row_size + step + j / 4 * (kStep<kType> / 2) + lane * 4 + j % 4];
          float& sum = sums[i * kQueries + q].of[lane];
          sum = multiply_add<kType>(values, x, sum);
        }
      }
}

template <int kType, int kQueries>
void block(const CudaKeySearch& op, int64_t first_query, int64_t slice) {
  constexpr int kSums = kTileKeys * kQueries, kLanesPerSum = kLanes / kSums;
  std::vector<float> rows(kQueries * op.row_size);
  std::vector<bool> poisoned(kQueries);
  for (int q = 0; q < kQueries && first_query + q < op.num_queries; ++q)
    poisoned[q] = stage<kType>(op, op.query + (first_query + q) * op.dim, rows.data() + q * op.row_size);

  std::vector<OwnedList> lists(kWarps * kQueries, OwnedList(op.top_k));
  const int64_t begin = slice_begin(slice, op.slices, op.num_keys, kTileKeys);
  const int64_t end = slice_begin(slice + 1, op.slices, op.num_keys, kTileKeys);
  for (int64_t tile = begin; tile < end; tile += kTileKeys) {
    const int64_t warp = (tile - begin) / kTileKeys % kWarps;
    Lanes sums[kSums];
    score_tile<kType, kQueries>(op, rows.data(), tile, end, sums);
    const Lanes total = sum_over_lanes<kSums, EmulatedWarp>(sums);
    for (int lane = 0; lane < kLanes; lane += kLanesPerSum) {
      const int64_t key = tile + lane / kLanesPerSum / kQueries;
      const int q = lane / kLanesPerSum % kQueries;
      if (first_query + q >= op.num_queries || key >= end) continue;
      if (op.mask && !op.mask[(first_query + q) * op.mask_stride + key]) continue;
      const float score = total.of[lane] + (op.bias ? op.bias[key] : 0.0f);
      offer(lists[warp * kQueries + q].list(), {score, static_cast<int32_t>(key)});
    }
  }

  for (int q = 0; q < kQueries && first_query + q < op.num_queries; ++q) {
    fold_warps(lists, kQueries, q);
    const List list = lists[q].list();
    if (op.slices == 1) {
      finish(op, list, poisoned[q], first_query + q);
      continue;
    }
    for (int i = 0; i < list.top_k; ++i) {
      const int64_t at = ((first_query + q) * op.top_k + i) * op.slices + slice;
      op.slice_scores[at] = poisoned[q] ? not_a_number() : list.scores[i];
      op.slice_indices[at] = list.indices[i];
    }
  }
}

void merge(const CudaKeySearch& op, int64_t query) {
  std::vector<OwnedList> lists(kWarps, OwnedList(op.top_k));
  const int64_t count = op.top_k * op.slices, from = query * count;
  for (int64_t i = 0; i < count; ++i)
    offer(lists[i / kLanes % kWarps].list(), {op.slice_scores[from + i], op.slice_indices[from + i]});
  fold_warps(lists, 1, 0);
  const float first = op.slice_scores[from];
  finish(op, lists[0].list(), first != first, query);
}

template <int kType>
void grid(const CudaKeySearch& op) {
  for (int64_t slice = 0; slice < op.slices; ++slice)
    for (int64_t query = 0; query < op.num_queries; query += op.queries) {
      if (op.queries == 1) block<kType, 1>(op, query, slice);
      if (op.queries == 2) block<kType, 2>(op, query, slice);
      if (op.queries == 4) block<kType, 4>(op, query, slice);
      if (op.queries == 8) block<kType, 8>(op, query, slice);
    }
}

}  // namespace

void key_search_emulated(const CudaKeySearch& op) {
  check_plan(op);
  if (op.key_dtype == DType::f32) grid<0>(op);
  if (op.key_dtype == DType::bf16) grid<1>(op);
  if (op.key_dtype == DType::f16) grid<2>(op);
  for (int64_t query = 0; op.slices > 1 && query < op.num_queries; ++query) merge(op, query);
}

}  // namespace slm
