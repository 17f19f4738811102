// The tile kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL).

#include "../shared/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "../shared/target_avx512_inl.h"

#include "tile_kernels_inl.h"

#include "../shared/target_end_inl.h"
#endif
