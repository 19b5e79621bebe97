// The AdamW update of a range of one bfloat16 tensor, rounded at random.

#pragma once

#include <cstdint>

#include "isa.h"

namespace ipu {

// One tensor of the list, contiguous: bfloat16 weights, gradients of float32 or bfloat16.
struct AdamWTensor {
  std::uint16_t* weight;
  const void* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  bool narrow_gradient;
  // With an element's index it decides the random number of that element.
  std::uint64_t key;
};

// What one step multiplies with; see torch.optim.AdamW for the formula.
struct AdamWFactors {
  double sign;       // -1 to maximize
  double decay;      // 1 - lr * weight_decay
  double new_share;  // 1 - beta1
  double beta2;
  double new_square;  // 1 - beta2
  double root_scale;  // sqrt(1 - beta2^step)
  double eps;
  double minus_rate;  // -lr / (1 - beta1^step)
};

}  // namespace ipu

// Updates the elements [first, last) of the tensor.
IPU_DECLARE_LOOP(void, adamw_range, const ipu::AdamWTensor&, const ipu::AdamWFactors&,
                 std::int64_t first, std::int64_t last)
