// Output projection and cross entropy, slice of tokens by slice of tokens, without the full
// logits. Of a slice, tiles of classes run in parallel: the logits of a tile, what it adds to the
// softmax of its tokens, then its gradient and its rows of the weight's gradient. The gradient of
// the input runs over blocks of tokens.
//
// Tiles and blocks do not depend on the number of threads, and inside a parallel region a matmul
// of torch keeps to one thread: the result has the same bits for any number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "product.h"
#include "simd/softmax_loss.h"

namespace {

using at::Tensor;
using std::int64_t;

constexpr int64_t kTileClasses = 512;
// Fewer tokens cost a bfloat16 matmul a tenth of its speed.
constexpr int64_t kBlockTokens = 256;

template <typename Body>
void for_each(int64_t count, const Body& body) {
  // Of a single iteration torch would make no parallel region, so there are always two.
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    // Threads of the pool do not inherit what the caller has switched off.
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    for (int64_t i = begin; i < std::min(end, count); ++i) body(i);
  });
}

ipu::LogitType logit_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ipu::LogitType::float32;
    case at::kDouble:
      return ipu::LogitType::float64;
    case at::kBFloat16:
      return ipu::LogitType::bfloat16;
    case at::kHalf:
      return ipu::LogitType::float16;
    default:
      TORCH_CHECK_VALUE(false, "linear_cross_entropy: x is ", type,
                        "; use float32, float64, bfloat16 or float16");
  }
}

struct Loss {
  int64_t ignore_index;
  double smoothing;
};

struct Inputs {
  Tensor x, weight, target, bias, class_weight, scale;
};

struct Gradients {
  Tensor x, weight, bias;
  bool wanted() const { return x.defined() || weight.defined() || bias.defined(); }
};

void check(const Inputs& in, const Loss& loss, int64_t slice_tokens) {
  const int64_t tokens = in.x.dim() == 2 ? in.x.size(0) : -1;
  TORCH_CHECK_VALUE(tokens >= 0 && in.weight.dim() == 2 && in.x.size(1) == in.weight.size(1) &&
                        in.x.scalar_type() == in.weight.scalar_type(),
                    "linear_cross_entropy: x ", in.x.sizes(), " and weight ", in.weight.sizes(),
                    " must be N x H and V x H of one type");
  TORCH_CHECK_VALUE(in.target.scalar_type() == at::kLong && in.target.dim() == 1 &&
                        in.target.size(0) == tokens && slice_tokens > 0,
                    "linear_cross_entropy: needed are ", tokens, " int64 targets, not ",
                    in.target.sizes(), " of ", in.target.scalar_type(),
                    ", and slices of at least 1 token, not ", slice_tokens);
  for (const Tensor* vector : {&in.bias, &in.class_weight}) {
    TORCH_CHECK_VALUE(
        !vector->defined() || (vector->dim() == 1 && vector->size(0) == in.weight.size(0)),
        "linear_cross_entropy: bias and class weights need one entry for each of ",
        in.weight.size(0), " classes");
  }
  TORCH_CHECK_VALUE(!in.scale.defined() || (in.scale.dim() == 1 && in.scale.size(0) == tokens),
                    "linear_cross_entropy: the scale needs one entry for each of ", tokens,
                    " tokens");
  const int64_t* target = in.target.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < tokens; ++n) {
    TORCH_CHECK_INDEX(
        target[n] == loss.ignore_index || (target[n] >= 0 && target[n] < in.weight.size(0)),
        "linear_cross_entropy: target ", target[n], " is out of bounds for ", in.weight.size(0),
        " classes");
  }
}

// The slices of one call; A is the accumulator type.
template <typename A>
class Slices {
 public:
  Slices(const Inputs& in, const Loss& loss, const Gradients& gradients, int64_t most_tokens)
      : in_(in),
        loss_(loss),
        gradients_(gradients),
        classes_(in.weight.size(0)),
        num_tiles_((classes_ + kTileClasses - 1) / kTileClasses) {
    const auto numbers = in.x.options().dtype(c10::CppTypeToScalarType<A>::value);
    tile_sums_ = at::zeros({3, num_tiles_, most_tokens}, numbers);
    row_values_ = at::zeros({5, most_tokens}, numbers);
    counted_ = at::empty({most_tokens}, in.x.options().dtype(at::kBool));
    buffers_ = at::empty({at::get_num_threads(), most_tokens * std::min(classes_, kTileClasses)},
                         in.x.options());
    if (gradients.wanted()) chunk_ = at::empty({most_tokens, classes_}, in.x.options());
    target_gradients_ = at::zeros({in.x.size(0)}, numbers);
    if (gradients.bias.defined()) bias_sums_ = at::zeros({classes_}, numbers);
    class_weight_sum_ = static_cast<double>(classes_);
    if (in.class_weight.defined()) {
      class_weights_ = in.class_weight.template const_data_ptr<A>();
      class_weight_sum_ = 0;
      for (int64_t v = 0; v < classes_; ++v) class_weight_sum_ += class_weights_[v];
    }
  }

  void run(int64_t first, int64_t tokens, A* losses) {
    first_ = first;
    tokens_ = tokens;
    x_ = in_.x.narrow(0, first, tokens);
    target_ = in_.target.template const_data_ptr<int64_t>() + first;
    for_each(num_tiles_, [this](int64_t tile) { logits_of(tile); });
    for_each((tokens + kBlockTokens - 1) / kBlockTokens, [&](int64_t block) {
      const int64_t end = std::min(tokens, (block + 1) * kBlockTokens);
      for (int64_t row = block * kBlockTokens; row < end; ++row) losses[row] = finish_row(row);
    });
    if (!gradients_.wanted()) return;
    for_each(num_tiles_, [this](int64_t tile) { gradient_of(tile); });
    if (!gradients_.x.defined()) return;
    for_each((tokens + kBlockTokens - 1) / kBlockTokens, [&](int64_t block) {
      const int64_t start = block * kBlockTokens;
      const int64_t count = std::min(kBlockTokens, tokens - start);
      ipu::product(chunk_.narrow(0, start, count), in_.weight,
                   gradients_.x.narrow(0, first + start, count));
    });
  }

  void finish() {
    if (gradients_.bias.defined()) gradients_.bias.copy_(bias_sums_);
    if (!gradients_.weight.defined()) return;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, in_.x.scalar_type(), "target_rows",
                                    [&] { add_target_rows<scalar_t>(); });
  }

 private:
  // Adds what the tokens' own classes contribute to the weight's gradient. It is most of these
  // rows: in half precision, rounding it once more for every later slice would show.
  template <typename T>
  void add_target_rows() const {
    const int64_t* target = in_.target.template const_data_ptr<int64_t>();
    std::vector<int64_t> tokens;
    for (int64_t n = 0; n < in_.x.size(0); ++n) {
      if (target[n] != loss_.ignore_index) tokens.push_back(n);
    }
    std::stable_sort(tokens.begin(), tokens.end(),
                     [&](int64_t a, int64_t b) { return target[a] < target[b]; });
    std::vector<size_t> starts;
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (i == 0 || target[tokens[i]] != target[tokens[i - 1]]) starts.push_back(i);
    }
    starts.push_back(tokens.size());
    const int64_t hidden = in_.x.size(1);
    const T* x = in_.x.template const_data_ptr<T>();
    const A* factors = target_gradients_.template const_data_ptr<A>();
    T* rows = gradients_.weight.template mutable_data_ptr<T>();
    for_each(static_cast<int64_t>(starts.size()) - 1, [&](int64_t group) {
      T* row = rows + target[tokens[starts[group]]] * hidden;
      std::vector<A> sum(row, row + hidden);
      for (size_t i = starts[group]; i < starts[group + 1]; ++i) {
        const T* x_n = x + tokens[i] * hidden;
        for (int64_t h = 0; h < hidden; ++h) sum[h] += factors[tokens[i]] * static_cast<A>(x_n[h]);
      }
      for (int64_t h = 0; h < hidden; ++h) row[h] = static_cast<T>(sum[h]);
    });
  }

  struct Tile {
    ipu::LogitTile loop;
    Tensor buffer;
    void* chunk;
  };

  Tile tile_at(int64_t index) const {
    const int64_t first = index * kTileClasses;
    const int64_t classes = std::min(kTileClasses, classes_ - first);
    const A* class_weight = class_weights_ == nullptr ? nullptr : class_weights_ + first;
    Tensor buffer =
        buffers_[at::get_thread_num()].narrow(0, 0, tokens_ * classes).view({tokens_, classes});
    void* chunk = nullptr;
    if (chunk_.defined()) {
      chunk = static_cast<char*>(chunk_.mutable_data_ptr()) + first * chunk_.element_size();
    }
    return {{logit_type(in_.x.scalar_type()), tokens_, classes, first, target_, class_weight},
            buffer,
            chunk};
  }

  A* tile_sum(int64_t which, int64_t tile) const {
    return tile_sums_.template mutable_data_ptr<A>() +
           (which * num_tiles_ + tile) * tile_sums_.size(2);
  }
  A* row_value(int64_t which) const {
    return row_values_.template mutable_data_ptr<A>() + which * row_values_.size(1);
  }

  void logits_of(int64_t index) {
    Tile tile = tile_at(index);
    const Tensor weight = in_.weight.narrow(0, tile.loop.first_class, tile.loop.classes);
    if (in_.bias.defined()) {
      tile.buffer.copy_(in_.bias.narrow(0, tile.loop.first_class, tile.loop.classes));
    }
    ipu::product(x_, weight.t(), tile.buffer, /*add=*/in_.bias.defined());
    const ipu::TileSums sums{tile_sum(0, index), tile_sum(1, index),
                             loss_.smoothing > 0 ? tile_sum(2, index) : nullptr, row_value(0)};
    IPU_LOOP(softmax_tile_sums)
    (tile.loop, tile.buffer.const_data_ptr(), tile.chunk, classes_, sums);
  }

  // Joins the tiles of a row; returns its loss and leaves what its gradient needs.
  A finish_row(int64_t row) {
    double maximum = -std::numeric_limits<double>::infinity(), sum = 0, weighted = 0;
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      maximum = std::max<double>(maximum, tile_sum(0, tile)[row]);
      weighted += tile_sum(2, tile)[row];
    }
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      const double part = tile_sum(1, tile)[row];
      if (part != 0) sum += part * std::exp(tile_sum(0, tile)[row] - maximum);
    }
    const double log_sum_exp = maximum + std::log(sum);
    const int64_t target = target_[row];
    const bool counted = target != loss_.ignore_index;
    counted_.template mutable_data_ptr<bool>()[row] = counted;
    if (!counted) return 0;
    const double hard =
        (1 - loss_.smoothing) * (class_weights_ == nullptr ? 1.0 : double{class_weights_[target]});
    const double uniform = loss_.smoothing / static_cast<double>(classes_);
    const double scale =
        in_.scale.defined() ? double{in_.scale.template const_data_ptr<A>()[first_ + row]} : 0.0;
    row_value(1)[row] = static_cast<A>(log_sum_exp);
    row_value(2)[row] = static_cast<A>(scale * (hard + uniform * class_weight_sum_));
    row_value(3)[row] = static_cast<A>(scale * uniform);
    row_value(4)[row] = static_cast<A>(scale * hard);
    double loss = hard * (log_sum_exp - row_value(0)[row]);
    if (uniform > 0) loss += uniform * (class_weight_sum_ * log_sum_exp - weighted);
    return static_cast<A>(loss);
  }

  void gradient_of(int64_t index) {
    Tile tile = tile_at(index);
    const int64_t first = tile.loop.first_class;
    const ipu::RowFactors factors{row_value(1),
                                  row_value(2),
                                  row_value(3),
                                  row_value(4),
                                  counted_.template const_data_ptr<bool>(),
                                  target_gradients_.template mutable_data_ptr<A>() + first_};
    A* column_sums =
        bias_sums_.defined() ? bias_sums_.template mutable_data_ptr<A>() + first : nullptr;
    void* copy = gradients_.weight.defined() ? tile.buffer.mutable_data_ptr() : nullptr;
    IPU_LOOP(softmax_tile_gradient)
    (tile.loop, tile.chunk, classes_, copy, column_sums, factors);
    if (!gradients_.weight.defined()) return;
    const Tensor rows = gradients_.weight.narrow(0, first, tile.loop.classes);
    ipu::product(tile.buffer.t(), x_, rows, /*add=*/first_ > 0);
  }

  const Inputs& in_;
  const Loss loss_;
  const Gradients gradients_;
  const int64_t classes_;
  const int64_t num_tiles_;
  const A* class_weights_ = nullptr;
  double class_weight_sum_ = 0;
  // [3, tiles, tokens]: maximum, sum of exponentials, weighted sum of the logits.
  Tensor tile_sums_;
  // [5, tokens]: the target's logit, log-sum-exp, and the three factors of the gradient.
  Tensor row_values_;
  Tensor counted_;
  // One tile for each thread.
  Tensor buffers_;
  // The slice's logits, then their gradient.
  Tensor chunk_;
  Tensor bias_sums_;
  // [N]: the gradient of every token's target logit.
  Tensor target_gradients_;
  int64_t first_ = 0;
  int64_t tokens_ = 0;
  Tensor x_;
  const int64_t* target_ = nullptr;
};

template <typename A>
Tensor run(const Inputs& in, const Loss& loss, const Gradients& gradients, int64_t slice_tokens) {
  const int64_t tokens = in.x.size(0);
  Tensor losses = at::empty({tokens}, in.x.options().dtype(c10::CppTypeToScalarType<A>::value));
  Slices<A> slices(in, loss, gradients, std::min(tokens, slice_tokens));
  for (int64_t first = 0; first < tokens; first += slice_tokens) {
    slices.run(first, std::min(slice_tokens, tokens - first),
               losses.template mutable_data_ptr<A>() + first);
  }
  slices.finish();
  return losses;
}

Tensor empty_or_zero(bool wanted, const Tensor& like, bool zero) {
  if (!wanted) return {};
  return zero ? at::zeros(like.sizes(), like.options()) : at::empty(like.sizes(), like.options());
}

Tensor or_nothing(const Tensor& gradient, const Tensor& x) {
  return gradient.defined() ? gradient : at::empty({0}, x.options());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& x, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& class_weight, const std::optional<Tensor>& scale,
    int64_t ignore_index, double label_smoothing, int64_t slice_tokens, bool need_x,
    bool need_weight, bool need_bias) {
  const at::ScalarType numbers = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto as_numbers = [&](const std::optional<Tensor>& values) {
    return values ? values->to(numbers).contiguous() : Tensor();
  };
  const Inputs in{x.contiguous(),           weight,
                  target.contiguous(),      bias.value_or(Tensor()),
                  as_numbers(class_weight), as_numbers(scale)};
  const Loss loss{ignore_index, label_smoothing};
  check(in, loss, slice_tokens);
  Gradients gradients;
  if (scale) {
    // With tokens, every element is written before it is read.
    const bool zero = x.size(0) == 0;
    gradients = {empty_or_zero(need_x, x, zero), empty_or_zero(need_weight, weight, zero),
                 empty_or_zero(need_bias && bias, in.bias, zero)};
  }
  logit_type(x.scalar_type());
  const Tensor losses = numbers == at::kDouble ? run<double>(in, loss, gradients, slice_tokens)
                                               : run<float>(in, loss, gradients, slice_tokens);
  return {losses, or_nothing(gradients.x, x), or_nothing(gradients.weight, x),
          or_nothing(gradients.bias, x)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? class_weight, Tensor? scale, int ignore_index, float label_smoothing, "
      "int slice_tokens, bool need_x, bool need_weight, bool need_bias) -> "
      "(Tensor losses, Tensor x_gradient, Tensor weight_gradient, Tensor bias_gradient)");
}

TORCH_LIBRARY_IMPL(ipu_pipeline, CPU, m) { m.impl("linear_cross_entropy", &linear_cross_entropy); }
