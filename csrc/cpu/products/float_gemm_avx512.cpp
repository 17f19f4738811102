// Products of float and double matrices for x86-64 processors with AVX-512 (F, BW, DQ, VL).

#include "float_gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "../shared/target_avx512_inl.h"

#include "float_gemm_isa_inl.h"

#include "../shared/target_end_inl.h"
#endif
