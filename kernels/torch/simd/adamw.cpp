// AdamW in tiles: a tile of another type than float32 is widened into buffers that stay in the
// first cache, updated in float32, and rounded back. One pass over memory in all.

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
inline float from_bits(uint32_t x) { return __builtin_bit_cast(float, x); }
inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

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
constexpr uint32_t kInfinity = 0x7f800000u;

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

// ------------------------------------------------------------------ float16
constexpr uint32_t kHalfSmallest = 0x38800000u;  // 2^-14, the smallest normal float16
constexpr uint32_t kHalfLargest = 0x477fe000u;   // 65504
constexpr uint32_t kHalfRebias = 112u << 10;     // exponent 127 of float32 is 15 of float16

inline uint16_t stochastic_float16(float x, uint32_t noise) {
  const uint32_t u = bits_of(x) & 0x7fffffffu;
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t normal = ((u + (noise >> 19)) >> 13) - kHalfRebias;
  // Below 2^-14 the spacing is 2^-24: count in it, and go up where the noise is below the rest;
  // that is where the sign bit of their difference is set.
  const float count = from_bits(if_below(u, kHalfSmallest, u, 0u)) * 16777216.0f;
  const int32_t whole = static_cast<int32_t>(count);
  const float rest = (count - static_cast<float>(whole)) * 16777216.0f;
  const float chance = static_cast<float>(static_cast<int32_t>((noise >> 9) * 2u + 1u));
  const uint32_t subnormal = static_cast<uint32_t>(whole) + (bits_of(chance - rest) >> 31);
  // To nearest from the largest number on, as for bfloat16; 65520 is half way to 65536.
  const uint32_t infinite = if_below(kInfinity, u, 0x7e00u, 0x7c00u);
  const uint32_t large = if_below(u, 0x477ff000u, 0x7bffu, infinite);
  const uint32_t regular = if_below(u, kHalfLargest, normal, large);
  return static_cast<uint16_t>(sign | if_below(u, kHalfSmallest, subnormal, regular));
}

// ------------------------------------------------------------------ tiles
// Returns the n elements at `data`, or a widened copy of them in `buffer`.
template <typename Pointer>
float* widened(Pointer* data, Number type, float* __restrict buffer, int64_t first, int64_t n) {
  if (type == Number::float32) {
    return const_cast<float*>(static_cast<const float*>(data)) + first;
  }
  const uint16_t* __restrict narrow = static_cast<const uint16_t*>(data) + first;
  if (type == Number::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen(BFloat16{narrow[i]});
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen(Float16{narrow[i]});
  }
  return buffer;
}

void store_nearest(void* data, Number type, const float* __restrict x, int64_t first, int64_t n) {
  if (type == Number::float32) return;
  uint16_t* __restrict narrow = static_cast<uint16_t*>(data) + first;
  if (type == Number::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow[i] = nearest_bfloat16(x[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow[i] = nearest_float16(x[i]);
  }
}

void store_stochastic(const AdamWTensor& t, const float* __restrict x, int64_t first, int64_t n) {
  const Noise noise = noise_from(t.key, first);
  uint16_t* __restrict narrow = static_cast<uint16_t*>(t.weight) + first;
  if (t.weight_type == Number::bfloat16) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow[i] = stochastic_bfloat16(x[i], noise.at(i));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) narrow[i] = stochastic_float16(x[i], noise.at(i));
  }
}

// The update itself. The order of the operations is torch's, so that results agree to rounding.
template <typename T>
void update(T* __restrict weight, const T* __restrict gradient, T* __restrict exp_avg,
            T* __restrict exp_avg_sq, const AdamWFactors& f, int64_t n) {
  const T sign = f.sign, decay = f.decay, beta2 = f.beta2, new_square = f.new_square;
  const T root_scale = f.root_scale, eps = f.eps, minus_rate = f.minus_rate;
  // As torch.lerp: from the nearer end.
  const bool from_average = f.new_share < 0.5;
  const T share = from_average ? f.new_share : -(1 - static_cast<T>(f.new_share));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = sign * gradient[i];
    const T m = (from_average ? exp_avg[i] : g) + share * (g - exp_avg[i]);
    const T v = beta2 * exp_avg_sq[i] + new_square * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weight[i] = weight[i] * decay + minus_rate * m / (root(v) / root_scale + eps);
  }
}

void update_float64(const AdamWTensor& t, const AdamWFactors& f, int64_t first, int64_t n) {
  update(static_cast<double*>(t.weight) + first, static_cast<const double*>(t.gradient) + first,
         static_cast<double*>(t.exp_avg) + first, static_cast<double*>(t.exp_avg_sq) + first, f, n);
}

void update_tile(const AdamWTensor& t, const AdamWFactors& f, int64_t first, int64_t n) {
  alignas(64) float buffers[4][kTile];
  float* weight = widened(t.weight, t.weight_type, buffers[0], first, n);
  const float* gradient = widened(t.gradient, t.gradient_type, buffers[1], first, n);
  float* exp_avg = widened(t.exp_avg, t.average_type, buffers[2], first, n);
  float* exp_avg_sq = widened(t.exp_avg_sq, t.average_type, buffers[3], first, n);
  update(weight, gradient, exp_avg, exp_avg_sq, f, n);
  store_nearest(t.exp_avg, t.average_type, exp_avg, first, n);
  store_nearest(t.exp_avg_sq, t.average_type, exp_avg_sq, first, n);
  if (t.stochastic && t.weight_type != Number::float32) {
    store_stochastic(t, weight, first, n);
  } else {
    store_nearest(t.weight, t.weight_type, weight, first, n);
  }
}

}  // namespace

void adamw_range(const AdamWTensor& t, const AdamWFactors& f, int64_t first, int64_t last) {
  if (t.weight_type == Number::float64) return update_float64(t, f, first, last - first);
  while (first < last) {
    const int64_t to_next_tile = kTile - first % kTile;
    const int64_t n = last - first < to_next_tile ? last - first : to_next_tile;
    update_tile(t, f, first, n);
    first += n;
  }
}

}  // namespace ipu::IPU_ISA
