// adamw_step: one AdamW step of a list of bfloat16 weights in one parallel region, rounded at
// random.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd/adamw.h"

namespace {

// The tensors lie one after the other on a line, each rounded up to whole cache lines; threads
// take pieces of this many elements of the line, so small tensors share a piece.
constexpr int64_t kPiece = 32768;
constexpr int64_t kLine = 64;

struct Settings {
  double lr, beta1, beta2, weight_decay, eps;
  bool maximize;
};

struct Lists {
  at::TensorList weights, gradients, exp_avgs, exp_avg_sqs, steps;
  at::IntArrayRef keys;
};

void check_companion(const at::Tensor& weight, const at::Tensor& other, const char* name,
                     size_t index) {
  TORCH_CHECK(other.sizes() == weight.sizes(), "adamw_step: ", name, " ", index, " has shape ",
              other.sizes(), ", its weight ", weight.sizes());
  const bool gradient = other.scalar_type() == at::kBFloat16 && name[0] == 'g';
  TORCH_CHECK(gradient || other.scalar_type() == at::kFloat, "adamw_step: ", name, " ", index,
              " is ", other.scalar_type(), "; it must be float32 (a gradient may be bfloat16)");
}

// Everything is checked before anything is changed.
void check(const Lists& lists) {
  const auto& [weights, gradients, exp_avgs, exp_avg_sqs, steps, keys] = lists;
  const size_t count = weights.size();
  TORCH_CHECK(gradients.size() == count && exp_avgs.size() == count &&
                  exp_avg_sqs.size() == count && steps.size() == count && keys.size() == count,
              "adamw_step: ", count, " weights, but ", gradients.size(), " gradients, ",
              exp_avgs.size(), " and ", exp_avg_sqs.size(), " averages, ", steps.size(), " steps, ",
              keys.size(), " keys; all lists must be equally long");
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK(weights[i].scalar_type() == at::kBFloat16, "adamw_step: weight ", i, " is ",
                weights[i].scalar_type(), "; weights that are rounded at random are bfloat16");
    check_companion(weights[i], gradients[i], "gradient", i);
    check_companion(weights[i], exp_avgs[i], "exp_avg", i);
    check_companion(weights[i], exp_avg_sqs[i], "exp_avg_sq", i);
    TORCH_CHECK(steps[i].numel() == 1 &&
                    (steps[i].scalar_type() == at::kFloat || steps[i].scalar_type() == at::kDouble),
                "adamw_step: step ", i, " has ", steps[i].numel(), " elements of type ",
                steps[i].scalar_type(), "; it must be one float32 or float64");
  }
}

// Counts a step and returns its number, the first is 1.
double advance(const at::Tensor& step) {
  if (step.scalar_type() == at::kFloat) return *step.mutable_data_ptr<float>() += 1;
  return *step.mutable_data_ptr<double>() += 1;
}

ipu::AdamWFactors factors(const Settings& s, double step) {
  return {s.maximize ? -1.0 : 1.0,
          1 - s.lr * s.weight_decay,
          1 - s.beta1,
          s.beta2,
          1 - s.beta2,
          std::sqrt(1 - std::pow(s.beta2, step)),
          s.eps,
          -(s.lr / (1 - std::pow(s.beta1, step)))};
}

// A tensor that is written, and a contiguous stand-in for it where it is not contiguous itself.
class Written {
 public:
  explicit Written(const at::Tensor& original)
      : original_(original), used_(original.contiguous()) {}
  void* data() const { return used_.mutable_data_ptr(); }
  // After the change: brings it to the original, and lets autograd know that it happened.
  void finish() const {
    if (!used_.is_same(original_)) {
      original_.copy_(used_);
    } else if (!original_.is_inference()) {
      original_.unsafeGetTensorImpl()->bump_version();
    }
  }

 private:
  at::Tensor original_, used_;
};

struct Item {
  Written weight, exp_avg, exp_avg_sq;
  at::Tensor gradient;
  ipu::AdamWTensor tensor;
  ipu::AdamWFactors factors;
  int64_t numel;
  int64_t start;  // on the line
};

Item make_item(const Lists& lists, size_t i, const ipu::AdamWFactors& factors, int64_t start) {
  const at::Tensor& weight = lists.weights[i];
  Item item{Written(weight),
            Written(lists.exp_avgs[i]),
            Written(lists.exp_avg_sqs[i]),
            lists.gradients[i].contiguous(),
            {},
            factors,
            weight.numel(),
            start};
  item.tensor = {
      static_cast<uint16_t*>(item.weight.data()),   item.gradient.const_data_ptr(),
      static_cast<float*>(item.exp_avg.data()),     static_cast<float*>(item.exp_avg_sq.data()),
      item.gradient.scalar_type() == at::kBFloat16, static_cast<uint64_t>(lists.keys[i])};
  return item;
}

// Updates what lies in [first, last) of the line.
void update_line(const std::vector<Item>& line, int64_t first, int64_t last) {
  const auto loop = IPU_LOOP(adamw_range);
  auto item = std::upper_bound(line.begin(), line.end(), first,
                               [](int64_t at, const Item& i) { return at < i.start; });
  for (--item; item != line.end() && item->start < last; ++item) {
    const int64_t from = std::max(first - item->start, int64_t{0});
    const int64_t to = std::min(last - item->start, item->numel);
    if (from < to) loop(item->tensor, item->factors, from, to);
  }
}

void adamw_step(at::TensorList weights, at::TensorList gradients, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, at::TensorList steps, double lr, double beta1,
                double beta2, double weight_decay, double eps, bool maximize,
                at::IntArrayRef keys) {
  const Lists lists{weights, gradients, exp_avgs, exp_avg_sqs, steps, keys};
  check(lists);
  const Settings settings{lr, beta1, beta2, weight_decay, eps, maximize};
  std::vector<Item> line;
  line.reserve(weights.size());
  int64_t length = 0;
  double step = 0;
  ipu::AdamWFactors of_step{};
  for (size_t i = 0; i < weights.size(); ++i) {
    const double own_step = advance(steps[i]);
    if (own_step != step) of_step = factors(settings, step = own_step);
    if (weights[i].numel() == 0) continue;
    line.push_back(make_item(lists, i, of_step, length));
    length += (weights[i].numel() + kLine - 1) / kLine * kLine;
  }
  at::parallel_for(0, (length + kPiece - 1) / kPiece, 1, [&](int64_t first, int64_t last) {
    update_line(line, first * kPiece, std::min(last * kPiece, length));
  });
  for (const Item& item : line) {
    item.weight.finish();
    item.exp_avg.finish();
    item.exp_avg_sq.finish();
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def(
      "adamw_step(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool maximize, int[] keys) -> ()");
}

TORCH_LIBRARY_IMPL(ipu_pipeline, CPU, m) { m.impl("adamw_step", &adamw_step); }
