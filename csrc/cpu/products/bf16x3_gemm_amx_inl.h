// Products of float matrices with AMX, and the splitting of their sides with AVX-512.
// Included by amx_gemm_isa_inl.h, inside a namespace.

#include "../shared/avx512_transpose_inl.h"

inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline __mmask16 lanes(int64_t n) {
  return n >= kBf16Block ? __mmask16{0xffff} : (n <= 0 ? __mmask16{0} : static_cast<__mmask16>((1u << n) - 1));
}

// Each part in the upper half of a lane. Rounded to nearest, so that what is left fits the next part; half way goes
// away from zero. The low part is exact, and a NaN stays one in it whatever rounding made of the others.
struct Parts {
  __m512i part[3];
};

inline Parts split(__m512 x) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), half = _mm512_set1_epi32(0x8000);
  const __m512i high = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(high));
  const __m512i middle = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rest), half), upper);
  return {{high, middle, _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(middle)))}};
}

// Transposes the blocks of so many steps, in place: the blocks of the two sides are each other's transposes, of pairs.
inline void transpose_steps(BFloat16* to, int64_t steps) {
  for (int64_t tile = 0; tile < 3 * steps; ++tile, to += kBf16x3Tile) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(to + i * kBf16Step);
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kBf16Step, r[i]);
  }
}

// From a matrix whose rows are depth.
template <bool TRANSPOSE>
void split_along(Strided<const float> src, int64_t count, int64_t depth, Bf16x3Side side) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper);
  const int64_t steps = (depth + kBf16Step - 1) / kBf16Step;
  for (int64_t i = 0; i < (count + kBf16Block - 1) / kBf16Block * kBf16Block; ++i) {
    BFloat16* to = side.at(i / kBf16Block, 0).data + i % kBf16Block * kBf16Step;
    const float* from = src.data + (i < count ? i * src.ld : 0);
    for (int64_t k = 0; k < depth; k += kBf16Step, to += side.step) {
      const int64_t n = i < count ? depth - k : 0;
      const Parts a = split(_mm512_maskz_loadu_ps(lanes(n), from + k)),
                  b = split(_mm512_maskz_loadu_ps(lanes(n - kBf16Block), from + k + kBf16Block));
#pragma GCC unroll 3
      for (int p = 0; p < 3; ++p) {
        _mm512_store_si512(to + p * side.part, _mm512_permutex2var_epi16(a.part[p], upper, b.part[p]));
      }
    }
    if (TRANSPOSE && i % kBf16Block == kBf16Block - 1) transpose_steps(side.at(i / kBf16Block, 0).data, steps);
  }
}

// From a matrix whose columns are depth.
template <bool TRANSPOSE>
void split_across(Strided<const float> src, int64_t count, int64_t depth, Bf16x3Side side) {
  for (int64_t step = 0; step * kBf16Step < depth; ++step) {
    for (int64_t pair = 0; pair < kBf16Step / 2; ++pair) {
      const int64_t k = step * kBf16Step + 2 * pair;
      const float *first = src.data + (k < depth ? k * src.ld : 0),
                  *second = src.data + (k + 1 < depth ? (k + 1) * src.ld : 0);
      for (int64_t j = 0; j < count; j += kBf16Block) {
        const __mmask16 mask = lanes(count - j);
        const Parts a = split(_mm512_maskz_loadu_ps(k < depth ? mask : 0, first + j)),
                    b = split(_mm512_maskz_loadu_ps(k + 1 < depth ? mask : 0, second + j));
        BFloat16* to = side.at(j / kBf16Block, step).data + pair * kBf16Step;
#pragma GCC unroll 3
        for (int p = 0; p < 3; ++p) {
          _mm512_store_si512(to + p * kBf16x3Tile,
                             _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a.part[p], 16), b.part[p]));
        }
      }
    }
    for (int64_t j = 0; TRANSPOSE && j < count; j += kBf16Block) {
      transpose_steps(side.at(j / kBf16Block, step).data, 1);
    }
  }
}

// Adds a tile to c, or puts what of it belongs there in its place.
void add_tile(const Bf16x3Gemm& g, int64_t i, int64_t j, const float* tile) {
  float* c = g.c + i * g.ldc + j;
  const __mmask16 mask = lanes(g.n - j);
  for (int64_t r = 0; r < least(g.m - i, kBf16Block); ++r, c += g.ldc) {
    __m512 v = _mm512_load_ps(tile + r * kBf16Block);
    if (g.add) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, c));
    _mm512_mask_storeu_ps(c, mask, v);
  }
}

// Of the tile of c at row i and column j. A macro, since gcc's intrinsics spell the tile's number out.
#define DLA_STORE_TILE(TILE, i, j)                                                            \
  if (!g.add && g.m - (i) >= kBf16Block && g.n - (j) >= kBf16Block) {                         \
    _tile_stored(TILE, g.c + (i) * g.ldc + (j), g.ldc * static_cast<int64_t>(sizeof(float))); \
  } else {                                                                                    \
    alignas(64) float tile[kBf16Block * kBf16Block];                                          \
    _tile_stored(TILE, tile, 64);                                                             \
    add_tile(g, i, j, tile);                                                                  \
  }

// Tiles 0 to 3 hold c, 4 and 5 rows, 6 and 7 columns. Of the loads of a step as few as four tiles for both sides allow.
template <int ROWS, int COLUMNS>
inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (COLUMNS == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (ROWS == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (ROWS == 2 && COLUMNS == 2) _tile_dpbf16ps(3, 5, 7);
}

template <int ROWS>
inline void load_rows(const BFloat16* a0, const BFloat16* a1, int64_t part) {
  _tile_loadd(4, a0 + part, 64);
  if constexpr (ROWS == 2) _tile_loadd(5, a1 + part, 64);
}

template <int COLUMNS>
inline void load_columns(const BFloat16* b0, const BFloat16* b1, int part) {
  _tile_loadd(6, b0 + part * kBf16x3Tile, 64);
  if constexpr (COLUMNS == 2) _tile_loadd(7, b1 + part * kBf16x3Tile, 64);
}

// First all that is small, then the products of high parts: a sum rounds as coarsely as it is large.
template <int ROWS, int COLUMNS>
inline void micro(const Bf16x3Gemm& g, int64_t i, int64_t j, int64_t lines) {
  const int64_t next_row = (ROWS - 1) * g.left.stride, next_column = (COLUMNS - 1) * g.right.stride;
  const BFloat16 *a = g.left.at(i / kBf16Block, 0).data, *b = g.right.at(j / kBf16Block, 0).data;
  _tile_zero(0);
  if constexpr (COLUMNS == 2) _tile_zero(1);
  if constexpr (ROWS == 2) _tile_zero(2);
  if constexpr (ROWS == 2 && COLUMNS == 2) _tile_zero(3);
  const auto tap = [&](int64_t t) { return g.taps == nullptr ? a : a + g.taps[t]; };
  const int64_t part = g.left.part;
  const BFloat16* b0 = b;
  for (int64_t t = 0; t < g.tap_count; ++t) {
    const BFloat16* a0 = tap(t);
    for (int64_t step = 0; step < g.steps; ++step, a0 += g.left.step, b0 += kBf16x3Step) {
      if (g.ahead != nullptr) fetch(*g.ahead, lines);
      const BFloat16 *a1 = a0 + next_row, *b1 = b0 + next_column;
      load_rows<ROWS>(a0, a1, 0);
      load_columns<COLUMNS>(b0, b1, 2);
      multiply<ROWS, COLUMNS>();
      load_columns<COLUMNS>(b0, b1, 1);
      multiply<ROWS, COLUMNS>();
      load_rows<ROWS>(a0, a1, part);
      multiply<ROWS, COLUMNS>();
      load_columns<COLUMNS>(b0, b1, 0);
      multiply<ROWS, COLUMNS>();
      load_rows<ROWS>(a0, a1, 2 * part);
      multiply<ROWS, COLUMNS>();
    }
  }
  b0 = b;
  for (int64_t t = 0; t < g.tap_count; ++t) {
    const BFloat16* a0 = tap(t);
    for (int64_t step = 0; step < g.steps; ++step, a0 += g.left.step, b0 += kBf16x3Step) {
      load_rows<ROWS>(a0, a0 + next_row, 0);
      load_columns<COLUMNS>(b0, b0 + next_column, 0);
      multiply<ROWS, COLUMNS>();
    }
  }
  const int64_t i1 = i + kBf16Block, j1 = j + kBf16Block;
  DLA_STORE_TILE(0, i, j)
  if constexpr (COLUMNS == 2) {
    DLA_STORE_TILE(1, i, j1)
  }
  if constexpr (ROWS == 2) {
    DLA_STORE_TILE(2, i1, j)
  }
  if constexpr (ROWS == 2 && COLUMNS == 2) {
    DLA_STORE_TILE(3, i1, j1)
  }
}
#undef DLA_STORE_TILE

template <int COLUMNS>
inline void column(const Bf16x3Gemm& g, int64_t j, int64_t lines) {
  for (int64_t i = 0; i < g.m; i += 2 * kBf16Block) {
    if (g.m - i > kBf16Block) {
      micro<2, COLUMNS>(g, i, j, lines);
    } else {
      micro<1, COLUMNS>(g, i, j, lines);
    }
  }
}

void gemm(const Bf16x3Gemm& g) {
  constexpr int64_t pair = 2 * kBf16Block;
  int64_t lines = 0;
  if (g.ahead != nullptr) {
    const int64_t steps = (g.m + pair - 1) / pair * ((g.n + pair - 1) / pair) * g.tap_count * g.steps;
    lines = (g.ahead->rows * g.ahead->lines + steps - 1) / (steps > 0 ? steps : 1);
  }
  for (int64_t j = 0; j < g.n; j += pair) {
    if (g.n - j > kBf16Block) {
      column<2>(g, j, lines);
    } else {
      column<1>(g, j, lines);
    }
  }
}
