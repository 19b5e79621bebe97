// A linear layer whose products run where they are fast, and which can add its weight gradient to
// the sum of the microbatches within the product.
//
// Axes: M rows of the input (all its leading dimensions), K input features, N output features. A
// weight is (N, K), or transposed (K, N); its gradient has the layout of the weight, which fused
// optimizers rely on.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "grad_sum.h"
#include "product.h"
#include "simd/add_narrow.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t ELEMENTS_PER_TASK = 1 << 16;

Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

Tensor linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                      bool transposed) {
  const Tensor weight_NK = transposed ? weight.t() : weight;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight_NK.size(0);
  return ipu::product_with_bias(rows_of(x), weight_NK, bias).reshape(shape);
}

// The two factors of a weight's gradient.
std::pair<Tensor, Tensor> factors(const Tensor& grad, const Tensor& x, bool transposed) {
  const Tensor grad_MN = rows_of(grad), x_MK = rows_of(x);
  return transposed ? std::pair(x_MK.t(), grad_MN) : std::pair(grad_MN.t(), x_MK);
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                           const Tensor& weight, bool transposed, bool needs_x,
                                           bool needs_weight) {
  Tensor x_grad, weight_grad;
  if (needs_x) {
    const Tensor grad_MN = rows_of(grad);
    x_grad = at::empty({grad_MN.size(0), x.size(-1)}, weight.options());
    ipu::product(grad_MN, transposed ? weight.t() : weight, x_grad);
    x_grad = x_grad.view(x.sizes());
  }
  if (needs_weight) {
    const auto [left, right] = factors(grad, x, transposed);
    weight_grad = at::empty(weight.sizes(), weight.options());
    ipu::product(left, right, weight_grad);
  }
  return {x_grad, weight_grad};
}

void add_weight_grad(const Tensor& sum, const Tensor& grad, const Tensor& x, bool transposed) {
  const auto [left, right] = factors(grad, x, transposed);
  if (grad.scalar_type() == at::kFloat) {
    ipu::product(left, right, sum, true);
    return;
  }
  const Tensor part = at::empty({left.size(0), right.size(1)}, left.options());
  ipu::product(left, right, part);
  const auto* values = static_cast<const uint16_t*>(part.const_data_ptr());
  float* sums = sum.mutable_data_ptr<float>();
  at::parallel_for(0, part.numel(), ELEMENTS_PER_TASK, [&](int64_t begin, int64_t end) {
    IPU_LOOP(add_bf16)(values + begin, sums + begin, end - begin);
  });
}

class Linear : public torch::autograd::Function<Linear> {
 public:
  // `narrow` is the weight in the type of `x`, if it does not have that type itself.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& narrow,
                        bool transposed) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ipu_pipeline::linear_forward", "")
                               .typed<decltype(linear_forward)>();
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight, narrow.value_or(Tensor())});
    ctx->saved_data["transposed"] = transposed;
    std::optional<Tensor> addend;
    if (bias) {
      ctx->saved_data["bias_type"] = bias->scalar_type();
      addend = bias->to(x.scalar_type());
    }
    return op.call(x, narrow.value_or(weight), addend, transposed);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ipu_pipeline::linear_backward", "")
                               .typed<decltype(linear_backward)>();
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                                "ipu_pipeline::linear has no second derivative");
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const Tensor& weight = saved[1];
    const Tensor& used = saved[2].defined() ? saved[2] : weight;
    const Tensor& grad = grads[0];
    const bool transposed = ctx->saved_data["transposed"].toBool();
    bool needs_weight = ctx->needs_input_grad(1);
    const bool addable = grad.scalar_type() == at::kFloat || grad.scalar_type() == at::kBFloat16;
    const Tensor sum = needs_weight && addable ? ipu::grad_sum_of(weight) : Tensor();
    if (sum.defined()) {
      add_weight_grad(sum, grad, x, transposed);
      needs_weight = false;
    }
    auto [x_grad, weight_grad] =
        op.call(grad, x, used, transposed, ctx->needs_input_grad(0), needs_weight);
    if (weight_grad.defined()) {
      weight_grad = weight_grad.to(weight.scalar_type());
    }
    Tensor bias_grad;
    if (ctx->saved_data.count("bias_type") != 0 && ctx->needs_input_grad(2)) {
      bias_grad = rows_of(grad).sum(0, false, ctx->saved_data["bias_type"].toScalarType());
    }
    return {x_grad, weight_grad, bias_grad, Tensor(), Tensor()};
  }
};

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& narrow, bool transposed) {
  return Linear::apply(x, weight, bias, narrow, transposed);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def("onednn_products() -> bool", &ipu::onednn_products);
  m.def("set_onednn_products(bool wish) -> bool", &ipu::set_onednn_products);
  m.def("widens_bfloat16() -> bool", &ipu::widens_bfloat16);
  m.def("set_widens_bfloat16(bool wish) -> bool", &ipu::set_widens_bfloat16);
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? narrow=None, "
      "bool transposed=False) -> Tensor",
      &linear);
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, bool transposed, bool needs_x, "
      "bool needs_weight) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ipu_pipeline, CPU, m) {
  m.impl("linear_forward", &linear_forward);
  m.impl("linear_backward", &linear_backward);
}
