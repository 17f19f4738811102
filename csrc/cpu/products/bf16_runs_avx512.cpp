// Runs of bfloat16 (bf16_runs.h) with AVX512_BF16: 14 or 12 pixels by two vectors of channels in registers.

#include "bf16_runs.h"

#include <limits>

#if defined(DLA_WITH_AVX512_BF16)
#include "../shared/target_avx512_bf16_inl.h"

namespace dla_fast::cpu::avx512_bf16 {
namespace {

template <class Value>
inline __m512bh both(const char* at) {
  Value value;
  __builtin_memcpy(&value, at, sizeof(value));
  return (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(value));
}

template <class Value, int GROUPS, int SIDE, int VECTORS>
inline void add_pair(const char* (&at)[GROUPS], int64_t lda, const c10::BFloat16* weight,
                     __m512 (&acc)[GROUPS][SIDE][VECTORS]) {
  __m512bh w[VECTORS];
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v) w[v] = (__m512bh)_mm512_load_si512(weight + v * kRunPanel);
#pragma GCC unroll 3
  for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 7
    for (int i = 0; i < SIDE; ++i) {
      const __m512bh x = both<Value>(at[g] + i * lda);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) acc[g][i][v] = _mm512_dpbf16_ps(acc[g][i][v], x, w[v]);
    }
  }
}

template <bool RESIDUAL, int GROUPS, int SIDE, int VECTORS>
inline void finish(const Bf16Runs& r, const RunSegment* segments, const __m512 (&acc)[GROUPS][SIDE][VECTORS]) {
  const Finish<c10::BFloat16>& tail = *r.finish;
  const __m512 least = _mm512_set1_ps(tail.relu ? 0.0f : -std::numeric_limits<float>::infinity());
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t left = r.channels - v * 16;
    const __mmask16 lanes = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : 0xffff);
    const __m512 center = _mm512_maskz_loadu_ps(lanes, tail.center + v * 16),
                 scale = _mm512_maskz_loadu_ps(lanes, tail.scale + v * 16),
                 shift = _mm512_maskz_loadu_ps(lanes, tail.shift + v * 16);
#pragma GCC unroll 3
    for (int g = 0; g < GROUPS; ++g) {
      const int64_t at = segments[g].to * tail.ld + v * 16;
#pragma GCC unroll 7
      for (int i = 0; i < SIDE; ++i) {
        if (i >= r.pixels) break;
        __m512 y = _mm512_fmadd_ps(_mm512_sub_ps(acc[g][i][v], center), scale, shift);
        if constexpr (RESIDUAL) {
          const __m256i halves = _mm256_maskz_loadu_epi16(lanes, tail.residual + at + i * tail.ld);
          y = _mm512_add_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
        }
        // The second operand where one is NaN, so NaN stays NaN.
        y = _mm512_max_ps(least, y);
        _mm256_mask_storeu_epi16(tail.y + at + i * tail.ld, lanes, (__m256i)_mm512_cvtneps_pbh(y));
      }
    }
  }
}

template <int GROUPS, int SIDE, int VECTORS>
inline void tile(const Bf16Runs& r, const RunSegment* segments) {
  __m512 acc[GROUPS][SIDE][VECTORS];
#pragma GCC unroll 3
  for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 7
    for (int i = 0; i < SIDE; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) acc[g][i][v] = _mm512_setzero_ps();
    }
  }
  if (r.finish != nullptr) {
    // What the tail meets is not in cache yet.
#pragma GCC unroll 3
    for (int g = 0; g < GROUPS; ++g) {
      for (int64_t i = 0, at = segments[g].to * r.finish->ld; i < r.pixels; ++i, at += r.finish->ld) {
        __builtin_prefetch(r.finish->y + at, 1);
        if (r.finish->residual != nullptr) __builtin_prefetch(r.finish->residual + at);
      }
    }
  }
  const c10::BFloat16* weight = r.weight + segments->runs->pairs_before * kRunPair;
  for (const Run *run = segments->runs, *end = segments->end; run < end; ++run) {
    const int64_t lda = r.stride * run->channels * static_cast<int64_t>(sizeof(c10::BFloat16)), pairs = run->length / 2;
    const char* at[GROUPS];
#pragma GCC unroll 3
    for (int g = 0; g < GROUPS; ++g) {
      at[g] = reinterpret_cast<const char*>(run->base + segments[g].from * run->channels);
    }
    for (int64_t pair = 0; pair < pairs; ++pair, weight += kRunPair) {
      add_pair<int32_t>(at, lda, weight, acc);
#pragma GCC unroll 3
      for (int g = 0; g < GROUPS; ++g) at[g] += 4;
    }
    // What lies behind the last value is another pixel's, and may be NaN, which a zero does not silence.
    if (run->length % 2 != 0) {
      add_pair<uint16_t>(at, lda, weight, acc);
      weight += kRunPair;
    }
  }
  if (r.finish != nullptr) {
    return r.finish->residual != nullptr ? finish<true>(r, segments, acc) : finish<false>(r, segments, acc);
  }
#pragma GCC unroll 3
  for (int g = 0; g < GROUPS; ++g) {
#pragma GCC unroll 7
    for (int i = 0; i < SIDE; ++i) {
      if (i >= r.pixels) break;
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(r.z + (segments[g].to + i) * kRunPanel + v * 16, acc[g][i][v]);
    }
  }
}

// As many segments together as share their runs.
template <int GROUPS, int SIDE, int VECTORS>
void tiles(const Bf16Runs& r) {
  for (int64_t s = 0; s < r.segment_count;) {
    const RunSegment* const at = r.segments + s;
    int64_t count = 1;
    while (count < GROUPS && s + count < r.segment_count && at[count].runs == at->runs && at[count].end == at->end) {
      ++count;
    }
    s += count;
    if (count == GROUPS) {
      tile<GROUPS, SIDE, VECTORS>(r, at);
    } else if (count == 1) {
      tile<1, SIDE, VECTORS>(r, at);
    } else {
      tile<2, SIDE, VECTORS>(r, at);
    }
  }
}

}  // namespace

void multiply_runs(const Bf16Runs& r) {
  if (r.channels > 16) {
    r.side == 0 ? tiles<2, 7, 2>(r) : tiles<3, 4, 2>(r);
  } else {
    r.side == 0 ? tiles<2, 7, 1>(r) : tiles<3, 4, 1>(r);
  }
}

}  // namespace dla_fast::cpu::avx512_bf16

#include "../shared/target_end_inl.h"
#endif
