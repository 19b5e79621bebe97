// Random words that depend on (seed, stream, element) alone, and dropout drawn from them.
//
// The words are those of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011), keyed by the seed; a counter is (block, stream). Elements come in groups of
// 64, which share 16 blocks: element 16 w + b of group g has word w of block 16 g + b. So a group
// fills vectors without a shuffle, and any instruction set gives the same words.

#pragma once

#include <cstdint>

#include "isa.h"

namespace ipu {

// Which elements are kept: those with a word of at most `limit`.
struct CounterDraw {
  uint64_t seed;
  uint64_t stream;
  uint32_t limit;
};

}  // namespace ipu

// All of them work on `count` elements, of which `x` and `out` point to the first, and `first` is
// its index. `x` and `out` may be the same.
IPU_DECLARE_LOOP(void, dropout_f32, const float* x, float* out, int64_t first, int64_t count,
                 const CounterDraw& draw, double scale)
IPU_DECLARE_LOOP(void, dropout_f64, const double* x, double* out, int64_t first, int64_t count,
                 const CounterDraw& draw, double scale)
IPU_DECLARE_LOOP(void, dropout_bf16, const uint16_t* x, uint16_t* out, int64_t first, int64_t count,
                 const CounterDraw& draw, double scale)
// Writes 1 for what is kept, 0 for what is not.
IPU_DECLARE_LOOP(void, bernoulli_u8, uint8_t* out, int64_t first, int64_t count,
                 const CounterDraw& draw)
IPU_DECLARE_LOOP(void, bernoulli_f32, float* out, int64_t first, int64_t count,
                 const CounterDraw& draw)
