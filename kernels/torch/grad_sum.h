// Backward passes that add a weight's gradient to its `.grad` themselves.
//
// Autograd writes a gradient, reads it back and adds it; of a large weight that costs more than the
// gradient, and of a lookup's table, which gets a few rows, far more.

#pragma once

#include <ATen/core/Tensor.h>

namespace ipu {

// Whether this backward pass adds to the dense float32 `.grad` of this weight: the caller asked for
// it, and the gradient would go nowhere else (no hooks, no second derivative, not another
// tensor's).
bool adds_to_grad_of(const at::Tensor& weight);

}  // namespace ipu
