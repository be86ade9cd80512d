// The plan comes from Python: what the kernel would read or write out of bounds is refused here.
#pragma once

#include <limits>
#include <stdexcept>

#include "../ops.h"

namespace slm {

inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

inline void check_plan(const CudaKeySearch& op) {
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  const int64_t size = size_of(op.key_dtype), step = kLanes * (16 / size);
  require(op.key_dtype >= DType::f32 && op.key_dtype <= DType::f16, "unknown key type");
  require(op.weighting >= Weighting::similarity && op.weighting <= Weighting::uniform, "unknown weighting");
  require(op.num_queries >= 0 && op.num_keys >= 0 && op.dim >= 0, "sizes must not be negative");
  require(op.num_queries <= kMaxInt && op.num_keys <= kMaxInt && op.dim <= kMaxInt - step,
          "sizes must be below 2^31");
  require(op.top_k >= 1 && op.top_k <= 64, "top_k must be in 1..64");
  require(op.mask_stride == 0 || op.mask_stride == op.num_keys, "mask_stride must be 0 or num_keys");
  require(op.num_groups == 0 || (op.num_groups > 0 && !op.shift && op.dim % op.num_groups == 0),
          "num_groups must divide dim and excludes shift");
  require(op.queries == 1 || (op.wide && (op.queries == 2 || op.queries == 4 || op.queries == 8)),
          "queries of a block must be 1, or 2, 4 or 8 with wide loads");
  require(!op.wide || (op.dim * size % 16 == 0 && reinterpret_cast<uintptr_t>(op.keys) % 16 == 0),
          "wide loads need keys of 16-byte multiples at a 16-byte address");
  require(op.staged || (!op.wide && op.num_groups == 0 && !op.shift),
          "a query that is not staged needs narrow loads and no transform");
  require(op.row_size >= op.dim && op.row_size < op.dim + step && op.row_size % step == 0,
          "row_size must be dim, rounded up to the step");
  require(
      op.shared_bytes == (op.staged ? op.queries * op.row_size * 4 : 0) + list_bytes(op.queries, op.top_k),
      "shared_bytes does not match the layout");
  require(op.slices >= 1 && op.slices <= 65535, "slices must be in 1..65535");
  require(op.slices == 1 || (op.slice_indices && op.slice_scores), "several slices need their lists");
}

}  // namespace slm
