#include "tensors.h"

#include <cstdlib>
#include <cstring>

namespace py = pybind11;

namespace slm {
namespace {

// Kept for ever: they outlive the interpreter's last call.
struct Torch {
  PyTypeObject* tensor = nullptr;
  const DLPackExchangeAPI* api = nullptr;
  PyObject* num_threads = nullptr;
} torch;

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

}  // namespace

bool use_tensors(py::handle type, py::handle num_threads) {
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return false;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const auto api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->version.major != 1 || !api->borrow) return false;
  torch = {reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()), api, num_threads.inc_ref().ptr()};
  return true;
}

bool borrow(PyObject* object, DLTensor& out) {
  if (!torch.api || Py_TYPE(object) != torch.tensor) return false;
  if (torch.api->borrow(object, &out) != 0) {
    PyErr_Clear();
    return false;
  }
  if (out.device_type != 1 || out.lanes != 1) return false;
  int64_t size = 1;
  for (int i = out.ndim - 1; i >= 0; --i) {
    if (out.shape[i] != 1 && out.strides[i] != size) return false;
    size *= out.shape[i];
  }
  out.data = static_cast<char*>(out.data) + out.byte_offset;
  return true;
}

bool borrow(PyObject* object, uint8_t code, uint8_t bits, int ndim, DLTensor& out) {
  return borrow(object, out) && out.ndim == ndim && out.code == code && out.bits == bits;
}

bool float_type(const DLTensor& tensor, DType& out) {
  if (tensor.code == kFloat && tensor.bits == 32)
    out = DType::f32;
  else if (tensor.code == kFloat && tensor.bits == 16)
    out = DType::f16;
  else if (tensor.code == kBfloat && tensor.bits == 16)
    out = DType::bf16;
  else
    return false;
  return true;
}

py::object empty(uint8_t code, int64_t rows, int64_t columns, void** data) {
  int64_t shape[2] = {rows, columns};
  DLTensor prototype{nullptr, 1, 0, 2, code, 32, 1, shape, nullptr, 0};
  DLManagedTensorVersioned* made = nullptr;
  void* object = nullptr;
  if (torch.api->allocate(&prototype, &made, nullptr, set_error) != 0) throw py::error_already_set();
  *data = made->tensor.data;
  if (torch.api->object_from_managed(made, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

bool other_backend() {
  const char* const backend = std::getenv("SLM_FAST_BACKEND");
  return backend && *backend && std::strcmp(backend, "cpu") != 0 && std::strcmp(backend, "auto") != 0;
}

int num_threads() { return py::cast<int>(py::handle(torch.num_threads)()); }

}  // namespace slm
