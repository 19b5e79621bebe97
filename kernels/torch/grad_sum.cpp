// Which weights a backward pass adds to itself.

#include "grad_sum.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <utility>

namespace {

// Set by a stage around its backward passes; for tensors of the CPU, torch runs a backward pass in
// the thread that asks for it.
thread_local bool adds_to_grad = false;

bool set_adds_to_grad(bool wish) { return std::exchange(adds_to_grad, wish); }

}  // namespace

namespace ipu {

bool adds_to_grad_of(const at::Tensor& weight) {
  using namespace torch::autograd::impl;
  if (!adds_to_grad || at::GradMode::is_enabled() || !weight.is_leaf() || !hooks(weight).empty() ||
      post_acc_grad_hooks(weight) != nullptr) {
    return false;
  }
  const auto accumulator = try_get_grad_accumulator(weight);
  if (accumulator != nullptr &&
      !(accumulator->pre_hooks().empty() && accumulator->post_hooks().empty())) {
    return false;
  }
  const at::Tensor& sum = weight.grad();
  return sum.defined() && sum.scalar_type() == at::kFloat && sum.layout() == at::kStrided &&
         sum.is_contiguous() && !sum.requires_grad();
}

}  // namespace ipu

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def("set_adds_to_grad(bool wish) -> bool", &set_adds_to_grad);
}
