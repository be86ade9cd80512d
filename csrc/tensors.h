// torch's tensors by DLPack's table of C functions (`__dlpack_c_exchange_api__`, DLPack 1.3), without its
// headers. Declared here is the ABI of dlpack.h, under short names.
#pragma once

#include <cstdint>

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

}  // namespace slm
