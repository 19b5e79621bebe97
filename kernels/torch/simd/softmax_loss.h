// The loops of a softmax whose row is spread over tiles of classes: first each tile says what it
// adds to the row's maximum and sum, then, with the row's log-sum-exp known, logits become the
// gradient of the loss.
//
// A tile is `rows` tokens by `classes` classes. Numbers that are not stored are float32, or float64
// for float64 logits ("accumulator type" below).

#pragma once

#include <cstdint>

#include "isa.h"

namespace ipu {

enum class LogitType { float32, float64, bfloat16, float16 };

struct LogitTile {
  LogitType type;
  std::int64_t rows;
  std::int64_t classes;
  // First class of the tile; `target` holds classes of the whole vocabulary.
  std::int64_t first_class;
  const std::int64_t* target;  // [rows]
  const void* class_weight;    // [classes] of the tile in the accumulator type, or null for ones
};

// Per row, in the accumulator type.
struct TileSums {
  void* maximum;      // of the logits
  void* exponential;  // sum of exp(logit - maximum)
  void* weighted;     // sum of class_weight * logit, or null
  void* at_target;    // the target's logit; untouched where the target is not in this tile
};

// Gradient of a logit: softmax * probability - uniform * class_weight, minus `hard` at the target.
struct RowFactors {
  const void* log_sum_exp;  // [rows] each, in the accumulator type
  const void* probability;
  const void* uniform;
  const void* hard;
  const bool* counted;  // a row that is not counted gets zeros
  void* at_target;      // receives the target's gradient, unrounded, if the target is in this tile
};

}  // namespace ipu

// Reads a contiguous tile; `copy`, if not null, receives it with `copy_stride` between rows.
IPU_DECLARE_LOOP(void, softmax_tile_sums, const ipu::LogitTile&, const void* logits, void* copy,
                 std::int64_t copy_stride, const ipu::TileSums&)

// Turns logits, with `stride` between rows, into their gradients in place; `copy`, if not null,
// receives them contiguously, with 0 at the target: there the two parts of the gradient have
// different sizes, and the caller adds `at_target` in its own precision. `column_sums` [classes],
// if not null, has all gradients added.
IPU_DECLARE_LOOP(void, softmax_tile_gradient, const ipu::LogitTile&, void* logits,
                 std::int64_t stride, void* copy, void* column_sums, const ipu::RowFactors&)
