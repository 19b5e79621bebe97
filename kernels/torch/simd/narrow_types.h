// bfloat16 and float16 as loops see them: 16 bits, widened to float32 and rounded back to nearest,
// ties to even. Include it in a simd/*.cpp only: the functions exist once per instruction set.

#pragma once

#include <bit>
#include <cstdint>

namespace ipu::IPU_ISA {
namespace {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
inline float widen(Float16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t shifted = magnitude << 13;
  // A subnormal is read as the fraction beside 2^-14, which is then taken away.
  const float subnormal = std::bit_cast<float>(shifted | 0x38800000u) - 0x1p-14f;
  const std::uint32_t normal = magnitude < 0x7c00u ? shifted + (112u << 23) : shifted | 0x7f800000u;
  const std::uint32_t value =
      magnitude < 0x0400u ? std::bit_cast<std::uint32_t>(subnormal) : normal;
  return std::bit_cast<float>(value | sign);
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
// The bits of x, rounded. Values in, values out: loops around these become vectors.
inline std::uint16_t nearest_bfloat16(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
}
inline std::uint16_t nearest_float16(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  // Beside 0.5 a float32 has steps of 2^-24, those of a float16 subnormal: the sum is rounded.
  const float beside_half = std::bit_cast<float>(magnitude) + 0.5f;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(beside_half) - 0x3f000000u;
  const std::uint32_t rebiased = magnitude - (112u << 23);
  const std::uint32_t normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? special : half;
  return static_cast<std::uint16_t>(half | (u >> 16 & 0x8000u));
}
inline void narrow(float x, BFloat16& out) { out.bits = nearest_bfloat16(x); }
inline void narrow(float x, Float16& out) { out.bits = nearest_float16(x); }

}  // namespace
}  // namespace ipu::IPU_ISA
