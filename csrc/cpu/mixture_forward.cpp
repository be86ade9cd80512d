// y[t] += sum_j coef_j u[t, j] B_j with u[t, j] = <x[t], A_j>. Reads x and each picked factor once per 64
// tokens of a row, reads and writes y once: R * (in + out) multiply-adds a token. Rows that decode, where
// each thread has some, read factors once, from memory, and ask for what they read next.
#include <algorithm>

#include "mixture_plan.h"
#include "parallel.h"

namespace slm {
namespace {

// Columns of u that no rank of the row fills: skipped picks, and ranks below the widest.
void zero_unused(const Mixture& op, const Task& task, int64_t columns, float* u) {
  for (int64_t k = 0; k < op.top_k; ++k) {
    const int64_t i = task.row * op.top_k + k;
    const int64_t used = op.weights[i] != 0.0f ? op.rank[op.indices[i]] : 0;
    for (int64_t t = task.begin; t < task.end && used < columns; ++t)
      std::fill(u + t * op.top_k * columns + k * columns + used, u + (t * op.top_k + k + 1) * columns, 0.0f);
  }
}

// Both products of a task. Of one token, A's rows are read while B's are on their way, and B's while those of
// A are that `after` needs.
void whole_task(const Mixture& op, const Task& task, const Task* after, const void* x, int64_t columns,
                float* u, bool keep_u, void* y) {
  thread_local RowPlan plan, next;
  const int64_t stride = columns * op.top_k;
  plan.build(op, task.row, columns);
  if (keep_u) zero_unused(op, task, columns, u);
  if (plan.size() == 0) return;
  SlabRows coming{};
  if (task.end - task.begin > 1) {
    rank_space(op, x, op.A, op.in_features, task, plan, 0, plan.size(), u, stride);
  } else {
    rank_space_one(op, x, task, plan, u, stride);
    if (after) {
      next.build(op, after->row, columns);
      coming = {static_cast<const char*>(op.A), next.rows.data(), next.size(),
                op.in_features * size_of(op.factor_dtype)};
    }
  }
  expand(op, u, stride, op.B, op.out_features, task, plan, 0, op.out_features, y, true, coming);
}

}  // namespace

void mixture_forward(const Mixture& op, const void* x, void* y, float* u, int num_threads) {
  validate(op, u ? op.columns_of_pick() : -1);
  const int64_t columns = u ? op.columns_of_pick() : largest_rank(op);
  const int64_t stride = columns * op.top_k;
  const bool keep_u = u != nullptr;
  if (!keep_u) {
    if (stride == 0) return;
    u = scratch(1, op.num_tokens * stride);
  }
  const std::vector<Task> tasks = make_tasks(op);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int threads = worthwhile_threads(op, num_tasks, num_threads);

  const int64_t blocks = (op.out_features + kBlock - 1) / kBlock;
  const int64_t rank_parts = parts_per_task(num_tasks, threads, (stride + 3) / 4);
  const int64_t column_parts = parts_per_task(num_tasks, threads, blocks);
  if (rank_parts == 1 && column_parts == 1) {
    parallel_for(num_tasks, threads, [&](int64_t i) {
      whole_task(op, tasks[i], i + 1 < num_tasks ? &tasks[i + 1] : nullptr, x, columns, u, keep_u, y);
    });
    return;
  }

  parallel_for(num_tasks * rank_parts, threads, [&](int64_t chunk) {
    const Task& task = tasks[chunk / rank_parts];
    const int64_t part = chunk % rank_parts;
    thread_local RowPlan plan;
    plan.build(op, task.row, columns);
    if (keep_u && part == 0) zero_unused(op, task, columns, u);
    const int64_t quads = (plan.size() + 3) / 4;
    const int64_t begin = quads * part / rank_parts * 4;
    const int64_t end = std::min(plan.size(), quads * (part + 1) / rank_parts * 4);
    if (begin < end) rank_space(op, x, op.A, op.in_features, task, plan, begin, end, u, stride);
  });

  parallel_for(num_tasks * column_parts, threads, [&](int64_t chunk) {
    const Task& task = tasks[chunk / column_parts];
    const int64_t part = chunk % column_parts;
    thread_local RowPlan plan;
    plan.build(op, task.row, columns);
    if (plan.size() == 0) return;
    const int64_t begin = blocks * part / column_parts * kBlock;
    const int64_t end = std::min(op.out_features, blocks * (part + 1) / column_parts * kBlock);
    expand(op, u, stride, op.B, op.out_features, task, plan, begin, end, y, true);
  });
}

}  // namespace slm
