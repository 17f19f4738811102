// Which products in bfloat16 instructions this process has.

#include "bf16x3_gemm.h"

namespace dla_fast::cpu {

const Bf16Kernels* bf16_kernels() {
#if defined(DLA_WITH_AMX)
  if (current_isa() == Isa::amx) return &amx::bf16_kernels();
#endif
#if defined(DLA_WITH_AVX512_BF16)
  if (current_isa() == Isa::amx_emulated) return &amx_emulated::bf16_kernels();
  if (current_isa() == Isa::avx512_bf16) return &avx512_bf16::bf16_kernels();
#endif
  return nullptr;
}

const Bf16x3Kernels* bf16x3_kernels() {
#if defined(DLA_WITH_AMX)
  if (current_isa() == Isa::amx) return &amx::bf16x3_kernels();
#endif
#if defined(DLA_WITH_AVX512_BF16)
  if (current_isa() == Isa::amx_emulated) return &amx_emulated::bf16x3_kernels();
#endif
  return nullptr;
}

}  // namespace dla_fast::cpu
