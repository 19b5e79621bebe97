// Which library computes a matrix product, and the calls of it.

#include "product.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <atomic>
#include <cstdlib>
#include <string_view>

#include "simd/isa.h"

// A function of libtorch_cpu that no header declares: null in a torch that changed it.
namespace at::native {
[[gnu::weak]] void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta,
                                 float alpha);
}  // namespace at::native

namespace ipu {
namespace {

// Below it a call of oneDNN costs about what it gains.
constexpr int64_t LEAST_MULTIPLICATIONS = 4 << 20;

bool processor_wants_onednn() {
#if defined(__x86_64__)
  return isa() == Isa::avx512 && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

using OnednnLinear = at::Tensor(const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, std::string_view,
                                c10::List<std::optional<at::Scalar>>,
                                std::optional<std::string_view>);

// oneDNN's linear layer, as torch.compile calls it; null where this torch has none.
const c10::TypedOperatorHandle<OnednnLinear>* onednn_linear() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<OnednnLinear>> {
    const auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
    try {
      return op->typed<OnednnLinear>();
    } catch (const c10::Error&) {
      return std::nullopt;  // another signature than in the torch this was written for
    }
  }();
  return found ? &*found : nullptr;
}

bool is_offered() { return &at::native::mkldnn_matmul != nullptr && onednn_linear() != nullptr; }

std::atomic<bool>& choice() {
  static std::atomic<bool> chosen = [] {
    const char* wish = std::getenv("IPU_PIPELINE_MATMUL");
    const std::string_view name = wish == nullptr ? "" : wish;
    return is_offered() && (name == "onednn" || (name != "mkl" && processor_wants_onednn()));
  }();
  return chosen;
}

bool goes_to_onednn(const at::Tensor& a, int64_t columns) {
  return onednn_products() && a.scalar_type() == at::kFloat &&
         a.numel() * columns >= LEAST_MULTIPLICATIONS;
}

std::atomic<bool>& widening() {
#if defined(__x86_64__)
  static std::atomic<bool> chosen = isa() != Isa::avx512;
#else
  static std::atomic<bool> chosen = false;
#endif
  return chosen;
}

bool is_widened(const at::Tensor& a) {
  return a.scalar_type() == at::kBFloat16 && widens_bfloat16();
}

}  // namespace

bool widens_bfloat16() { return widening().load(std::memory_order_relaxed); }

bool set_widens_bfloat16(bool wish) { return widening().exchange(wish); }

bool onednn_products() { return choice().load(std::memory_order_relaxed); }

bool set_onednn_products(bool wish) { return choice().exchange(wish && is_offered()); }

void product(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  at::Tensor result = out;
  if (is_widened(a)) {
    const at::Tensor wide = add ? out.to(at::kFloat) : at::empty(out.sizes(), at::kFloat);
    product(a.to(at::kFloat), b.to(at::kFloat), wide, add);
    result.copy_(wide);
  } else if (goes_to_onednn(a, b.size(1))) {
    at::native::mkldnn_matmul(a, b, result, add ? 1.0f : 0.0f, 1.0f);
  } else if (add) {
    result.addmm_(a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

at::Tensor product_with_bias(const at::Tensor& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias) {
  if (is_widened(x)) {
    const auto wide_bias = bias ? std::optional(bias->to(at::kFloat)) : std::nullopt;
    return product_with_bias(x.to(at::kFloat), weight.to(at::kFloat), wide_bias)
        .to(x.scalar_type());
  }
  if (goes_to_onednn(x, weight.size(0))) {
    const c10::List<std::optional<at::Scalar>> no_scalars;
    return onednn_linear()->call(x, weight, bias, "none", no_scalars, "");
  }
  return at::linear(x, weight, bias);
}

}  // namespace ipu
