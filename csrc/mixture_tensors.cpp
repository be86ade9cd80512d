#include "mixture_tensors.h"

#include <algorithm>

#include "ops.h"
#include "tensors.h"

namespace py = pybind11;

namespace slm {
namespace {

int64_t last(const DLTensor& tensor) { return tensor.shape[tensor.ndim - 1]; }

// y [..., out_features] and x [..., in_features] of one dtype.
bool borrow_tokens(py::handle y, py::handle x, Mixture& op, DLTensor& to, DLTensor& from) {
  DType y_dtype;
  if (!borrow(y.ptr(), to) || !borrow(x.ptr(), from) || from.ndim < 2 || to.ndim != from.ndim ||
      !float_type(from, op.x_dtype) || !float_type(to, y_dtype) || y_dtype != op.x_dtype ||
      !std::equal(from.shape, from.shape + from.ndim - 1, to.shape))
    return false;
  op.num_tokens = 1;
  for (int i = 0; i < from.ndim - 1; ++i) op.num_tokens *= from.shape[i];
  op.in_features = last(from);
  op.out_features = last(to);
  return true;
}

bool borrow_slabs(py::handle A, py::handle B, Mixture& op) {
  DLTensor a, b;
  DType b_dtype;
  if (!borrow(A.ptr(), a) || !borrow(B.ptr(), b) || a.ndim != 2 || b.ndim != 2 ||
      !float_type(a, op.factor_dtype) || !float_type(b, b_dtype) || b_dtype != op.factor_dtype ||
      a.shape[0] != b.shape[0] || a.shape[1] != op.in_features || b.shape[1] != op.out_features)
    return false;
  op.A = a.data;
  op.B = b.data;
  op.total_rank = a.shape[0];
  return true;
}

bool borrow_entries(py::handle start, py::handle rank, py::handle scaling, Mixture& op) {
  DLTensor s, r, c;
  if (!borrow(start.ptr(), kInt, 32, 1, s) || !borrow(rank.ptr(), kInt, 32, 1, r) ||
      !borrow(scaling.ptr(), kFloat, 32, 1, c) || r.shape[0] != s.shape[0] || c.shape[0] != s.shape[0])
    return false;
  op.num_entries = s.shape[0];
  op.start = static_cast<const int32_t*>(s.data);
  op.rank = static_cast<const int32_t*>(r.data);
  op.scaling = static_cast<const float*>(c.data);
  return true;
}

bool borrow_routing(py::handle indices, py::handle weights, py::handle cu_seqlens, Mixture& op) {
  DLTensor i, w, c;
  if (!borrow(indices.ptr(), kInt, 32, 2, i) || !borrow(weights.ptr(), kFloat, 32, 2, w) ||
      !std::equal(i.shape, i.shape + 2, w.shape))
    return false;
  op.num_rows = i.shape[0];
  op.top_k = i.shape[1];
  op.indices = static_cast<const int32_t*>(i.data);
  op.weights = static_cast<const float*>(w.data);
  if (cu_seqlens.is_none()) return op.num_rows ? op.num_tokens % op.num_rows == 0 : op.num_tokens == 0;
  if (!borrow(cu_seqlens.ptr(), kInt, 32, 1, c) || c.shape[0] != op.num_rows + 1) return false;
  op.cu_seqlens = static_cast<const int32_t*>(c.data);
  return true;
}

}  // namespace

bool mixture_tensors(py::handle y, py::handle x, py::handle A, py::handle B, py::handle start,
                     py::handle rank, py::handle scaling, py::handle indices, py::handle weights,
                     py::handle cu_seqlens) {
  Mixture op{};
  DLTensor to, from;
  if (!borrow_tokens(y, x, op, to, from) || !borrow_slabs(A, B, op) ||
      !borrow_entries(start, rank, scaling, op) || !borrow_routing(indices, weights, cu_seqlens, op) ||
      other_backend())
    return false;
  const int threads = num_threads();
  const py::gil_scoped_release no_gil;
  mixture_forward(op, from.data, to.data, nullptr, threads);
  return true;
}

}  // namespace slm
