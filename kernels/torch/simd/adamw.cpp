// AdamW in tiles: a tile of bfloat16 weights is widened into buffers that stay in the first cache,
// updated in float32, and rounded back at random. One pass over memory in all.

#include "adamw.h"

#include "narrow_types.h"

namespace ipu::IPU_ISA {
namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

// Tiles start at multiples of this in the tensor, so that none crosses index 2^32.
constexpr int64_t kTile = 512;

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float root(float x) { return __builtin_sqrtf(x); }

// ------------------------------------------------------------------ random numbers
// Two rounds of an integer hash that spreads every input bit over the whole word ("lowbias32" and
// its successor, C. Wellons' hash-prospector, public domain), each with half of the key: 32 bits
// that only the key and the index decide. Philox would cost five times the multiplications.
inline uint32_t random_bits(uint32_t index, uint32_t low_key, uint32_t high_key) {
  uint32_t x = index + low_key;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  x = (x ^ (x >> 16)) + high_key;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

struct Noise {
  uint32_t index, low_key, high_key;
  uint32_t at(int64_t i) const {
    return random_bits(index + static_cast<uint32_t>(i), low_key, high_key);
  }
};

// The noise of the tile that starts at `first`.
Noise noise_from(uint64_t key, int64_t first) {
  const uint32_t wraps = static_cast<uint32_t>(static_cast<uint64_t>(first) >> 32);
  return {static_cast<uint32_t>(first), static_cast<uint32_t>(key),
          static_cast<uint32_t>(key >> 32) + wraps * 0x9e3779b9u};
}

// ------------------------------------------------------------------ bfloat16
// x < limit ? a : b for numbers below 2^31, in arithmetic: of nested conditions the compiler makes
// jumps, and then no vectors.
inline uint32_t if_below(uint32_t x, uint32_t limit, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - ((x - limit) >> 31);
  return (a & mask) | (b & ~mask);
}

// Adds noise below the kept bits and cuts. Beyond the largest number it rounds to nearest: noise
// must not make an infinity.
inline uint16_t stochastic_bfloat16(float x, uint32_t noise) {
  const uint32_t u = bits_of(x);
  const uint32_t cut = (u + (noise >> 16)) >> 16;
  return static_cast<uint16_t>(if_below(u & 0x7fffffffu, 0x7f7f0000u, cut, nearest_bfloat16(x)));
}

// ------------------------------------------------------------------ tiles
void widened(const uint16_t* __restrict narrow, float* __restrict buffer, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) buffer[i] = widen(BFloat16{narrow[i]});
}

// The update itself. The order of the operations is torch's, so that results agree to rounding.
void update(float* __restrict weight, const float* __restrict gradient, float* __restrict exp_avg,
            float* __restrict exp_avg_sq, const AdamWFactors& f, int64_t n) {
  const float sign = f.sign, decay = f.decay, beta2 = f.beta2, new_square = f.new_square;
  const float root_scale = f.root_scale, eps = f.eps, minus_rate = f.minus_rate;
  // As torch.lerp: from the nearer end.
  const bool from_average = f.new_share < 0.5;
  const float share = from_average ? f.new_share : -(1 - static_cast<float>(f.new_share));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = sign * gradient[i];
    const float m = (from_average ? exp_avg[i] : g) + share * (g - exp_avg[i]);
    const float v = beta2 * exp_avg_sq[i] + new_square * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weight[i] = weight[i] * decay + minus_rate * m / (root(v) / root_scale + eps);
  }
}

void update_tile(const AdamWTensor& t, const AdamWFactors& f, int64_t first, int64_t n) {
  alignas(64) float weight[kTile];
  alignas(64) float wide_gradient[kTile];
  widened(t.weight + first, weight, n);
  const float* gradient = wide_gradient;
  if (t.narrow_gradient) {
    widened(static_cast<const uint16_t*>(t.gradient) + first, wide_gradient, n);
  } else {
    gradient = static_cast<const float*>(t.gradient) + first;
  }
  update(weight, gradient, t.exp_avg + first, t.exp_avg_sq + first, f, n);
  const Noise noise = noise_from(t.key, first);
  uint16_t* __restrict narrow = t.weight + first;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow[i] = stochastic_bfloat16(weight[i], noise.at(i));
}

}  // namespace

void adamw_range(const AdamWTensor& t, const AdamWFactors& f, int64_t first, int64_t last) {
  while (first < last) {
    const int64_t to_next_tile = kTile - first % kTile;
    const int64_t n = last - first < to_next_tile ? last - first : to_next_tile;
    update_tile(t, f, first, n);
    first += n;
  }
}

}  // namespace ipu::IPU_ISA
