#pragma once

#include <cstdint>
#include <vector>

#include "../ops.h"
#include "isa.h"

namespace slm {

// The picks of one row with a weight other than 0, flattened over their ranks.
struct RowPlan {
  std::vector<int64_t> rows;  // slab row of each rank
  std::vector<int64_t> cols;  // its column in u: pick * columns + rank
  std::vector<float> coef;    // weight * scaling

  void build(const Mixture& op, int64_t row, int64_t columns);
  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

// Up to kTokens tokens of one row.
struct Task {
  int64_t row, begin, end;
};

constexpr int64_t kTokens = 64;

// Throws std::invalid_argument on anything that would read or write out of bounds.
void validate(const Mixture& op, int64_t u_columns);
int64_t largest_rank(const Mixture& op);
std::vector<Task> make_tasks(const Mixture& op);

// Threads worth waking for this op, and parts to cut each task into so that they all have work.
int worthwhile_threads(const Mixture& op, int64_t num_tasks, int num_threads);
int64_t parts_per_task(int64_t num_tasks, int num_threads, int64_t most);

// out[t, col_j] = <x[t], slab[row_j]> for the tokens of a task and the plan's ranks begin:end.
void rank_space(const Mixture& op, const void* x, const void* slab, int64_t dim, const Task& task,
                const RowPlan& plan, int64_t begin, int64_t end, float* out, int64_t out_stride);

// u[t, col_j] = <x[t], A[row_j]> for the token of a task that has one; asks for the plan's rows of B on the
// way.
void rank_space_one(const Mixture& op, const void* x, const Task& task, const RowPlan& plan, float* u,
                    int64_t u_stride);

// y[t] (+)= sum_j coef_j * s[t, col_j] * slab[row_j], for the tokens of a task and the columns begin:end. A
// task of one token asks for the rows of `next` on the way.
void expand(const Mixture& op, const float* s, int64_t s_stride, const void* slab, int64_t dim,
            const Task& task, const RowPlan& plan, int64_t begin, int64_t end, void* y, bool add,
            const SlabRows& next = {});

// A buffer of the calling thread, valid until its next call with the same slot; contents are undefined.
float* scratch(int slot, int64_t size);

}  // namespace slm
