// One product of a warp's matrix unit: d += a b, a of 16 x 2k and b of 2k x 8 words, as PTX names it.
//
// Lane 4 g + t holds of a the rows g (words 0 and 2) and g + 8 (words 1 and 3), of b the column g; the first of each
// pair of words at position t along the depth and the second at position t + 4, a position being 32 bits wide: two
// halves or a float in TF32. Of d it has the rows g (0, 1) and g + 8 (2, 3), columns 2 t and 2 t + 1.

#pragma once

#include "device.h"

namespace dla_fast::cuda {

#if defined(__CUDACC__)

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (__is_same(T, half)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (__is_same(T, bfloat16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// The word of the matrix unit for a float: rounded to TF32, ties away from zero.
__device__ __forceinline__ uint32_t tf32_word(float v) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(v));
  return word;
}

#else

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_host::multiply_add<T>(d, a, b);
}

inline uint32_t tf32_word(float v) {
  return cuda_host::tf32_word(v);
}

#endif

}  // namespace dla_fast::cuda
