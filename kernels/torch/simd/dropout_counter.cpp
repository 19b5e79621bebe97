#include "dropout_counter.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ipu::IPU_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

// A word lies in the lower half of a lane; the upper half may hold anything.
using Lanes = uint64_t __attribute__((vector_size(BYTES)));
using Words = uint32_t __attribute__((vector_size(BYTES / 2)));

constexpr int LANES = BYTES / 8;
constexpr int BLOCKS = 16;  // of a group
constexpr int GROUP = 4 * BLOCKS;
constexpr int AT_ONCE = 2;  // vectors in flight: hides the latency of the multiplication

inline Lanes all(uint64_t value) { return Lanes{} + value; }

// Full products of the lower halves. Compilers do not find this instruction on their own.
inline Lanes product(Lanes a, uint64_t b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)all(b));
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)all(b));
#elif defined(__x86_64__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)all(b));
#else
  return (a & all(0xffffffff)) * all(b);
#endif
}

inline void store(uint32_t* out, Lanes lanes) {
  const Words words = __builtin_convertvector(lanes, Words);
  std::memcpy(out, &words, sizeof(words));
}

// Ten rounds for AT_ONCE vectors of blocks; word w of block b goes to out[BLOCKS * w + b].
inline void philox(uint64_t block, const CounterDraw& draw, uint32_t* out) {
  Lanes c0[AT_ONCE], c1[AT_ONCE], c2[AT_ONCE], c3[AT_ONCE];
  Lanes lane{};
  for (int i = 0; i < LANES; ++i) {
    lane[i] = i;
  }
  for (int v = 0; v < AT_ONCE; ++v) {
    c0[v] = all(block + LANES * v) + lane;
    c1[v] = c0[v] >> 32;
    c2[v] = all(draw.stream);
    c3[v] = c2[v] >> 32;
  }
  uint32_t key0 = static_cast<uint32_t>(draw.seed);
  uint32_t key1 = static_cast<uint32_t>(draw.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (int v = 0; v < AT_ONCE; ++v) {
      const Lanes p0 = product(c0[v], 0xD2511F53);
      const Lanes p2 = product(c2[v], 0xCD9E8D57);
      c0[v] = (p2 >> 32) ^ c1[v] ^ all(key0);
      c2[v] = (p0 >> 32) ^ c3[v] ^ all(key1);
      c1[v] = p2;
      c3[v] = p0;
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  for (int v = 0; v < AT_ONCE; ++v) {
    store(out + LANES * v, c0[v]);
    store(out + LANES * v + BLOCKS, c1[v]);
    store(out + LANES * v + BLOCKS * 2, c2[v]);
    store(out + LANES * v + BLOCKS * 3, c3[v]);
  }
}

// Calls visit(words, position, count) with the words of every group from `first` on.
template <typename Visit>
inline void for_each_group(int64_t first, int64_t count, const CounterDraw& draw, Visit visit) {
  alignas(64) uint32_t words[GROUP];
  for (int64_t done = 0; done < count;) {
    const int64_t group = (first + done) / GROUP;
    const int64_t inside = (first + done) % GROUP;
    for (int b = 0; b < BLOCKS; b += LANES * AT_ONCE) {
      philox(static_cast<uint64_t>(group) * BLOCKS + b, draw, words + b);
    }
    const int64_t here = std::min(GROUP - inside, count - done);
    if (here == GROUP) {
      visit(words, done, GROUP);  // a constant count: a loop without remainder
    } else {
      visit(words + inside, done, here);
    }
    done += here;
  }
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Rounds to nearest even, as torch does; every NaN becomes the same one.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <typename T>
inline void dropout(const T* x, T* out, int64_t first, int64_t count, const CounterDraw& draw,
                    T scale) {
  const uint32_t limit = draw.limit;
  for_each_group(first, count, draw, [=](const uint32_t* words, int64_t at, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T scaled = x[at + i] * scale;
      out[at + i] = words[i] <= limit ? scaled : T(0);
    }
  });
}

template <typename T>
inline void bernoulli(T* out, int64_t first, int64_t count, const CounterDraw& draw) {
  const uint32_t limit = draw.limit;
  for_each_group(first, count, draw, [=](const uint32_t* words, int64_t at, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[at + i] = words[i] <= limit ? T(1) : T(0);
    }
  });
}

}  // namespace

void dropout_f32(const float* x, float* out, int64_t first, int64_t count, const CounterDraw& draw,
                 double scale) {
  dropout(x, out, first, count, draw, static_cast<float>(scale));
}

void dropout_f64(const double* x, double* out, int64_t first, int64_t count,
                 const CounterDraw& draw, double scale) {
  dropout(x, out, first, count, draw, scale);
}

void dropout_bf16(const uint16_t* x, uint16_t* out, int64_t first, int64_t count,
                  const CounterDraw& draw, double scale) {
  const uint32_t limit = draw.limit;
  const float factor = static_cast<float>(scale);
  for_each_group(first, count, draw, [=](const uint32_t* words, int64_t at, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t scaled = to_bf16(from_bf16(x[at + i]) * factor);
      out[at + i] = words[i] <= limit ? scaled : uint16_t(0);
    }
  });
}

void bernoulli_u8(uint8_t* out, int64_t first, int64_t count, const CounterDraw& draw) {
  bernoulli(out, first, count, draw);
}

void bernoulli_f32(float* out, int64_t first, int64_t count, const CounterDraw& draw) {
  bernoulli(out, first, count, draw);
}

}  // namespace ipu::IPU_ISA
