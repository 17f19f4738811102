// What follows is compiled for x86-64 processors with AVX-512 (F, BW, DQ, VL), up to target_end_inl.h. Every header
// comes before it, so that no library code is compiled for it.

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define DLA_ISA avx512
#define DLA_VECTOR_BYTES 64
