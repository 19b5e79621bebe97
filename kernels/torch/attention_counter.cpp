// Attention with counted dropout. Axes: B batch, H heads, L queries, S keys, E head size.
//
// One task is one head, computed by one thread in tiles of queries whose weights fit the cache;
// nothing of size L x S outlives a tile. So there is one parallel region per pass, and the bits
// depend neither on the number of threads nor on the other heads.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "product.h"
#include "simd/dropout_counter.h"
#include "simd/hide.h"

namespace {

using at::Tensor;

constexpr int64_t ELEMENTS_PER_TILE = 1 << 18;

struct Options {
  std::optional<Tensor> mask;   // (B, H, L, S): true is hidden, a number is added
  std::optional<Tensor> blind;  // (B, H, L, 1): queries that see no key
  double scale;
  double kept_scale;  // of the weights that are kept
  int64_t threshold;
  ipu::CounterDraw draw;
};

void drop(const Tensor& from, const Tensor& to, int64_t first, const Options& options) {
  if (options.threshold == 0) {
    to.zero_();
  } else if (from.scalar_type() == at::kDouble) {
    IPU_LOOP(dropout_f64)(from.const_data_ptr<double>(), to.mutable_data_ptr<double>(), first,
                          from.numel(), options.draw, options.kept_scale);
  } else {
    IPU_LOOP(dropout_f32)(from.const_data_ptr<float>(), to.mutable_data_ptr<float>(), first,
                          from.numel(), options.draw, options.kept_scale);
  }
}

// Torch computes attention with dropout in at least float32, too.
at::ScalarType wide(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Writes minus infinity where the mask (L, S) is true.
void hide(const Tensor& mask, const Tensor& scores) {
  if (scores.scalar_type() != at::kFloat || mask.stride(1) != 1) {
    Tensor(scores).masked_fill_(mask, -std::numeric_limits<double>::infinity());
    return;
  }
  for (int64_t row = 0; row < scores.size(0); ++row) {
    IPU_LOOP(hide_f32)(mask.const_data_ptr<bool>() + row * mask.stride(0),
                       scores.mutable_data_ptr<float>() + row * scores.stride(0), scores.size(1));
  }
}

// The head that a task works on, its tiles, and their buffers.
class Head {
 public:
  Head(const Tensor& q, const Tensor& k, const Options& options)
      : heads_(q.size(1)), length_(q.size(2)), keys_(k.size(2)), options_(options) {
    const int64_t most = std::max<int64_t>(1, ELEMENTS_PER_TILE / keys_);
    const int64_t tiles = (length_ + most - 1) / most;
    rows_ = (length_ + tiles - 1) / tiles;
    for (Tensor& buffer : buffers_) {
      buffer = at::empty({rows_, keys_}, q.options().dtype(wide(q)));
    }
  }

  Tensor of(const Tensor& x, int64_t task) const {
    return x.select(0, task / heads_).select(0, task % heads_);
  }
  int64_t rows() const { return rows_; }
  int64_t length() const { return length_; }
  int64_t first(int64_t task, int64_t row) const { return (task * length_ + row) * keys_; }
  Tensor buffer(int i, int64_t rows) const { return buffers_[i].narrow(0, 0, rows); }

  // Computes the softmax of some rows into buffer 1; overwrites buffer 0.
  Tensor softmax(const Tensor& scaled_q, const Tensor& k, int64_t task, int64_t row) const {
    const int64_t rows = scaled_q.size(0);
    Tensor scores = buffer(0, rows);
    Tensor result = buffer(1, rows);
    ipu::product(scaled_q, k.t(), scores);
    if (options_.mask) {
      const Tensor mask = of(*options_.mask, task).narrow(0, row, rows);
      if (mask.scalar_type() == at::kBool) {
        hide(mask, scores);
      } else {
        scores.add_(mask);
      }
    }
    at::_softmax_out(result, scores, -1, false);
    if (options_.blind) {
      const Tensor blind = of(*options_.blind, task).narrow(0, row, rows);
      if (blind.any().item<bool>()) {
        result.masked_fill_(blind, 0);
      }
    }
    return result;
  }

 private:
  int64_t heads_, length_, keys_, rows_;
  const Options& options_;
  Tensor buffers_[3];
};

Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value,
               const Options& options) {
  Tensor out =
      at::empty({query.size(0), query.size(1), query.size(2), value.size(3)}, value.options());
  const auto type = wide(query);
  at::parallel_for(0, query.size(0) * query.size(1), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Head head(query, key, options);
    for (int64_t task = begin; task < end; ++task) {
      const Tensor q = head.of(query, task).to(type).mul(options.scale);
      const Tensor k = head.of(key, task).to(type);
      const Tensor v = head.of(value, task).to(type);
      for (int64_t row = 0; row < head.length(); row += head.rows()) {
        const int64_t rows = std::min(head.rows(), head.length() - row);
        const Tensor weights = head.softmax(q.narrow(0, row, rows), k, task, row);
        drop(weights, weights, head.first(task, row), options);
        Tensor out_rows = at::empty({rows, v.size(1)}, v.options());
        ipu::product(weights, v, out_rows);
        head.of(out, task).narrow(0, row, rows).copy_(out_rows);
      }
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& query,
                                            const Tensor& key, const Tensor& value,
                                            const Options& options) {
  Tensor query_grad = at::empty_like(query);
  Tensor key_grad = at::empty_like(key);
  Tensor value_grad = at::empty_like(value);
  const auto type = wide(query);
  at::parallel_for(0, query.size(0) * query.size(1), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Head head(query, key, options);
    for (int64_t task = begin; task < end; ++task) {
      const Tensor q = head.of(query, task).to(type).mul(options.scale);
      const Tensor k = head.of(key, task).to(type);
      const Tensor v = head.of(value, task).to(type);
      const Tensor g = head.of(grad, task).to(type);
      Tensor k_grad = at::zeros(k.sizes(), k.options());
      Tensor v_grad = at::zeros(v.sizes(), v.options());
      for (int64_t row = 0; row < head.length(); row += head.rows()) {
        const int64_t rows = std::min(head.rows(), head.length() - row);
        const int64_t first = head.first(task, row);
        const Tensor q_rows = q.narrow(0, row, rows);
        const Tensor g_rows = g.narrow(0, row, rows);
        const Tensor softmax = head.softmax(q_rows, k, task, row);
        Tensor weights = head.buffer(0, rows);
        drop(softmax, weights, first, options);
        ipu::product(weights.t(), g_rows, v_grad, true);
        Tensor weights_grad = head.buffer(0, rows);
        ipu::product(g_rows, v.t(), weights_grad);
        drop(weights_grad, weights_grad, first, options);
        Tensor scores_grad = head.buffer(2, rows);
        at::_softmax_backward_data_out(scores_grad, weights_grad, softmax, -1, type);
        Tensor q_grad = at::empty({rows, k.size(1)}, k.options());
        ipu::product(scores_grad, k, q_grad);
        head.of(query_grad, task).narrow(0, row, rows).copy_(q_grad.mul_(options.scale));
        ipu::product(scores_grad.t(), q_rows, k_grad, true);
      }
      head.of(key_grad, task).copy_(k_grad);
      head.of(value_grad, task).copy_(v_grad);
    }
  });
  return {query_grad, key_grad, value_grad};
}

Options make_options(const std::optional<Tensor>& mask, const std::optional<Tensor>& blind,
                     double scale, double kept_scale, int64_t threshold, int64_t seed,
                     int64_t stream) {
  return {mask,
          blind,
          scale,
          kept_scale,
          threshold,
          {static_cast<uint64_t>(seed), static_cast<uint64_t>(stream),
           static_cast<uint32_t>(threshold - 1)}};
}

Tensor attention_counter(const Tensor& query, const Tensor& key, const Tensor& value,
                         const std::optional<Tensor>& mask, const std::optional<Tensor>& blind,
                         double scale, double kept_scale, int64_t threshold, int64_t seed,
                         int64_t stream) {
  return forward(query, key, value,
                 make_options(mask, blind, scale, kept_scale, threshold, seed, stream));
}

std::tuple<Tensor, Tensor, Tensor> attention_counter_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& blind, double scale,
    double kept_scale, int64_t threshold, int64_t seed, int64_t stream) {
  return backward(grad, query, key, value,
                  make_options(mask, blind, scale, kept_scale, threshold, seed, stream));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def(
      "attention_counter(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? blind, "
      "float scale, float kept_scale, int threshold, int seed, int stream) -> Tensor");
  m.def(
      "attention_counter_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
      "Tensor? mask, Tensor? blind, float scale, float kept_scale, int threshold, int seed, "
      "int stream) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ipu_pipeline, CPU, m) {
  m.impl("attention_counter", &attention_counter);
  m.impl("attention_counter_backward", &attention_counter_backward);
}
