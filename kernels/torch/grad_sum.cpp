// Which weights a backward pass adds to itself.

#include "grad_sum.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;

// Set by a stage around its backward passes; for tensors of the CPU, torch runs a backward pass in
// the thread that asks for it.
thread_local bool adds_to_grad = false;

// What it adds to, of passes that leave `.grad` alone; the weights outlive them.
thread_local std::unordered_map<const c10::TensorImpl*, Tensor> own_sums;

bool set_adds_to_grad(bool wish) { return std::exchange(adds_to_grad, wish); }

void set_grad_sums(const std::vector<Tensor>& weights, const std::vector<Tensor>& sums) {
  own_sums.clear();
  for (size_t i = 0; i < weights.size(); ++i) {
    own_sums.emplace(weights[i].unsafeGetTensorImpl(), sums[i]);
  }
}

}  // namespace

namespace ipu {

Tensor grad_sum_of(const Tensor& weight) {
  using namespace torch::autograd::impl;
  if (!adds_to_grad || at::GradMode::is_enabled() || !weight.is_leaf() || !hooks(weight).empty() ||
      post_acc_grad_hooks(weight) != nullptr) {
    return {};
  }
  const auto accumulator = try_get_grad_accumulator(weight);
  if (accumulator != nullptr &&
      !(accumulator->pre_hooks().empty() && accumulator->post_hooks().empty())) {
    return {};
  }
  Tensor sum;
  if (own_sums.empty()) {
    sum = weight.grad();
  } else if (const auto own = own_sums.find(weight.unsafeGetTensorImpl()); own != own_sums.end()) {
    sum = own->second;
  }
  const bool fits = sum.defined() && sum.scalar_type() == at::kFloat &&
                    sum.layout() == at::kStrided && sum.is_contiguous() && !sum.requires_grad();
  return fits ? sum : Tensor();
}

}  // namespace ipu

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def("set_adds_to_grad(bool wish) -> bool", &set_adds_to_grad);
  m.def("set_grad_sums(Tensor[] weights, Tensor[] sums) -> ()", &set_grad_sums);
}
