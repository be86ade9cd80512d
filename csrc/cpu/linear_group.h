#pragma once

#include <cstdint>
#include <vector>

#include "../ops.h"
#include "step_routing.h"

namespace slm {

enum class Prologue : int { none = 0, rms_norm = 1, silu_mul = 2 };

struct Linear {
  const void* weight;  // [out_features, in_features]
  const void* bias;    // [out_features] or null
  int64_t out_features;
  const void* A;  // [total_rank, in_features], or null: no factors
  const void* B;  // [total_rank, out_features]
  DType factor_dtype;
  int64_t total_rank;
};

// Linears that read the same input, with what comes before and after them:
//     h = x,  norm_weight * rms(x)  or  silu(x) * x2
//     y_i[t] = W_i h[t] + bias_i + sum_k weights[b, k] * scaling[e] * B_i[e]^T (A_i[e] h[t]) + residual[t]
// with e = indices[b, k], b = the row of token t. Sums in fp32, rounded once. The weights are read once per
// kMostTokens tokens. Holds pointers only.
class LinearGroup {
 public:
  // norm_weight: [in_features], for rms_norm. x, biases, outputs and residual have the weights' dtype.
  LinearGroup(DType dtype, int64_t in_features, Prologue prologue, float eps, const void* norm_weight,
              std::vector<Linear> linears);

  // x, x2: [num_tokens, in_features]; x2 for silu_mul. out: [num_tokens, out_features] of each linear.
  // residual: as the output of the only linear, or null. routing: null without a mixture.
  // Throws std::invalid_argument on a routing of other tokens or of more slab rows than the factors have.
  void forward(const void* x, const void* x2, int64_t num_tokens, const std::vector<void*>& out,
               const void* residual, const StepRouting* routing, int num_threads) const;

 private:
  friend struct GroupCall;
  void check(const std::vector<void*>& out, const void* residual, int64_t num_tokens,
             const StepRouting* routing) const;

  DType dtype_;
  int64_t in_features_;
  Prologue prologue_;
  float eps_;
  const void* norm_weight_;
  std::vector<Linear> linears_;
  int64_t num_tiles_ = 0;  // of kRowsOfTile rows, over all linears
  int64_t weight_bytes_ = 0;
};

}  // namespace slm
