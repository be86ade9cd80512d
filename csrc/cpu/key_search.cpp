// One pass over the keys: each block of 16 meets every query of a group before it leaves the cache, and only
// the running top-k lists are kept. Bytes: num_keys * dim once per 64 queries. Slices of keys go to threads;
// their lists are merged under the total order (score descending, index ascending), so the cut does not show
// in the result.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../ops.h"
#include "isa.h"
#include "parallel.h"

namespace slm {
namespace {

constexpr int64_t kQueries = 64;  // queries of one group: 64 x 768 fp32 stay in L2
// Below this many multiply-adds one thread is done sooner: 1,000 keys of 384 take 34 us on one, 21 us on two.
constexpr int64_t kSerialWork = 300000;
constexpr float kMissing = -std::numeric_limits<float>::infinity();

bool all_finite(const float* x, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bad |= (bits & 0x7f800000) == 0x7f800000;
  }
  return bad == 0;
}

// Fold a later slice's list into an earlier one's: equal scores keep the earlier slice's lower index.
void merge(const float* scores, const int32_t* indices, int64_t top_k, float* into, int32_t* into_indices) {
  for (int64_t i = 0; i < top_k && scores[i] > into[top_k - 1]; ++i) {
    int64_t pos = top_k - 1;
    for (; pos > 0 && into[pos - 1] < scores[i]; --pos) {
      into[pos] = into[pos - 1];
      into_indices[pos] = into_indices[pos - 1];
    }
    into[pos] = scores[i];
    into_indices[pos] = indices[i];
  }
}

void uniform(int64_t count, float* w) {
  for (int64_t k = 0; k < count; ++k) w[k] = 1.0f / static_cast<float>(count);
}

void weigh(const KeySearch& op, const float* scores, float* w) {
  int64_t count = 0;
  while (count < op.top_k && scores[count] > kMissing) ++count;
  std::fill_n(w, op.top_k, 0.0f);
  if (count == 0 || scores[0] < op.min_similarity) return;
  if (op.weighting == Weighting::uniform) return uniform(count, w);
  float total = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    w[k] = op.weighting == Weighting::softmax ? std::exp((scores[k] - scores[0]) / op.temperature)
                                              : std::max(scores[k], 0.0f);
    total += w[k];
  }
  if (op.weighting == Weighting::similarity && total < 1e-6f) return uniform(count, w);
  for (int64_t k = 0; k < count; ++k) w[k] /= total;
}

}  // namespace

void key_search(const KeySearch& op, int num_threads) {
  if (!all_finite(op.query, op.num_queries * op.dim))
    throw std::invalid_argument("query must be finite, got NaN or infinite values");
  const int64_t groups = (op.num_queries + kQueries - 1) / kQueries;
  const int64_t work = op.num_queries * op.num_keys * op.dim;
  const int threads = work < kSerialWork ? 1 : num_threads;
  const int64_t blocks = (op.num_keys + 15) / 16;
  const int64_t slices = groups >= threads ? 1 : std::max<int64_t>(1, std::min<int64_t>(threads, blocks));

  // List 0 is the output itself.
  const int64_t list = op.num_queries * op.top_k;
  std::vector<float> more_scores((slices - 1) * list, kMissing);
  std::vector<int32_t> more_indices((slices - 1) * list, 0);
  std::fill_n(op.scores, list, kMissing);
  std::fill_n(op.indices, list, 0);

  parallel_for(groups * slices, threads, [&](int64_t chunk) {
    const int64_t q = chunk / slices * kQueries, slice = chunk % slices;
    float* const scores = slice ? more_scores.data() + (slice - 1) * list : op.scores;
    int32_t* const indices = slice ? more_indices.data() + (slice - 1) * list : op.indices;
    kernels().search(op.query + q * op.dim, std::min(kQueries, op.num_queries - q), op.dim, op.keys,
                     static_cast<int>(op.key_dtype), blocks * slice / slices * 16,
                     std::min(op.num_keys, blocks * (slice + 1) / slices * 16), op.bias,
                     op.mask ? op.mask + q * op.mask_stride : nullptr, op.mask_stride, op.top_k,
                     scores + q * op.top_k, indices + q * op.top_k);
  });

  for (int64_t q = 0; q < op.num_queries; ++q) {
    for (int64_t slice = 1; slice < slices; ++slice) {
      const int64_t at = (slice - 1) * list + q * op.top_k;
      merge(more_scores.data() + at, more_indices.data() + at, op.top_k, op.scores + q * op.top_k,
            op.indices + q * op.top_k);
    }
    weigh(op, op.scores + q * op.top_k, op.weights + q * op.top_k);
  }
}

}  // namespace slm
