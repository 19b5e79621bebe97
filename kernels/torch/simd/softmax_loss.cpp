// Sums run in kLanes partial sums, added in order at the end: the compiler keeps them in vectors,
// and the result does not depend on the width of these.

#include "softmax_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "narrow_types.h"

namespace ipu::IPU_ISA {
namespace {

using std::int64_t;

constexpr int kLanes = 64;

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// exp(x) for x <= 0 (up to rounding); relative error below 1.3e-7, that is 1.1 units of the last
// place, and 0 below -87.3, where float32 has no normal number. NaN stays NaN.
// exp(x) = 2^k * exp(r), |r| <= log(2) / 2, with the Taylor polynomial of degree 7 for exp(r).
inline float exponential(float x) {
  constexpr float kShift = 0x1.8p23f;  // a float32 beside it has steps of 1: adding it rounds
  const float inside = x < -87.3f ? -87.3f : x;
  const float shifted = inside * 0x1.715476p0f + kShift;
  const float k = shifted - kShift;
  const float r = (inside - k * 0x1.62ep-1f) - k * 0x1.0bfbe8p-15f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r * r + r) + 1.0f;
  const std::uint32_t power = (std::bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u;
  return x < -87.3f ? 0.0f : p * std::bit_cast<float>(power);
}
inline double exponential(double x) { return std::exp(x); }

// Calls body(lane, j) for every j below `count`, lanes in turn.
template <typename Body>
inline void in_lanes(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) body(lane, j + lane);
  }
  for (int lane = 0; j < count; ++lane, ++j) body(lane, j);
}

template <typename A>
A total(const A* lanes) {
  A sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

template <typename T, typename A>
A row_maximum(const T* z, int64_t count) {
  A best[kLanes];
  std::fill_n(best, kLanes, -std::numeric_limits<A>::infinity());
  in_lanes(count, [&](int lane, int64_t j) {
    const A value = widen(z[j]);
    best[lane] = value > best[lane] ? value : best[lane];
  });
  return *std::max_element(best, best + kLanes);
}

template <typename T, typename A>
A row_exponential_sum(const T* z, int64_t count, A maximum) {
  A sums[kLanes] = {};
  in_lanes(count,
           [&](int lane, int64_t j) { sums[lane] += exponential(A(widen(z[j])) - maximum); });
  return total(sums);
}

template <typename T, typename A>
A row_weighted_sum(const T* z, int64_t count, const A* weight) {
  A sums[kLanes] = {};
  if (weight == nullptr) {
    in_lanes(count, [&](int lane, int64_t j) { sums[lane] += widen(z[j]); });
  } else {
    in_lanes(count, [&](int lane, int64_t j) { sums[lane] += weight[j] * widen(z[j]); });
  }
  return total(sums);
}

template <typename T>
void tile_sums(const LogitTile& tile, const T* logits, T* copy, int64_t copy_stride,
               const TileSums& sums) {
  using A = Accumulator<T>;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const T* z = logits + row * tile.classes;
    const A maximum = row_maximum<T, A>(z, tile.classes);
    // Where every logit is -inf, any finite number gives the right sum, 0.
    const A shift = maximum == -std::numeric_limits<A>::infinity() ? A(0) : maximum;
    static_cast<A*>(sums.maximum)[row] = maximum;
    static_cast<A*>(sums.exponential)[row] = row_exponential_sum(z, tile.classes, shift);
    if (sums.weighted != nullptr) {
      static_cast<A*>(sums.weighted)[row] =
          row_weighted_sum(z, tile.classes, static_cast<const A*>(tile.class_weight));
    }
    const int64_t target = tile.target[row] - tile.first_class;
    if (target >= 0 && target < tile.classes) {
      static_cast<A*>(sums.at_target)[row] = widen(z[target]);
    }
    if (copy != nullptr) std::copy_n(z, tile.classes, copy + row * copy_stride);
  }
}

// What one row's loop needs; `emit` gets every gradient before it is rounded.
template <typename A>
struct Row {
  A log_sum_exp, probability, uniform;
  template <typename T>
  A gradient(T z, A weight) const {
    return probability * exponential(A(widen(z)) - log_sum_exp) - uniform * weight;
  }
};

template <typename T, typename A>
void row_gradient(const Row<A>& row, T* z, int64_t count, const A* weight, T* copy,
                  A* column_sums) {
  const auto run = [&](const auto& weight_of, const auto& keep) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const A gradient = row.gradient(z[j], weight_of(j));
      narrow(gradient, z[j]);
      keep(j, gradient);
    }
  };
  const auto keep_none = [](int64_t, A) {};
  const auto keep_copy = [&](int64_t j, A gradient) { narrow(gradient, copy[j]); };
  const auto keep_sum = [&](int64_t j, A gradient) { column_sums[j] += gradient; };
  const auto keep_both = [&](int64_t j, A gradient) {
    narrow(gradient, copy[j]);
    column_sums[j] += gradient;
  };
  const auto run_keeping = [&](const auto& weight_of) {
    if (copy != nullptr && column_sums != nullptr) return run(weight_of, keep_both);
    if (copy != nullptr) return run(weight_of, keep_copy);
    if (column_sums != nullptr) return run(weight_of, keep_sum);
    run(weight_of, keep_none);
  };
  if (weight == nullptr) {
    run_keeping([](int64_t) { return A(1); });
  } else {
    run_keeping([weight](int64_t j) { return weight[j]; });
  }
}

template <typename T>
void tile_gradient(const LogitTile& tile, T* logits, int64_t stride, T* copy, void* column_sums,
                   const RowFactors& factors) {
  using A = Accumulator<T>;
  const auto at = [](const void* values, int64_t row) {
    return static_cast<const A*>(values)[row];
  };
  const A* weight = static_cast<const A*>(tile.class_weight);
  A* sums = static_cast<A*>(column_sums);
  for (int64_t row = 0; row < tile.rows; ++row) {
    T* z = logits + row * stride;
    T* row_copy = copy == nullptr ? nullptr : copy + row * tile.classes;
    if (!factors.counted[row]) {
      std::fill_n(z, tile.classes, T{});
      if (copy != nullptr) std::fill_n(row_copy, tile.classes, T{});
      continue;
    }
    const Row<A> here{at(factors.log_sum_exp, row), at(factors.probability, row),
                      at(factors.uniform, row)};
    const int64_t target = tile.target[row] - tile.first_class;
    const bool has_target = target >= 0 && target < tile.classes;
    const T logit = z[has_target ? target : 0];
    row_gradient<T, A>(here, z, tile.classes, weight, row_copy, sums);
    if (has_target) {
      const A hard = at(factors.hard, row);
      const A gradient = here.gradient(logit, weight == nullptr ? A(1) : weight[target]) - hard;
      narrow(gradient, z[target]);
      static_cast<A*>(factors.at_target)[row] = gradient;
      if (copy != nullptr) row_copy[target] = T{};
      if (sums != nullptr) sums[target] -= hard;
    }
  }
}

template <typename Call>
void with_type(LogitType type, const Call& call) {
  switch (type) {
    case LogitType::float32:
      return call(float{});
    case LogitType::float64:
      return call(double{});
    case LogitType::bfloat16:
      return call(BFloat16{});
    case LogitType::float16:
      return call(Float16{});
  }
}

}  // namespace

void softmax_tile_sums(const LogitTile& tile, const void* logits, void* copy, int64_t copy_stride,
                       const TileSums& sums) {
  with_type(tile.type, [&](auto example) {
    using T = decltype(example);
    tile_sums(tile, static_cast<const T*>(logits), static_cast<T*>(copy), copy_stride, sums);
  });
}

void softmax_tile_gradient(const LogitTile& tile, void* logits, int64_t stride, void* copy,
                           void* column_sums, const RowFactors& factors) {
  with_type(tile.type, [&](auto example) {
    using T = decltype(example);
    tile_gradient(tile, static_cast<T*>(logits), stride, static_cast<T*>(copy), column_sums,
                  factors);
  });
}

}  // namespace ipu::IPU_ISA
