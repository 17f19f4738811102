// The tile kernels for x86-64 processors with AVX2, FMA and F16C.

#include "../shared/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "../shared/target_avx2_inl.h"

#include "tile_kernels_inl.h"

#include "../shared/target_end_inl.h"
#endif
