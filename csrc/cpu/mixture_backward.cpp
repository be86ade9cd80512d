// g[t, j] = <dy[t], B_j>;  dx[t] = sum_j coef_j g[t, j] A_j;  dA_j = sum_t coef_j g[t, j] x[t];
// dB_j = sum_t coef_j u[t, j] dy[t];  dw[b, k] = scaling sum_t sum_j u[t, j] g[t, j].
// Threads share out columns of dA and dB, never tokens, so the sums run in one order whatever their number.
#include <algorithm>
#include <cstring>

#include "mixture_plan.h"
#include "parallel.h"

namespace slm {
namespace {

constexpr int64_t kPanelTokens =
    64;  // 64 x kBlock fp32 of x or dy: one panel serves every owned pick of a row

struct Backward {
  const Mixture& op;
  int64_t columns, stride;
  const void *x, *dy;
  const float* u;
  float *g, *weighted_u;  // [num_tokens, stride]; g becomes coef * g once dw is done
  int64_t owned_begin, owned_end;

  int64_t pick_rank(int64_t row, int64_t k) const {
    const int64_t i = row * op.top_k + k;
    return op.weights[i] != 0.0f ? op.rank[op.indices[i]] : 0;
  }

  // dw of one row, then g and u times their coefficients.
  void weigh(int64_t row, float* dw) const {
    for (int64_t k = 0; k < op.top_k; ++k) {
      const int64_t i = row * op.top_k + k, used = pick_rank(row, k);
      const float scaling = used ? op.scaling[op.indices[i]] : 0.0f, coef = op.weights[i] * scaling;
      double total = 0.0;
      for (int64_t t = op.token_begin(row); t < op.token_begin(row + 1); ++t) {
        const int64_t at = t * stride + k * columns;
        for (int64_t r = 0; r < used; ++r) {
          total += static_cast<double>(u[at + r]) * g[at + r];
          g[at + r] *= coef;
          weighted_u[at + r] = coef * u[at + r];
        }
      }
      if (dw) dw[i] = static_cast<float>(total * scaling);
    }
  }

  // grad[row - owned_begin, col : col + width] = sum over tokens of s[t, j] * data[t, col : col + width].
  void factor_columns(const float* s, const void* data, int64_t dim, int64_t col, float* grad) const {
    const int64_t width = std::min(kBlock, dim - col);
    for (int64_t j = 0; j < owned_end - owned_begin; ++j) std::fill_n(grad + j * dim + col, width, 0.0f);
    float* const panel = scratch(0, kPanelTokens * kBlock);
    for (int64_t row = 0; row < op.num_rows; ++row) {
      const int64_t last = op.token_begin(row + 1);
      for (int64_t t = op.token_begin(row); t < last; t += kPanelTokens) {
        const int64_t num_t = std::min(kPanelTokens, last - t);
        bool packed = false;
        for (int64_t k = 0; k < op.top_k; ++k) {
          const int64_t used = pick_rank(row, k);
          if (used == 0) continue;
          const int64_t start = op.start[op.indices[row * op.top_k + k]];
          const int64_t lo = std::max(start, owned_begin), hi = std::min(start + used, owned_end);
          if (lo >= hi) continue;
          if (!packed) {
            const char* base = static_cast<const char*>(data) + t * dim * size_of(op.x_dtype);
            kernels().pack(base, static_cast<int>(op.x_dtype), nullptr, num_t, dim, col, width, panel);
            packed = true;
          }
          kernels().axpy(s + t * stride + k * columns + lo - start, 1, stride, hi - lo, num_t, panel,
                         grad + (lo - owned_begin) * dim + col, 0, dim, width, 1);
        }
      }
    }
  }
};

}  // namespace

void mixture_backward(const Mixture& op, const void* dy, const void* x, const float* u, void* dx, float* dA,
                      float* dB, int64_t owned_begin, int64_t owned_end, float* dw, int num_threads) {
  validate(op, op.columns_of_pick());
  const int64_t columns = op.columns_of_pick(), stride = op.u_stride;
  float* const g = scratch(1, op.num_tokens * stride);
  float* const weighted_u = scratch(2, op.num_tokens * stride);
  const Backward backward{op, columns, stride, x, dy, u, g, weighted_u, owned_begin, owned_end};
  const std::vector<Task> tasks = make_tasks(op);
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int threads = worthwhile_threads(op, num_tasks, num_threads);

  const int64_t rank_parts = parts_per_task(num_tasks, threads, (stride + 3) / 4);
  parallel_for(num_tasks * rank_parts, threads, [&](int64_t chunk) {
    const Task& task = tasks[chunk / rank_parts];
    const int64_t part = chunk % rank_parts;
    thread_local RowPlan plan;
    plan.build(op, task.row, columns);
    const int64_t quads = (plan.size() + 3) / 4;
    const int64_t begin = quads * part / rank_parts * 4;
    const int64_t end = std::min(plan.size(), quads * (part + 1) / rank_parts * 4);
    if (begin < end) rank_space(op, dy, op.B, op.out_features, task, plan, begin, end, g, stride);
  });

  if (dx) {
    const int64_t blocks = (op.in_features + kBlock - 1) / kBlock;
    const int64_t column_parts = parts_per_task(num_tasks, threads, blocks);
    parallel_for(num_tasks * column_parts, threads, [&](int64_t chunk) {
      const Task& task = tasks[chunk / column_parts];
      const int64_t part = chunk % column_parts;
      thread_local RowPlan plan;
      plan.build(op, task.row, columns);
      const int64_t begin = blocks * part / column_parts * kBlock;
      const int64_t end = std::min(op.in_features, blocks * (part + 1) / column_parts * kBlock);
      expand(op, g, stride, op.A, op.in_features, task, plan, begin, end, dx, false);
    });
  }

  parallel_for(op.num_rows, threads, [&](int64_t row) { backward.weigh(row, dw); });

  const int64_t a_blocks = dA ? (op.in_features + kBlock - 1) / kBlock : 0;
  const int64_t b_blocks = dB ? (op.out_features + kBlock - 1) / kBlock : 0;
  parallel_for(a_blocks + b_blocks, threads, [&](int64_t chunk) {
    if (chunk < a_blocks) {
      backward.factor_columns(g, x, op.in_features, chunk * kBlock, dA);
    } else {
      backward.factor_columns(weighted_u, dy, op.out_features, (chunk - a_blocks) * kBlock, dB);
    }
  });
}

}  // namespace slm
