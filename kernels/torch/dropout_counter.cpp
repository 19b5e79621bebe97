// Dropout whose mask is a function of (seed, stream, offset + logical index of the element): it
// is computed again where it is needed, and never stored. See simd/dropout_counter.h.

#include "simd/dropout_counter.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 14;

// `threshold` of the 2^32 words are kept.
ipu::CounterDraw make_draw(int64_t threshold, int64_t seed, int64_t stream) {
  TORCH_CHECK(threshold >= 0 && threshold <= int64_t{1} << 32, "the threshold is ", threshold,
              "; it needs to be from 0 to 2^32");
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(stream),
          static_cast<uint32_t>(threshold - 1)};
}

// Half precision takes its mask from a buffer; it is not worth loops of its own.
void dropout_half(const at::Half* x, at::Half* out, int64_t first, int64_t count,
                  const ipu::CounterDraw& draw, double scale) {
  std::array<uint8_t, 4096> kept;
  for (int64_t done = 0; done < count; done += static_cast<int64_t>(kept.size())) {
    const int64_t here = std::min<int64_t>(kept.size(), count - done);
    IPU_LOOP(bernoulli_u8)(kept.data(), first + done, here, draw);
    for (int64_t i = 0; i < here; ++i) {
      const float scaled = static_cast<float>(x[done + i]) * static_cast<float>(scale);
      out[done + i] = kept[i] ? static_cast<at::Half>(scaled) : at::Half(0.0f);
    }
  }
}

void run(const at::Tensor& x, const at::Tensor& out, int64_t offset, const ipu::CounterDraw& draw,
         double scale) {
  const void* source = x.const_data_ptr();
  void* target = out.mutable_data_ptr();
  const at::ScalarType type = x.scalar_type();
  at::parallel_for(0, x.numel(), ELEMENTS_PER_TASK, [&](int64_t begin, int64_t end) {
    const auto apply = [&](auto loop, auto* from, auto* to) {
      loop(from + begin, to + begin, offset + begin, end - begin, draw, scale);
    };
    switch (type) {
      case at::kFloat:
        return apply(IPU_LOOP(dropout_f32), static_cast<const float*>(source),
                     static_cast<float*>(target));
      case at::kDouble:
        return apply(IPU_LOOP(dropout_f64), static_cast<const double*>(source),
                     static_cast<double*>(target));
      case at::kBFloat16:
        return apply(IPU_LOOP(dropout_bf16), static_cast<const uint16_t*>(source),
                     static_cast<uint16_t*>(target));
      default:
        return apply(&dropout_half, static_cast<const at::Half*>(source),
                     static_cast<at::Half*>(target));
    }
  });
}

at::Tensor dropout_counter(const at::Tensor& x, double scale, int64_t threshold, int64_t seed,
                           int64_t stream, int64_t offset) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
      "dropout of ", type, " is not supported; use a floating-point type");
  const ipu::CounterDraw draw = make_draw(threshold, seed, stream);
  at::Tensor out = at::empty_like(x);
  if (threshold == 0) {
    return out.zero_();
  }
  if (x.is_contiguous() && out.is_contiguous()) {
    run(x, out, offset, draw, scale);
    return out;
  }
  const at::Tensor ordered = x.contiguous();
  const at::Tensor result = out.is_contiguous() ? out : at::empty_like(ordered);
  run(ordered, result, offset, draw, scale);
  return out.is_contiguous() ? out : out.copy_(result);
}

void bernoulli_counter_(at::Tensor& out, int64_t threshold, int64_t seed, int64_t stream,
                        int64_t offset) {
  const ipu::CounterDraw draw = make_draw(threshold, seed, stream);
  if (threshold == 0) {
    out.zero_();
    return;
  }
  const bool direct =
      out.is_contiguous() && (out.scalar_type() == at::kFloat || out.scalar_type() == at::kBool ||
                              out.scalar_type() == at::kByte);
  const at::Tensor target = direct ? out : at::empty(out.sizes(), out.options().dtype(at::kByte));
  void* data = target.mutable_data_ptr();
  const bool is_float = target.scalar_type() == at::kFloat;
  at::parallel_for(0, target.numel(), ELEMENTS_PER_TASK, [&](int64_t begin, int64_t end) {
    if (is_float) {
      IPU_LOOP(bernoulli_f32)(static_cast<float*>(data) + begin, offset + begin, end - begin, draw);
    } else {
      IPU_LOOP(bernoulli_u8)(static_cast<uint8_t*>(data) + begin, offset + begin, end - begin,
                             draw);
    }
  });
  if (!direct) {
    out.copy_(target);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def(
      "dropout_counter(Tensor x, float scale, int threshold, int seed, int stream, int offset) "
      "-> Tensor");
  m.def(
      "bernoulli_counter_(Tensor(a!) out, int threshold, int seed, int stream, int offset) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(ipu_pipeline, CPU, m) {
  m.impl("dropout_counter", &dropout_counter);
  m.impl("bernoulli_counter_", &bernoulli_counter_);
}
