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

// Rotary position embedding of the first linears' outputs, head by head:
//     y[:h] = y[:h] cos[:h] - y[h:] sin[:h],  y[h:] = y[h:] cos[h:] + y[:h] sin[h:],  h = head_size / 2
// each product and the sum rounded, as PyTorch does it. Token t has row t % num_angles of cos and sin.
struct Rotation {
  const void* cos;  // [num_angles, head_size] in the weights' dtype
  const void* sin;
  int64_t num_angles, head_size, num_linears;
};

struct GroupCall;

// Linears that read the same input, with what comes before and after them:
//     h = x,  norm_weight * rms(x)  or  silu(x) * x2
//     y_i[t] = W_i h[t] + bias_i + sum_k weights[b, k] * scaling[e] * B_i[e]^T (A_i[e] h[t]) + residual[t]
// with e = indices[b, k], b = the row of token t. Sums in fp32, rounded once. The weights are read once for
// up to 512 tokens. Holds pointers only.
class LinearGroup {
 public:
  // norm_weight: [in_features], for rms_norm. x, biases, outputs and residual have the weights' dtype.
  LinearGroup(DType dtype, int64_t in_features, Prologue prologue, float eps, const void* norm_weight,
              std::vector<Linear> linears);

  // x, x2: [num_tokens, in_features]; x2 for silu_mul. out: [num_tokens, out_features] of each linear.
  // residual: as the output of the only linear, or null. routing: null without a mixture. rotation: or null.
  // Throws std::invalid_argument on a routing of other tokens or of more slab rows than the factors have.
  void forward(const void* x, const void* x2, int64_t num_tokens, const std::vector<void*>& out,
               const void* residual, const StepRouting* routing, const Rotation* rotation,
               int num_threads) const;

 private:
  friend struct GroupCall;
  friend void forward_tail(const LinearGroup&, const LinearGroup&, const LinearGroup&, const void*,
                           const void*, int64_t, void*, const StepRouting*, int);
  void check(const std::vector<void*>& out, const void* residual, int64_t num_tokens,
             const StepRouting* routing, const Rotation* rotation) const;
  static int64_t pass_tokens(int64_t left);
  GroupCall call(const void* x, const void* x2, int64_t first, int64_t num_tokens, std::vector<void*> out,
                 const void* residual, const StepRouting* routing, const Rotation* rotation) const;

  DType dtype_;
  int64_t in_features_;
  Prologue prologue_;
  float eps_;
  const void* norm_weight_;
  std::vector<Linear> linears_;
  int64_t num_tiles_ = 0;  // of kRowsOfTile rows, over all linears
  int64_t weight_bytes_ = 0;
};

// What follows the attention in a decoder layer, in one parallel region:
//     x = residual + out(attended);  y = x + down(gate_up(x))
// Throws std::invalid_argument on groups that do not fit together.
void forward_tail(const LinearGroup& out, const LinearGroup& gate_up, const LinearGroup& down,
                  const void* attended, const void* residual, int64_t num_tokens, void* y,
                  const StepRouting* routing, int num_threads);

}  // namespace slm
