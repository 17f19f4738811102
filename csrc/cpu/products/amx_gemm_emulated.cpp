// The products with AMX on processors that lack it: their source, over tiles that AVX-512 emulates.
//
// For tests. Loads, stores and sums are the processor's, in its order and rounding, and so is what happens to a thread
// whose tiles are not configured: it is ended.

#include "bf16x3_gemm.h"

#if defined(DLA_WITH_AVX512_BF16)
#include <cstring>
#if !defined(__clang__)
// gcc 12 takes the undefined vectors of its own header for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace dla_fast::cpu::amx_emulated {
namespace {

// Of a thread: the configuration, whose first byte is zero where there is none, and eight tiles of 16 rows of 64 bytes.
struct Tiles {
  alignas(64) char config[64];
  alignas(64) char tile[8][16][64];
};
thread_local Tiles tiles;

inline char (&of_tile(int i))[16][64] {
  if (tiles.config[0] == 0) __builtin_trap();
  return tiles.tile[i];
}

inline void store_config(void* to) {
  std::memcpy(to, tiles.config, sizeof(tiles.config));
}

inline void release() {
  std::memset(&tiles, 0, sizeof(tiles));
}

inline void load_config(const void* from) {
  release();
  std::memcpy(tiles.config, from, sizeof(tiles.config));
}

inline void zero(int i) {
  std::memset(of_tile(i), 0, sizeof(tiles.tile[i]));
}

inline void load(int i, const void* from, int64_t stride) {
  for (auto& row : of_tile(i)) {
    std::memcpy(row, from, sizeof(row));
    from = static_cast<const char*>(from) + stride;
  }
}

inline void store(int i, void* to, int64_t stride) {
  for (const auto& row : of_tile(i)) {
    std::memcpy(to, row, sizeof(row));
    to = static_cast<char*>(to) + stride;
  }
}

// c += a * b: the even terms and the odd ones of a step are summed for themselves, then both, then they are added to c.
// Not inlined, so that all of it is between the switches of the mode.
__attribute__((noinline)) void add_products(char (&c)[16][64], const char (&a)[16][64], const char (&b)[16][64]) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 b_even[16], b_odd[16];
  for (int k = 0; k < 16; ++k) {
    const __m512i pairs = _mm512_load_si512(b[k]);
    b_even[k] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    b_odd[k] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
  }
  for (int r = 0; r < 16; ++r) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < 16; ++k) {
      int two;
      std::memcpy(&two, a[r] + 4 * k, sizeof(two));
      const __m512i pair = _mm512_set1_epi32(two);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), b_even[k], even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pair, upper)), b_odd[k], odd);
    }
    _mm512_store_ps(c[r], _mm512_add_ps(_mm512_load_ps(c[r]), _mm512_add_ps(even, odd)));
  }
}

// Rounds to nearest, and what is below float's normal range is zero, whatever the thread's mode.
void multiply_tiles(int c, int a, int b) {
  constexpr unsigned nearest_flushing = 0x9fc0;
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(nearest_flushing);
  add_products(of_tile(c), of_tile(a), of_tile(b));
  _mm_setcsr(mode);
}

}  // namespace
}  // namespace dla_fast::cpu::amx_emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) load_config(from)
#define _tile_storeconfig(to) store_config(to)
#define _tile_release() release()
#define _tile_loadd(tile, from, stride) load(tile, from, stride)
#define _tile_stored(tile, to, stride) store(tile, to, stride)
#define _tile_zero(tile) zero(tile)
#define _tile_dpbf16ps(c, a, b) multiply_tiles(c, a, b)
#define DLA_ISA amx_emulated

#include "amx_gemm_isa_inl.h"

#include "../shared/target_end_inl.h"
#endif
