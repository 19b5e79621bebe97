// Find the widest instruction set that this machine has, or a narrower one that was asked for.

#include "simd/isa.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ipu {

#if defined(__x86_64__)
namespace {

// Asked of the processor: clang's __builtin_cpu_supports does not know the name "f16c".
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

}  // namespace
#endif

Isa isa() {
  static const Isa found = [] {
    // Its values are checked where the library is loaded: ipu_pipeline/ops/extension.py.
    const char* wish = std::getenv("IPU_PIPELINE_ISA");
    const std::string_view most = wish == nullptr ? "" : wish;
    if (most == "baseline") {
      return Isa::baseline;
    }
#if defined(__x86_64__)
    if (most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
      return Isa::avx2;
    }
#endif
    return Isa::baseline;
  }();
  return found;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace ipu
