// The AdamW update of a range of one tensor.

#pragma once

#include <cstdint>

#include "isa.h"

namespace ipu {

enum class Number { float32, bfloat16, float16, float64 };

// One tensor of the list, contiguous. In float64 all four are; else the gradient and the two
// averages are float32 or of the weight's type.
struct AdamWTensor {
  void* weight;
  const void* gradient;
  void* exp_avg;
  void* exp_avg_sq;
  Number weight_type;
  Number gradient_type;
  Number average_type;
  // Round the weight to a neighbour at random, by numbers that `key` and the index decide.
  bool stochastic;
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
