// What follows is compiled for x86-64 processors with AVX2, FMA and F16C, up to target_end_inl.h. Every header comes
// before it, so that no library code is compiled for it.

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define DLA_ISA avx2
#define DLA_VECTOR_BYTES 32
