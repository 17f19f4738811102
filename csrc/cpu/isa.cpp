// Picks the instruction set of the tile kernels when the process first asks.

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace dla_fast::cpu {
namespace {

Isa detect() {
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
  const char* wanted = std::getenv("DLA_FAST_CPU_ISA");
  if (wanted != nullptr) {
    for (const Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa < best) return isa;
    }
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
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
