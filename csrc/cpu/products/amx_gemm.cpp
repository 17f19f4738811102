// Products of bfloat16 and of float matrices for x86-64 processors with AMX.

#include "bf16x3_gemm.h"

#if defined(DLA_WITH_AMX)
#if !defined(__clang__)
// gcc 12 takes the undefined vectors of its own header for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define DLA_ISA amx

#include "amx_gemm_isa_inl.h"

#include "../shared/target_end_inl.h"
#endif
