// Picks the instruction set of the tile kernels when the process first asks.

#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(DLA_WITH_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dla_fast::cpu {
namespace {

constexpr Isa kIsas[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx, Isa::amx_emulated};

#if defined(DLA_WITH_AVX512_BF16)
// Asked of the processor itself: which names __builtin_cpu_supports knows depends on the compiler.
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 &&
         (a & (1u << 5)) != 0;
}
#endif

#if defined(DLA_WITH_AMX)
bool has_amx() {
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, osxsave = 1u << 27, xtile = 3u << 17;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & osxsave) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & xtile) == xtile;
}

// Tiles enlarge the state that Linux saves with a thread, so a process has to ask for them: ARCH_REQ_XCOMP_PERM for
// XTILEDATA. It may be refused, by an old kernel or where a signal stack is too small.
bool request_amx() {
  constexpr long request = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#endif

Isa detect() {
  Isa most = Isa::amx;
  if (const char* wanted = std::getenv("DLA_FAST_CPU_ISA"); wanted != nullptr) {
    for (const Isa isa : kIsas) {
      if (std::strcmp(wanted, isa_name(isa)) == 0) most = isa;
    }
  }
  Isa best = Isa::generic;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
#if defined(DLA_WITH_AVX512_BF16)
  const bool vectors = best == Isa::avx512 && has_avx512_bf16();
  if (vectors && most == Isa::amx_emulated) return Isa::amx_emulated;
#if defined(DLA_WITH_AMX)
  // Not asked for in vain: what is granted cannot be given back.
  if (vectors && most == Isa::amx && has_amx() && request_amx()) return Isa::amx;
#endif
  // Intel's processors start a vdpbf16ps every other cycle and two float products in each (measured on a Xeon
  // with AMX): there only who asks by name gets them. Zen 4 starts as many of either.
  if (vectors && (most == Isa::avx512_bf16 || !__builtin_cpu_is("intel"))) best = Isa::avx512_bf16;
#endif
  return best < most ? best : most;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx_emulated:
      return "amx_emulated";
    case Isa::amx:
      return "amx";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

Isa current_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace dla_fast::cpu
