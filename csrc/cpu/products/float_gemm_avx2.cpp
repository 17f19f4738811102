// Products of float and double matrices for x86-64 processors with AVX2, FMA and F16C.

#include "float_gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "../shared/target_avx2_inl.h"

#include "float_gemm_isa_inl.h"

#include "../shared/target_end_inl.h"
#endif
