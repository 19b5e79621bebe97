// adamw_step: one AdamW step of a whole list of tensors in one parallel region.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
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

ipu::Number number_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ipu::Number::float32;
    case at::kBFloat16:
      return ipu::Number::bfloat16;
    case at::kHalf:
      return ipu::Number::float16;
    case at::kDouble:
      return ipu::Number::float64;
    default:
      TORCH_CHECK(false, "adamw_step: weights must be float32, bfloat16, float16 or float64, got ",
                  tensor.scalar_type());
  }
}

void check(const at::Tensor& weight, const at::Tensor& other, const char* name, size_t index) {
  TORCH_CHECK(other.sizes() == weight.sizes(), "adamw_step: ", name, " ", index, " has shape ",
              other.sizes(), ", its weight ", weight.sizes());
  const bool fits = other.scalar_type() == weight.scalar_type() ||
                    (other.scalar_type() == at::kFloat && weight.scalar_type() != at::kDouble);
  TORCH_CHECK(fits, "adamw_step: ", name, " ", index, " is ", other.scalar_type(),
              ", its weight ", weight.scalar_type(),
              "; it must be of the same type, or float32 where the weight has fewer bits");
}

double raised(const at::Tensor& step) { return step.item<double>() + 1; }

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

// A contiguous stand-in for a tensor that is not.
class Contiguous {
 public:
  explicit Contiguous(const at::Tensor& original)
      : original_(original), used_(original.contiguous()) {}
  void* data() const { return used_.data_ptr(); }
  // After a change: brings it to the original, and lets autograd know that it happened.
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

struct Work {
  ipu::AdamWTensor tensor;
  ipu::AdamWFactors factors;
  int64_t numel;
  int64_t start;  // on the line
};

void run(const std::vector<Work>& work, int64_t length) {
  const auto loop = IPU_LOOP(adamw_range);
  const int64_t pieces = (length + kPiece - 1) / kPiece;
  at::parallel_for(0, pieces, 1, [&](int64_t first_piece, int64_t last_piece) {
    const int64_t first = first_piece * kPiece;
    const int64_t last = std::min(last_piece * kPiece, length);
    auto item = std::upper_bound(work.begin(), work.end(), first,
                                 [](int64_t at, const Work& w) { return at < w.start; });
    for (--item; item != work.end() && item->start < last; ++item) {
      const int64_t from = std::max(first - item->start, int64_t{0});
      const int64_t to = std::min(last - item->start, item->numel);
      if (from < to) loop(item->tensor, item->factors, from, to);
    }
  });
}

void adamw_step(at::TensorList weights, at::TensorList gradients, at::TensorList exp_avgs,
                at::TensorList exp_avg_sqs, at::TensorList steps, double lr, double beta1,
                double beta2, double weight_decay, double eps, bool maximize,
                at::IntArrayRef keys) {
  const size_t count = weights.size();
  TORCH_CHECK(gradients.size() == count && exp_avgs.size() == count &&
                  exp_avg_sqs.size() == count && steps.size() == count &&
                  (keys.empty() || keys.size() == count),
              "adamw_step: ", count, " weights, but ", gradients.size(), " gradients, ",
              exp_avgs.size(), " and ", exp_avg_sqs.size(), " averages, ", steps.size(),
              " steps, ", keys.size(), " keys; all lists must be equally long (keys may be empty)");
  // Everything is checked before anything is changed.
  for (size_t i = 0; i < count; ++i) {
    number_of(weights[i]);
    check(weights[i], gradients[i], "gradient", i);
    check(weights[i], exp_avgs[i], "exp_avg", i);
    check(weights[i], exp_avg_sqs[i], "exp_avg_sq", i);
    TORCH_CHECK(exp_avgs[i].scalar_type() == exp_avg_sqs[i].scalar_type(), "adamw_step: exp_avg ",
                i, " is ", exp_avgs[i].scalar_type(), ", exp_avg_sq ",
                exp_avg_sqs[i].scalar_type(), "; they must be of one type");
  }
  const Settings settings{lr, beta1, beta2, weight_decay, eps, maximize};
  std::vector<Contiguous> written, read;
  written.reserve(3 * count);
  read.reserve(count);
  std::vector<Work> work;
  work.reserve(count);
  int64_t length = 0;
  std::optional<double> known_step;
  ipu::AdamWFactors known{};
  for (size_t i = 0; i < count; ++i) {
    const double step = raised(steps[i]);
    steps[i].fill_(step);
    if (step != known_step) {
      known_step = step;
      known = factors(settings, step);
    }
    if (weights[i].numel() == 0) continue;
    written.emplace_back(weights[i]);
    written.emplace_back(exp_avgs[i]);
    written.emplace_back(exp_avg_sqs[i]);
    read.emplace_back(gradients[i]);
    const ipu::AdamWTensor tensor{written.end()[-3].data(),
                                  read.back().data(),
                                  written.end()[-2].data(),
                                  written.end()[-1].data(),
                                  number_of(weights[i]),
                                  number_of(gradients[i]),
                                  number_of(exp_avgs[i]),
                                  !keys.empty(),
                                  keys.empty() ? 0 : static_cast<uint64_t>(keys[i])};
    work.push_back({tensor, known, weights[i].numel(), length});
    length += (weights[i].numel() + kLine - 1) / kLine * kLine;
  }
  run(work, length);
  for (const Contiguous& tensor : written) tensor.finish();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def(
      "adamw_step(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool maximize, int[] keys) -> ()");
}

TORCH_LIBRARY_IMPL(ipu_pipeline, CPU, m) { m.impl("adamw_step", &adamw_step); }
