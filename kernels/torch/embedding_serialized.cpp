// Embedding lookup and its gradient by row. Axes: V rows of the table, H hidden size, N ids,
// U different ids among them.
//
// The gradient's temporary is U x H, never V x H. Ids are sorted together with their positions,
// so the gradients of a repeated id are summed in the order in which it occurs, by one thread,
// in at least float32: the bits do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

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

// Writes the sum of some rows of `grad`, between two columns, to `out`; divided by `divisor`.
template <typename scalar_t>
void sum_rows(const scalar_t* grad, int64_t row_length, const std::pair<int64_t, int64_t>* from,
              const std::pair<int64_t, int64_t>* to, int64_t columns, int64_t divisor,
              scalar_t* out) {
  using sum_t = at::opmath_type<scalar_t>;
  std::array<sum_t, COLUMNS> sum{};
  for (const auto* entry = from; entry != to; ++entry) {
    const scalar_t* row = grad + entry->second * row_length;
    for (int64_t h = 0; h < columns; ++h) {
      sum[h] += static_cast<sum_t>(row[h]);
    }
  }
  for (int64_t h = 0; h < columns; ++h) {
    out[h] = static_cast<scalar_t>(divisor == 1 ? sum[h] : sum[h] / static_cast<sum_t>(divisor));
  }
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

std::tuple<at::Tensor, at::Tensor> embedding_serialized_backward(const at::Tensor& grad,
                                                                 const at::Tensor& ids,
                                                                 int64_t first, int64_t last,
                                                                 int64_t offset, int64_t padding_id,
                                                                 bool by_frequency) {
  TORCH_CHECK(grad.dim() == 2 && grad.size(0) == ids.numel(), "the gradient has shape ",
              grad.sizes(), " for ", ids.numel(), " ids; it needs one row for each");
  const auto entries = sorted_entries(ids, first, last, offset, padding_id);
  std::vector<int64_t> starts;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (i == 0 || entries[i].first != entries[i - 1].first) {
      starts.push_back(static_cast<int64_t>(i));
    }
  }
  const auto num_rows = static_cast<int64_t>(starts.size());
  starts.push_back(static_cast<int64_t>(entries.size()));
  const at::Tensor grad_NH = grad.contiguous();
  const int64_t hidden = grad_NH.size(1);
  at::Tensor rows_U = at::empty({num_rows}, ids.options().dtype(at::kLong));
  at::Tensor values_UH = at::empty({num_rows, hidden}, grad_NH.options());
  int64_t* rows = rows_U.mutable_data_ptr<int64_t>();
  for (int64_t u = 0; u < num_rows; ++u) {
    rows[u] = entries[starts[u]].first;
  }
  const int64_t pieces = (hidden + COLUMNS - 1) / COLUMNS;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, grad_NH.scalar_type(), "embedding_serialized_backward", [&] {
        const scalar_t* source = grad_NH.const_data_ptr<scalar_t>();
        scalar_t* target = values_UH.mutable_data_ptr<scalar_t>();
        const auto step = [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t column = task / num_rows * COLUMNS;
            const int64_t u = task % num_rows;
            const int64_t count = starts[u + 1] - starts[u];
            sum_rows(source + column, hidden, entries.data() + starts[u],
                     entries.data() + starts[u + 1], std::min(COLUMNS, hidden - column),
                     by_frequency ? count : 1, target + u * hidden + column);
          }
        };
        at::parallel_for(0, pieces * num_rows, ELEMENTS_PER_TASK / COLUMNS, step);
      });
  return {rows_U, values_UH};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ipu_pipeline, m) {
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
