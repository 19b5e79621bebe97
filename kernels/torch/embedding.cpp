// Embedding lookups whose gradients are made by row. Axes: V rows of the table, H hidden size, N
// ids, U different ids among them.
//
// The gradient's temporary is U x H, never V x H. Ids are sorted together with their positions,
// so the gradients of a repeated id are summed in the order in which it occurs, by one thread,
// in at least float32: the bits do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "grad_sum.h"

namespace {

// Columns that one step sums: long enough for vectors, and several of them make a row, so that
// an id that fills the batch does not leave all its work to one thread.
constexpr int64_t COLUMNS = 128;
constexpr int64_t ELEMENTS_PER_TASK = 1 << 14;
constexpr int64_t BYTES_PER_TASK = 1 << 16;

at::Tensor embedding_serialized(const at::Tensor& ids, const at::Tensor& weight, int64_t first,
                                int64_t last, int64_t offset, bool split) {
  const at::Tensor id_N = ids.to(at::kLong).contiguous();
  const at::Tensor table_VH = weight.contiguous();
  const int64_t num_ids = id_N.numel();
  at::Tensor out_NH = at::empty({num_ids, table_VH.size(1)}, table_VH.options());
  const int64_t* id = id_N.const_data_ptr<int64_t>();
  if (!split) {
    for (int64_t n = 0; n < num_ids; ++n) {
      TORCH_CHECK_INDEX(id[n] >= first && id[n] < last, "id ", id[n],
                        " is out of range for a table of ", last, " rows");
    }
  }
  const int64_t row_bytes = table_VH.size(1) * table_VH.element_size();
  const char* source = static_cast<const char*>(table_VH.const_data_ptr());
  char* target = static_cast<char*>(out_NH.mutable_data_ptr());
  const int64_t grain = BYTES_PER_TASK / std::max<int64_t>(1, row_bytes) + 1;
  at::parallel_for(0, num_ids, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (id[n] >= first && id[n] < last) {
        std::memcpy(target + n * row_bytes, source + (id[n] - offset) * row_bytes, row_bytes);
      } else {
        std::memset(target + n * row_bytes, 0, row_bytes);
      }
    }
  });
  return out_NH;
}

// Returns (row of the table, position among the ids) of every id that gets a gradient, sorted.
std::vector<std::pair<int64_t, int64_t>> sorted_entries(const at::Tensor& ids, int64_t first,
                                                        int64_t last, int64_t offset,
                                                        int64_t padding_id) {
  const at::Tensor id_N = ids.to(at::kLong).contiguous();
  const int64_t* id = id_N.const_data_ptr<int64_t>();
  std::vector<std::pair<int64_t, int64_t>> entries;
  entries.reserve(id_N.numel());
  for (int64_t n = 0; n < id_N.numel(); ++n) {
    if (id[n] >= first && id[n] < last && id[n] != padding_id) {
      entries.emplace_back(id[n] - offset, n);
    }
  }
  std::sort(entries.begin(), entries.end());
  return entries;
}

// The rows of the table that get a gradient, ascending, and where the entries of each begin.
struct Rows {
  explicit Rows(std::vector<std::pair<int64_t, int64_t>> sorted) : entries(std::move(sorted)) {
    for (size_t i = 0; i < entries.size(); ++i) {
      if (i == 0 || entries[i].first != entries[i - 1].first) {
        starts.push_back(static_cast<int64_t>(i));
      }
    }
    starts.push_back(static_cast<int64_t>(entries.size()));
  }

  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }

  // Calls `with(u, column, columns, sum)` with the sum of row u's gradients between two columns.
  template <typename scalar_t, typename With>
  void for_each_sum(const at::Tensor& grad_NH, With with) const {
    const int64_t hidden = grad_NH.size(1);
    const int64_t pieces = (hidden + COLUMNS - 1) / COLUMNS;
    const scalar_t* source = grad_NH.const_data_ptr<scalar_t>();
    at::parallel_for(0, pieces * count(), ELEMENTS_PER_TASK / COLUMNS,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t task = begin; task < end; ++task) {
                         const int64_t column = task / count() * COLUMNS;
                         const int64_t u = task % count();
                         const int64_t columns = std::min(COLUMNS, hidden - column);
                         std::array<at::opmath_type<scalar_t>, COLUMNS> sum{};
                         for (int64_t i = starts[u]; i < starts[u + 1]; ++i) {
                           const scalar_t* row = source + entries[i].second * hidden + column;
                           for (int64_t h = 0; h < columns; ++h) {
                             sum[h] += static_cast<at::opmath_type<scalar_t>>(row[h]);
                           }
                         }
                         with(u, column, columns, sum.data());
                       }
                     });
  }

  std::vector<std::pair<int64_t, int64_t>> entries;  // as of sorted_entries
  std::vector<int64_t> starts;                       // one more than rows
};

std::tuple<at::Tensor, at::Tensor> embedding_serialized_backward(const at::Tensor& grad,
                                                                 const at::Tensor& ids,
                                                                 int64_t first, int64_t last,
                                                                 int64_t offset, int64_t padding_id,
                                                                 bool by_frequency) {
  TORCH_CHECK(grad.dim() == 2 && grad.size(0) == ids.numel(), "the gradient has shape ",
              grad.sizes(), " for ", ids.numel(), " ids; it needs one row for each");
  const Rows found(sorted_entries(ids, first, last, offset, padding_id));
  const at::Tensor grad_NH = grad.contiguous();
  const int64_t hidden = grad_NH.size(1);
  at::Tensor rows_U = at::empty({found.count()}, ids.options().dtype(at::kLong));
  at::Tensor values_UH = at::empty({found.count(), hidden}, grad_NH.options());
  int64_t* rows = rows_U.mutable_data_ptr<int64_t>();
  for (int64_t u = 0; u < found.count(); ++u) {
    rows[u] = found.entries[found.starts[u]].first;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, grad_NH.scalar_type(), "embedding_serialized_backward", [&] {
        scalar_t* target = values_UH.mutable_data_ptr<scalar_t>();
        found.for_each_sum<scalar_t>(
            grad_NH, [&](int64_t u, int64_t column, int64_t columns, const auto* sum) {
              using sum_t = at::opmath_type<scalar_t>;
              const auto divisor =
                  static_cast<sum_t>(by_frequency ? found.starts[u + 1] - found.starts[u] : 1);
              scalar_t* out = target + u * hidden + column;
              for (int64_t h = 0; h < columns; ++h) {
                out[h] = static_cast<scalar_t>(divisor == 1 ? sum[h] : sum[h] / divisor);
              }
            });
      });
  return {rows_U, values_UH};
}

// torch.nn.functional.embedding, which adds the rows of its gradient to a `.grad` that is there.
class Embedding : public torch::autograd::Function<Embedding> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& ids,
                            const at::Tensor& weight, int64_t padding_id) {
    ctx->save_for_backward({ids, weight});
    ctx->saved_data["padding_id"] = padding_id;
    const at::AutoDispatchBelowADInplaceOrView guard;
    return at::embedding(weight, ids, padding_id);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &ids = saved[0], &weight = saved[1], &grad = grads[0];
    const int64_t padding_id = ctx->saved_data["padding_id"].toInt();
    if (!ctx->needs_input_grad(1)) return {at::Tensor(), at::Tensor(), at::Tensor()};
    const at::Tensor sum =
        grad.scalar_type() == at::kFloat ? ipu::grad_sum_of(weight) : at::Tensor();
    if (!sum.defined()) {
      const at::Tensor whole =
          at::embedding_dense_backward(grad, ids, weight.size(0), padding_id, false);
      return {at::Tensor(), whole, at::Tensor()};
    }
    const int64_t hidden = weight.size(1);
    const Rows found(sorted_entries(ids.reshape(-1), 0, weight.size(0), 0, padding_id));
    float* sums = sum.mutable_data_ptr<float>();
    found.for_each_sum<float>(grad.reshape({-1, hidden}).contiguous(),
                              [&](int64_t u, int64_t column, int64_t columns, const float* sum) {
                                float* row =
                                    sums + found.entries[found.starts[u]].first * hidden + column;
                                for (int64_t h = 0; h < columns; ++h) row[h] += sum[h];
                              });
    return {at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor embedding(const at::Tensor& ids, const at::Tensor& weight, int64_t padding_id) {
  return Embedding::apply(ids, weight, padding_id);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
  m.def("embedding(Tensor ids, Tensor weight, int padding_id) -> Tensor", &embedding);
  m.def(
      "embedding_serialized(Tensor ids, Tensor weight, int first, int last, int offset, "
      "bool split) -> Tensor");
  m.def(
      "embedding_serialized_backward(Tensor grad, Tensor ids, int first, int last, int offset, "
      "int padding_id, bool by_frequency) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ipu_pipeline, CPU, m) {
  m.impl("embedding_serialized", &embedding_serialized);
  m.impl("embedding_serialized_backward", &embedding_serialized_backward);
}
