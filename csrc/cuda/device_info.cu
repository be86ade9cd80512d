#include "../ops.h"
#include "check.h"

namespace slm {

std::vector<CudaDevice> cuda_devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  std::vector<CudaDevice> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, i));
    devices.push_back({properties.name, properties.major, properties.minor, properties.totalGlobalMem});
  }
  return devices;
}

}  // namespace slm
