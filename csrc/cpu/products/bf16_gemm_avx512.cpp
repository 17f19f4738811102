// Products of bfloat16 matrices with AVX512_BF16, and the packing that AMX shares.

#include "bf16_gemm.h"

#if defined(DLA_WITH_AVX512_BF16)
#include "../shared/target_avx512_bf16_inl.h"

namespace dla_fast::cpu::avx512_bf16 {
namespace {

using c10::BFloat16;

// Rows of c in registers: 12 x 2 vectors leave room for two of b and one of a.
constexpr int64_t kRows = 12;

inline int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <int BLOCKS>
inline void micro(const Bf16Gemm& g, int64_t row, int64_t done, const BFloat16* b, float* c) {
  __m512 acc[kRows][BLOCKS];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < BLOCKS; ++j) acc[i][j] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < g.segment_count; ++s) {
    const Bf16Segment& segment = g.segments[s];
    const BFloat16* a = segment.a + row * segment.lda;
    for (int64_t step = 0; step < segment.steps; ++step, a += kBf16Step, b += kBf16PanelStep) {
      for (int64_t pair = 0; pair < kBf16Step / 2; ++pair) {
        __m512bh bv[BLOCKS];
#pragma GCC unroll 2
        for (int j = 0; j < BLOCKS; ++j) {
          bv[j] = (__m512bh)_mm512_load_si512(b + j * kBf16Step * kBf16Block + pair * 2 * kBf16Block);
        }
#pragma GCC unroll 12
        for (int i = 0; i < kRows; ++i) {
          int32_t two;
          __builtin_memcpy(&two, a + i * segment.lda + 2 * pair, sizeof(two));
          const __m512bh av = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
          for (int j = 0; j < BLOCKS; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    if (i < done) continue;
#pragma GCC unroll 2
    for (int j = 0; j < BLOCKS; ++j) {
      float* to = c + (row + i) * g.ldc + j * kBf16Block;
      _mm512_storeu_ps(to, g.add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[i][j]) : acc[i][j]);
    }
  }
}

void gemm(const Bf16Gemm& g) {
  for (int64_t j = 0; j < g.n; j += kBf16Panel) {
    const BFloat16* b = g.b + j / kBf16Panel * g.panel_stride;
    for (int64_t i = 0; i < g.m; i += kRows) {
      // The last rows once more rather than a kernel for every rest; c is scratch.
      const int64_t row = g.m < kRows ? 0 : least(i, g.m - kRows), done = i - row;
      if (g.n - j > kBf16Block) {
        micro<2>(g, row, done, b, g.c + j);
      } else {
        micro<1>(g, row, done, b, g.c + j);
      }
    }
  }
}

#include "../shared/avx512_transpose_inl.h"

void pack_transposed(Strided<const BFloat16> src, int64_t columns, int64_t depth, BFloat16* to) {
  for (int64_t k = 0; k < depth; k += kBf16Step, to += kBf16PanelStep) {
    const __mmask32 mask = depth - k < kBf16Step ? (__mmask32{1} << (depth - k)) - 1 : ~__mmask32{0};
    for (int64_t j = 0; j < columns; j += kBf16Block) {
      const BFloat16* from = src.data + j * src.ld + k;
      BFloat16* block = to + j * kBf16Step;
      const int64_t n = least(columns - j, kBf16Block);
      __m512i r[16];
      if (n == kBf16Block) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi16(mask, from + i * src.ld);
      } else {
        for (int i = 0; i < 16; ++i) r[i] = _mm512_maskz_loadu_epi16(i < n ? mask : 0, from + (i < n ? i : 0) * src.ld);
      }
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(block + i * kBf16Panel, r[i]);
    }
  }
}

// Lanes from..to of a row as the lower halves of pairs; the rest is neither read nor anything but zero.
inline __m512i lower(const BFloat16* row, __mmask16 lanes) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row));
}

void pack(Strided<const BFloat16> src, int64_t depth, const Bf16Columns& columns) {
  const int64_t end = columns.begin + columns.count;
  for (int64_t k = 0; k < (depth + kBf16Step - 1) / kBf16Step * kBf16Step; k += 2) {
    BFloat16* step = columns.to + k / kBf16Step * kBf16PanelStep + k % kBf16Step * kBf16Block;
    const BFloat16* row = src.data + k * src.ld;
    for (int64_t j = columns.begin / kBf16Block * kBf16Block; j < end; j += kBf16Block) {
      const int64_t from = j < columns.begin ? columns.begin - j : 0, to = least(end - j, kBf16Block);
      const __mmask16 lanes = static_cast<__mmask16>(((1u << to) - 1) & ~((1u << from) - 1));
      // Only the lanes that are set are read, so that it may begin before the row does.
      const BFloat16* at = row + (j - columns.begin);
      __m512i pairs = _mm512_setzero_si512();
      if (k < depth) pairs = lower(at, lanes);
      if (k + 1 < depth) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(lower(at + src.ld, lanes), 16));
      const __mmask16 written = columns.last && to == end - j ? static_cast<__mmask16>(~((1u << from) - 1)) : lanes;
      BFloat16* block = step + j / kBf16Panel * columns.panel_stride + j % kBf16Panel * kBf16Step;
      _mm512_mask_store_epi32(block, written, pairs);
    }
  }
}

void transpose(Strided<const BFloat16> src, int64_t rows, int64_t cols, Strided<BFloat16> dst) {
  for (int64_t k = 0; k < cols; k += kBf16Step) {
    const int64_t width = least(cols - k, kBf16Step);
    const __mmask32 mask = width < kBf16Step ? (__mmask32{1} << width) - 1 : ~__mmask32{0};
    for (int64_t j = 0; j < (rows + kBf16Step - 1) / kBf16Step * kBf16Step; j += 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        r[i] = j + i < rows ? _mm512_maskz_loadu_epi16(mask, src.data + (j + i) * src.ld + k) : _mm512_setzero_si512();
      }
      transpose16(r);
      BFloat16* to = dst.data + k * dst.ld + j;
      for (int i = 0; 2 * i < width; ++i, to += 2 * dst.ld) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(r[i]));
        if (2 * i + 1 == width) break;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + dst.ld),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[i], 16)));
      }
    }
  }
}

template <bool MORE>
inline void store_rows(Strided<const float> src, Strided<const float> more, Strided<BFloat16> dst, int64_t rows,
                       int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = src.data + r * src.ld;
    const float* add = MORE ? more.data + r * more.ld : nullptr;
    BFloat16* to = dst.data + r * dst.ld;
    for (int64_t c = 0; c < cols; c += 16) {
      const __mmask16 lanes = cols - c < 16 ? static_cast<__mmask16>((1u << (cols - c)) - 1) : __mmask16{0xffff};
      __m512 v = _mm512_maskz_loadu_ps(lanes, from + c);
      if constexpr (MORE) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(lanes, add + c));
      _mm256_mask_storeu_epi16(to + c, lanes, (__m256i)_mm512_cvtneps_pbh(v));
    }
  }
}

void store(Strided<const float> src, Strided<const float> more, Strided<BFloat16> dst, int64_t rows, int64_t cols) {
  more.data == nullptr ? store_rows<false>(src, more, dst, rows, cols) : store_rows<true>(src, more, dst, rows, cols);
}

}  // namespace

const Bf16Kernels& bf16_kernels() {
  static const Bf16Kernels table = {&gemm, &pack_transposed, &pack, &transpose, &store, nullptr, nullptr};
  return table;
}

}  // namespace dla_fast::cpu::avx512_bf16

#include "../shared/target_end_inl.h"
#endif
