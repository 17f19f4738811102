// The tile kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL).

#include "../shared/kernels.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc 12 takes the undefined vectors of its own header for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "../shared/target_avx512_inl.h"

#include "tile_kernels_inl.h"

#include "../shared/target_end_inl.h"
#endif
