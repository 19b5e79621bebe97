// Inner loops exist once per instruction set; IPU_LOOP picks the one for this machine.
//
// A file simd/<op>.cpp defines its loops inside `namespace ipu::IPU_ISA`; it is compiled with
// IPU_ISA = baseline, avx2 and avx512. Its header declares them with IPU_DECLARE_LOOP, and a
// caller writes IPU_LOOP(name)(arguments).
//
// Files under simd/ include no torch header: an inline function of a header compiled with
// AVX-512 could be the copy that the linker keeps for all. A loop gives the same bits for the
// same arguments, however a caller cuts its work, so that results do not depend on threads.

#pragma once

namespace ipu {

enum class Isa { baseline, avx2, avx512 };

// The widest instruction set that this machine has and IPU_PIPELINE_ISA allows; found once.
Isa isa();
const char* isa_name();

}  // namespace ipu

// clang-format off
#if defined(__x86_64__)
#define IPU_DECLARE_LOOP(result, name, ...)                  \
  namespace ipu::baseline { result name(__VA_ARGS__); }      \
  namespace ipu::avx2 { result name(__VA_ARGS__); }          \
  namespace ipu::avx512 { result name(__VA_ARGS__); }
#define IPU_LOOP(name)                                       \
  (::ipu::isa() == ::ipu::Isa::avx512 ? &::ipu::avx512::name \
   : ::ipu::isa() == ::ipu::Isa::avx2 ? &::ipu::avx2::name   \
                                      : &::ipu::baseline::name)
#else
#define IPU_DECLARE_LOOP(result, name, ...) \
  namespace ipu::baseline { result name(__VA_ARGS__); }
#define IPU_LOOP(name) (&::ipu::baseline::name)
#endif
// clang-format on
