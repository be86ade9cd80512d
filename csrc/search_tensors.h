#pragma once

#include <pybind11/pybind11.h>

namespace slm {

// ops.key_search of plain tensors on the CPU, bias, mask, shift and codes or None; None for anything else,
// and for whatever ops.key_search would refuse. The same steps in Python take longer than a search of a
// thousand keys: 12 us.
pybind11::object search_tensors(pybind11::handle query, pybind11::handle keys, pybind11::handle bias,
                                pybind11::handle mask, pybind11::handle shift, pybind11::handle codes,
                                pybind11::handle top_k, pybind11::handle weighting,
                                pybind11::handle temperature, pybind11::handle min_similarity);

}  // namespace slm
