// The instruction sets that kernels are compiled for, and which of them serves this process.

#pragma once

// Compilers that know the instructions; the processor is asked at run time. Linux hands out AMX on request alone.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define DLA_WITH_AVX512_BF16
#if defined(__linux__)
#define DLA_WITH_AMX
#endif
#endif

namespace dla_fast::cpu {

// Those after avx512 add products of bfloat16 (products/bf16_gemm.h); all else of them is avx512's. amx_emulated runs
// the source of amx on processors with avx512_bf16, slowly, for tests.
enum class Isa : int { generic, avx2, avx512, avx512_bf16, amx, amx_emulated };

// The best instruction set of this machine, or the lesser one that DLA_FAST_CPU_ISA names. Emulation by name alone.
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace dla_fast::cpu
