// torch's tensors by DLPack's table of C functions (`__dlpack_c_exchange_api__`, DLPack 1.3), without its
// headers. Declared here is the ABI of dlpack.h, under short names.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "ops.h"

namespace slm {

struct DLPackVersion {
  uint32_t major, minor;
};

enum TypeCode : uint8_t { kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct DLTensor {
  void* data;
  int32_t device_type, device_id;  // type 1: CPU
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};

struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous;
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, DLManagedTensorVersioned** out);
  int (*object_from_managed)(DLManagedTensorVersioned* tensor, void** out);  // takes the tensor over
  int (*borrow)(void* object, DLTensor* out);                                // may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

// What the rest needs of torch: the type, with its DLPack table, and torch.get_num_threads. False where this
// torch has no such table; nothing can be borrowed then.
bool use_tensors(pybind11::handle type, pybind11::handle num_threads);

// A contiguous tensor on the CPU, of torch's own class; with code, bits and ndim only of those.
bool borrow(PyObject* object, DLTensor& out);
bool borrow(PyObject* object, uint8_t code, uint8_t bits, int ndim, DLTensor& out);
bool float_type(const DLTensor& tensor, DType& out);

// A new tensor of a 32-bit type.
pybind11::object empty(uint8_t code, int64_t rows, int64_t columns, void** data);

// Whether SLM_FAST_BACKEND asks for another backend than the CPU's.
bool other_backend();
int num_threads();

}  // namespace slm
