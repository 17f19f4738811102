// The sum of products of a direct convolution of bfloat16, in vectors of AVX512_BF16.

#pragma once

#include "../shared/kernels.h"

namespace dla_fast::cpu {

// Output channels of a panel of the weight, in two vectors; values of a panel for each pair of a pixel's.
constexpr int64_t kRunPanel = 32, kRunPair = 2 * kRunPanel;

// What the sums become: y = act((z - center) * scale + shift + residual), where act is ReLU or nothing.
struct Bf16Tail {
  const float *center, *scale, *shift;
  bool relu;
  const c10::BFloat16* residual;  // laid out like y, or null
  c10::BFloat16* y;
  int64_t ld;
};

// So many neighbouring pixels of one row, or where it is narrower than kRunSides[side] all of them: where the first
// lies in the patch and in the output, and which runs of values meet the map at all.
struct RunSegment {
  int64_t from, to, first_run, last_run;
};

// A pixel of z is the sum over `runs` runs of `length` neighbouring values: those that begin `offsets` behind its own
// place in the patch. The weight has them pair by pair, of an odd length a zero behind the last.
struct Bf16Runs {
  const RunSegment* segments;
  int64_t segment_count;
  int side;
  int64_t pixels;  // of a segment
  int64_t lda;     // between them, in the patch
  const int64_t* offsets;
  int64_t length;
  const c10::BFloat16 *patch, *weight;
  int64_t channels;  // of the panel
  float* z;          // kRunPanel values a pixel; null where there is a tail
  const Bf16Tail* tail;
};

// Pixels that are multiplied for a segment: what leaves vectors for the weight when two or three segments are multiplied together.
constexpr int64_t kRunSides[] = {7, 4};

#if defined(DLA_WITH_AVX512_BF16)
namespace avx512_bf16 {
void multiply_runs(const Bf16Runs& r);
}
#endif

}  // namespace dla_fast::cpu
