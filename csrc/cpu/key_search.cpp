// One pass over the keys: each block of 16 meets every query of a group before it leaves the cache, and only
// the running top-k lists are kept. Bytes: num_keys * dim once per 64 queries. Slices of keys go to threads;
// their lists are merged under the total order (score descending, index ascending), so the cut does not show
// in the result. With codes of the keys, 16 queries share a pass over those instead: num_keys * dim bytes.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../ops.h"
#include "isa.h"
#include "parallel.h"

namespace slm {
namespace {

constexpr int64_t kBlockKeys = 16;
constexpr int64_t kQueries = 64;  // queries of one group: 64 x 768 fp32 stay in L2
// Multiply-adds that are worth a thread. One query by 1,000 keys of 384: 27 us for 34 on one thread, by their
// codes 11.5 for 12.8; by 2,000 keys' codes 16.8 for 20.5, by 500 keys' 9.2 for 9.2.
constexpr int64_t kThreadWork = 150000;

bool all_finite(const float* x, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !is_finite(x[i]);
  return bad == 0;
}

struct Lists {
  float* scores;
  int32_t* indices;
};

void search_keys(const KeySearch& op, int64_t q, int64_t num_q, int64_t begin, int64_t end, Lists lists) {
  kernels().search(op.query + q * op.dim, num_q, op.dim, op.keys, static_cast<int>(op.key_dtype), begin, end,
                   op.bias, op.mask ? op.mask + q * op.mask_stride : nullptr, op.mask_stride, op.top_k,
                   lists.scores + q * op.top_k, lists.indices + q * op.top_k);
}

void search_codes(const KeySearch& op, int64_t q, int64_t num_q, int64_t begin, int64_t end, Lists lists) {
  const int64_t steps = (op.dim + 7) / 8;
  const std::unique_ptr<uint32_t[]> words(new uint32_t[num_q * 2 * steps]);
  const std::unique_ptr<float[]> row(op.dim % 8 ? new float[8 * steps] : nullptr);
  kernels().search_codes(op.query + q * op.dim, num_q, op.dim, op.keys, static_cast<int>(op.key_dtype),
                         op.codes, op.bounds, begin, end, op.bias,
                         op.mask ? op.mask + q * op.mask_stride : nullptr, op.mask_stride, op.top_k,
                         row.get(), words.get(), lists.scores + q * op.top_k, lists.indices + q * op.top_k);
}

bool is_coded(const KeySearch& op) { return op.codes && op.top_k <= kMostPicks; }

int64_t work_of(const KeySearch& op) { return op.num_queries * op.num_keys * op.dim; }

}  // namespace

bool searches_alone(const KeySearch& op) { return work_of(op) < 2 * kThreadWork; }

void key_search(const KeySearch& op, int num_threads) {
  if (!all_finite(op.query, op.num_queries * op.dim))
    throw std::invalid_argument("query must be finite, got NaN or infinite values");
  const bool coded = is_coded(op);
  const int64_t queries = coded ? kCodeQueries : kQueries, block = coded ? kCodeKeys : kBlockKeys;
  const int64_t groups = (op.num_queries + queries - 1) / queries;
  const int threads = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(num_threads, work_of(op) / kThreadWork)));
  const int64_t blocks = (op.num_keys + block - 1) / block;
  const int64_t slices = groups >= threads ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads, blocks));

  // List 0 is the output itself.
  const int64_t list = op.num_queries * op.top_k;
  std::vector<float> more_scores((slices - 1) * list, minus_infinity());
  std::vector<int32_t> more_indices((slices - 1) * list, 0);
  std::fill_n(op.scores, list, minus_infinity());
  std::fill_n(op.indices, list, 0);

  parallel_for(groups * slices, threads, [&](int64_t chunk) {
    const int64_t q = chunk / slices * queries, slice = chunk % slices;
    const Lists lists =
        slice ? Lists{more_scores.data() + (slice - 1) * list, more_indices.data() + (slice - 1) * list}
              : Lists{op.scores, op.indices};
    const auto search = coded ? search_codes : search_keys;
    search(op, q, std::min(queries, op.num_queries - q), slice_begin(slice, slices, op.num_keys, block),
           slice_begin(slice + 1, slices, op.num_keys, block), lists);
  });

  for (int64_t q = 0; q < op.num_queries; ++q) {
    const List best{op.scores + q * op.top_k, op.indices + q * op.top_k, static_cast<int>(op.top_k)};
    for (int64_t slice = 1; slice < slices; ++slice) {
      const int64_t at = (slice - 1) * list + q * op.top_k;
      const List other{more_scores.data() + at, more_indices.data() + at, best.top_k};
      for (int i = 0; i < best.top_k && before(other.at(i), best.last()); ++i)
        insert(best, other.at(i), 0, 1, NoSync{});
    }
    weigh(best.scores, best.top_k, op.weighting, op.temperature, op.min_similarity, op.weights + q * op.top_k,
          0, 1, NoSync{});
  }
}

}  // namespace slm
