#include "hide.h"

#include <limits>

namespace ipu::IPU_ISA {

void hide_f32(const bool* hidden, float* scores, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = hidden[i] ? -std::numeric_limits<float>::infinity() : scores[i];
  }
}

}  // namespace ipu::IPU_ISA
