#include "mixture_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace slm {
namespace {

// Multiply-adds that are worth a thread where it has whole tasks: 6 rows of 576 x 576, K=2, r=8 (110,000),
// with factors that come from memory, take as long on one as on two, 16 take 142 us and 90 us.
constexpr int64_t kThreadWork = 60000;
// And where tasks have to be cut, in two turns: 2 such rows with r=64 (295,000) take 127 us and 93 us.
constexpr int64_t kCutWork = 100000;
constexpr int64_t kTasksOfThread = 4;
// Factor rows read again for every four tokens stay in half an L2 cache of 1 MiB.
constexpr int64_t kResidentFloats = 128 * 1024;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

const char* offset(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}

}  // namespace

void RowPlan::build(const Mixture& op, int64_t row, int64_t columns) {
  rows.clear();
  cols.clear();
  coef.clear();
  for (int64_t k = 0; k < op.top_k; ++k) {
    const float weight = op.weights[row * op.top_k + k];
    if (weight == 0.0f) continue;
    const int64_t entry = op.indices[row * op.top_k + k];
    for (int64_t r = 0; r < op.rank[entry]; ++r) {
      rows.push_back(op.start[entry] + r);
      cols.push_back(k * columns + r);
      coef.push_back(weight * op.scaling[entry]);
    }
  }
}

void validate(const Mixture& op, int64_t u_columns) {
  for (int64_t i = 0; i < op.num_rows * op.top_k; ++i) {
    const int64_t entry = op.indices[i];
    if (op.weights[i] == 0.0f && entry == 0)
      continue;  // the pick that does not exist, legal in an empty pool
    if (entry < 0 || entry >= op.num_entries)
      fail("indices must lie in 0.." + std::to_string(op.num_entries - 1) + ", got " + std::to_string(entry));
    const int64_t start = op.start[entry], rank = op.rank[entry];
    if (start < 0 || rank < 0 || start + rank > op.total_rank)
      fail("entry " + std::to_string(entry) + " owns rows " + std::to_string(start) + ":" +
           std::to_string(start + rank) + " of a slab of " + std::to_string(op.total_rank));
    if (u_columns >= 0 && rank > u_columns)
      fail("u has " + std::to_string(u_columns) + " columns for a pick of rank " + std::to_string(rank));
  }
  if (!op.cu_seqlens) return;
  if (op.cu_seqlens[0] != 0 || op.cu_seqlens[op.num_rows] != op.num_tokens)
    fail("cu_seqlens must run from 0 to " + std::to_string(op.num_tokens) + ", got " +
         std::to_string(op.cu_seqlens[0]) + " to " + std::to_string(op.cu_seqlens[op.num_rows]));
  for (int64_t b = 0; b < op.num_rows; ++b)
    if (op.cu_seqlens[b] > op.cu_seqlens[b + 1]) fail("cu_seqlens must not decrease");
}

int64_t largest_rank(const Mixture& op) {
  int64_t largest = 0;
  for (int64_t i = 0; i < op.num_rows * op.top_k; ++i)
    if (op.weights[i] != 0.0f) largest = std::max<int64_t>(largest, op.rank[op.indices[i]]);
  return largest;
}

std::vector<Task> make_tasks(const Mixture& op) {
  std::vector<Task> tasks;
  tasks.reserve(op.num_rows + op.num_tokens / kTokens);
  for (int64_t row = 0; row < op.num_rows; ++row) {
    const int64_t last = op.token_begin(row + 1);
    for (int64_t t = op.token_begin(row); t < last; t += kTokens)
      tasks.push_back({row, t, std::min(t + kTokens, last)});
  }
  return tasks;
}

int worthwhile_threads(const Mixture& op, int64_t num_tasks, int num_threads) {
  int64_t ranks = 0;
  for (int64_t row = 0; row < op.num_rows; ++row) {
    int64_t of_row = 0;
    for (int64_t i = row * op.top_k; i < (row + 1) * op.top_k; ++i)
      if (op.weights[i] != 0.0f) of_row += op.rank[op.indices[i]];
    ranks += of_row * (op.token_begin(row + 1) - op.token_begin(row));
  }
  const int64_t work = ranks * (op.in_features + op.out_features), most = std::max(num_threads, 1);
  const auto worth = [&](int64_t of_thread) { return std::clamp<int64_t>(work / of_thread, 1, most); };
  const int64_t whole = std::max<int64_t>(1, num_tasks / kTasksOfThread);  // threads that need no cut
  return static_cast<int>(std::min(worth(kThreadWork), std::max(whole, worth(kCutWork))));
}

int64_t parts_per_task(int64_t num_tasks, int num_threads, int64_t most) {
  if (num_threads <= 1 || num_tasks == 0 || num_tasks >= kTasksOfThread * num_threads) return 1;
  return std::max<int64_t>(1, std::min<int64_t>(most, kTasksOfThread * num_threads / num_tasks));
}

void rank_space(const Mixture& op, const void* x, const void* slab, int64_t dim, const Task& task,
                const RowPlan& plan, int64_t begin, int64_t end, float* out, int64_t out_stride) {
  const int64_t at_once = std::max<int64_t>(4, kResidentFloats / std::max<int64_t>(dim, 1) / 4 * 4);
  float* const buffer = scratch(0, (4 + std::min(at_once, end - begin)) * padded(dim));
  for (int64_t j = begin; j < end; j += at_once) {
    kernels().dot(offset(x, task.begin * dim, op.x_dtype), static_cast<int>(op.x_dtype),
                  task.end - task.begin, slab, static_cast<int>(op.factor_dtype), plan.rows.data() + j,
                  plan.cols.data() + j, std::min(at_once, end - j), dim, out + task.begin * out_stride,
                  out_stride, buffer);
  }
}

void expand(const Mixture& op, const float* s, int64_t s_stride, const void* slab, int64_t dim,
            const Task& task, const RowPlan& plan, int64_t begin, int64_t end, void* y, bool add,
            const SlabRows& next) {
  const int64_t num_t = task.end - task.begin, num_j = plan.size();
  float* const weighted = scratch(0, num_t * num_j + num_j * kBlock);
  float* const panel = weighted + num_t * num_j;
  for (int64_t t = 0; t < num_t; ++t)
    for (int64_t j = 0; j < num_j; ++j)
      weighted[t * num_j + j] = plan.coef[j] * s[(task.begin + t) * s_stride + plan.cols[j]];
  if (num_t == 1)
    return kernels().axpy_one(weighted, num_j, slab, static_cast<int>(op.factor_dtype), plan.rows.data(), dim,
                              begin, end, next, const_cast<char*>(offset(y, task.begin * dim, op.x_dtype)),
                              static_cast<int>(op.x_dtype), add);
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t width = std::min(kBlock, end - c);
    kernels().pack(slab, static_cast<int>(op.factor_dtype), plan.rows.data(), num_j, dim, c, width, panel);
    kernels().axpy(weighted, num_j, 1, num_t, num_j, panel,
                   const_cast<char*>(offset(y, task.begin * dim + c, op.x_dtype)),
                   static_cast<int>(op.x_dtype), dim, width, add);
  }
}

void rank_space_one(const Mixture& op, const void* x, const Task& task, const RowPlan& plan, float* u,
                    int64_t u_stride) {
  const int64_t dim = op.in_features;
  kernels().dot_one(offset(x, task.begin * dim, op.x_dtype), static_cast<int>(op.x_dtype), op.A,
                    static_cast<int>(op.factor_dtype), plan.rows.data(), plan.cols.data(), plan.size(), dim,
                    static_cast<const char*>(op.B), op.out_features * size_of(op.factor_dtype),
                    u + task.begin * u_stride, scratch(0, padded(dim)));
}

float* scratch(int slot, int64_t size) {
  thread_local std::vector<float> buffers[3];
  std::vector<float>& buffer = buffers[slot];
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

}  // namespace slm
