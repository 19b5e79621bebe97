#include "add_narrow.h"

#include "narrow_types.h"

namespace ipu::IPU_ISA {

void add_bf16(const uint16_t* values, float* sums, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += widen(BFloat16{values[i]});
  }
}

}  // namespace ipu::IPU_ISA
