#include "search_tensors.h"

#include <cmath>
#include <vector>

#include "cpu/kernels.h"
#include "ops.h"
#include "tensors.h"

namespace py = pybind11;

namespace slm {
namespace {

// Of KeyCodes.
struct Names {
  PyObject* codes = PyUnicode_InternFromString("codes");
  PyObject* bounds = PyUnicode_InternFromString("bounds");
  PyObject* num_keys = PyUnicode_InternFromString("num_keys");
  PyObject* dim = PyUnicode_InternFromString("dim");
};

const Names& names() {
  static const Names names;
  return names;
}

bool integer(PyObject* object, int64_t& out) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

bool attribute_is(PyObject* object, PyObject* name, int64_t wanted) {
  const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  int64_t found;
  if (!value) PyErr_Clear();
  return value && integer(value.ptr(), found) && found == wanted;
}

bool borrow_codes(PyObject* object, KeySearch& op) {
  if (!attribute_is(object, names().num_keys, op.num_keys) || !attribute_is(object, names().dim, op.dim))
    return false;
  const auto codes = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, names().codes));
  const auto bounds = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, names().bounds));
  DLTensor c, b;
  if (!codes || !bounds) {
    PyErr_Clear();
    return false;
  }
  const int64_t blocks = (op.num_keys + kCodeKeys - 1) / kCodeKeys;
  if (!borrow(codes.ptr(), kUnsigned, 8, 5, c) || !borrow(bounds.ptr(), kFloat, 32, 3, b)) return false;
  if (c.shape[0] != blocks || c.shape[1] != (op.dim + 7) / 8 || b.shape[0] != blocks) return false;
  op.codes = static_cast<const uint8_t*>(c.data);
  op.bounds = static_cast<const float*>(b.data);
  return true;
}

// [num_keys], or null where there is none.
bool borrow_bias(PyObject* object, KeySearch& op) {
  DLTensor b;
  if (object == Py_None) return true;
  if (!borrow(object, kFloat, 32, 1, b) || b.shape[0] != op.num_keys) return false;
  op.bias = static_cast<const float*>(b.data);
  return true;
}

// [num_keys] or [num_queries, num_keys], or null where there is none.
bool borrow_mask(PyObject* object, KeySearch& op) {
  DLTensor m;
  if (object == Py_None) return true;
  if (borrow(object, kBool, 8, 1, m)) {
    if (m.shape[0] != op.num_keys) return false;
  } else if (borrow(object, kBool, 8, 2, m)) {
    if (m.shape[0] != op.num_queries || m.shape[1] != op.num_keys) return false;
    op.mask_stride = op.num_keys;
  } else {
    return false;
  }
  op.mask = static_cast<const uint8_t*>(m.data);
  return true;
}

// The queries less shift [dim], in `moved`; as they are where there is none.
bool move_queries(PyObject* shift, KeySearch& op, std::vector<float>& moved) {
  DLTensor s;
  if (shift == Py_None) return true;
  if (!borrow(shift, kFloat, 32, 1, s) || s.shape[0] != op.dim) return false;
  moved.resize(op.num_queries * op.dim);
  const float* const by = static_cast<const float*>(s.data);
  for (int64_t q = 0; q < op.num_queries; ++q)
    for (int64_t d = 0; d < op.dim; ++d) moved[q * op.dim + d] = op.query[q * op.dim + d] - by[d];
  op.query = moved.data();
  return true;
}

bool weighting_of(PyObject* object, Weighting& out) {
  if (!PyUnicode_CheckExact(object)) return false;
  const char* const names[] = {"similarity", "softmax", "uniform"};
  for (int i = 0; i < 3; ++i) {
    if (PyUnicode_CompareWithASCIIString(object, names[i]) != 0) continue;
    out = static_cast<Weighting>(i);
    return true;
  }
  return false;
}

bool number(PyObject* object, float& out) {
  if (!PyFloat_CheckExact(object)) return false;
  out = static_cast<float>(PyFloat_AS_DOUBLE(object));
  return true;
}

}  // namespace

py::object search_tensors(py::handle query, py::handle keys, py::handle bias, py::handle mask,
                          py::handle shift, py::handle codes, py::handle top_k, py::handle weighting,
                          py::handle temperature, py::handle min_similarity) {
  KeySearch op{};
  DLTensor q, k;
  if (!borrow(query.ptr(), kFloat, 32, 2, q) || !borrow(keys.ptr(), k) || k.ndim != 2 ||
      !float_type(k, op.key_dtype))
    return py::none();
  op.query = static_cast<const float*>(q.data);
  op.keys = k.data;
  op.num_queries = q.shape[0];
  op.dim = q.shape[1];
  op.num_keys = k.shape[0];
  if (k.shape[1] != op.dim || !integer(top_k.ptr(), op.top_k) || op.top_k < 1 || op.top_k > kMostPicks ||
      !weighting_of(weighting.ptr(), op.weighting) || !number(temperature.ptr(), op.temperature) ||
      !(op.temperature > 0.0f && std::isfinite(op.temperature)))
    return py::none();
  op.min_similarity = minus_infinity();
  if (!min_similarity.is_none() && !number(min_similarity.ptr(), op.min_similarity)) return py::none();
  if (!borrow_bias(bias.ptr(), op) || !borrow_mask(mask.ptr(), op)) return py::none();
  if (!codes.is_none() && !borrow_codes(codes.ptr(), op)) return py::none();
  if (other_backend()) return py::none();
  std::vector<float> moved;
  if (!move_queries(shift.ptr(), op, moved)) return py::none();

  void *indices, *weights, *scores;
  py::object made[] = {empty(kInt, op.num_queries, op.top_k, &indices),
                       empty(kFloat, op.num_queries, op.top_k, &weights),
                       empty(kFloat, op.num_queries, op.top_k, &scores)};
  op.indices = static_cast<int32_t*>(indices);
  op.weights = static_cast<float*>(weights);
  op.scores = static_cast<float*>(scores);
  const int threads = searches_alone(op) ? 1 : num_threads();
  {
    const py::gil_scoped_release no_gil;
    key_search(op, threads);
  }
  PyObject* const found = PyTuple_New(3);
  for (int i = 0; i < 3; ++i) PyTuple_SET_ITEM(found, i, made[i].release().ptr());
  return py::reinterpret_steal<py::object>(found);
}

}  // namespace slm
