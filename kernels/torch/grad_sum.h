// Backward passes that add a weight's gradient to its sum themselves.
//
// Autograd writes a gradient, reads it back and adds it; of a large weight that costs more than the
// gradient, and of a lookup's table, which gets a few rows, far more.

#pragma once

#include <ATen/core/Tensor.h>

namespace ipu {

// The dense float32 tensor that this backward pass adds the gradient of this weight to: its
// `.grad`, or what the caller named instead. Undefined if autograd is to have the gradient: the
// caller did not ask for it, there is no such tensor yet, or the gradient would go elsewhere, too
// (hooks, a second derivative, another tensor's).
at::Tensor grad_sum_of(const at::Tensor& weight);

}  // namespace ipu
