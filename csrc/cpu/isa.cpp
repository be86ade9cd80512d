#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ops.h"

#ifdef SLM_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace slm {
namespace {

struct Isa {
  const char* name;
  bool supported;
  const Kernels* (*kernels)();
};

#ifdef SLM_AMX
// Whether the processor has AMX tiles for bf16 and the kernel lets this process use them.
bool amx_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list;
#ifdef SLM_X86
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#ifdef SLM_AMX
    list.push_back({"amx", bf16 && amx_granted(), kernels_amx});
#endif
    list.push_back({"avx512_bf16", bf16, kernels_avx512_bf16});
    list.push_back({"avx512", avx512, kernels_avx512});
    list.push_back({"avx2", avx2, kernels_avx2});
#endif
    list.push_back({"baseline", true, kernels_baseline});
    return list;
  }();
  return all;
}

const Isa& choose() {
  const char* wanted = std::getenv("SLM_FAST_ISA");
  for (const Isa& candidate : isas()) {
    if (!wanted || !*wanted) {
      if (candidate.supported) return candidate;
    } else if (candidate.name == std::string(wanted)) {
      if (candidate.supported) return candidate;
      throw std::invalid_argument("SLM_FAST_ISA=" + std::string(wanted) +
                                  " is not supported by this processor");
    }
  }
  throw std::invalid_argument("SLM_FAST_ISA must be amx, avx512_bf16, avx512, avx2 or baseline, got " +
                              std::string(wanted));
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = *chosen().kernels();
  return table;
}

std::string isa() { return chosen().name; }

std::vector<std::string> isa_supported() {
  std::vector<std::string> names;
  for (const Isa& candidate : isas())
    if (candidate.supported) names.push_back(candidate.name);
  return names;
}

}  // namespace slm
