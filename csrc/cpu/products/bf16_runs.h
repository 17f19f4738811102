// The sum of products of a direct convolution of bfloat16, in vectors of AVX512_BF16.

#pragma once

#include "finish.h"

namespace dla_fast::cpu {

// Output channels of a panel of the weight, in two vectors; values of a panel for each pair of a pixel's.
constexpr int64_t kRunPanel = 32, kRunPair = 2 * kRunPanel;

// `length` neighbouring values of a map that has so many channels: for the map's first pixel they begin at `base`. In
// the panel there are so many pairs before them; behind the last value of an odd length it has a zero.
struct Run {
  const c10::BFloat16* base;
  int64_t channels, length, pairs_before;
};

// So many neighbouring pixels of one row, or where it is narrower than kRunSides[side] all of them: which pixel of the
// map and of the output the first one is, and its runs.
struct RunSegment {
  int64_t from, to;
  const Run *runs, *end;
};

// Every pixel of z is the sum over the runs of its segment.
struct Bf16Runs {
  const RunSegment* segments;
  int64_t segment_count;
  int side;
  int64_t pixels, stride;  // of a segment, and between them in the map
  const c10::BFloat16* weight;
  int64_t channels;  // of the panel
  float* z;          // kRunPanel values a pixel; null where they are finished
  const Finish<c10::BFloat16>* finish;
};

// Pixels that are multiplied for a segment: what leaves vectors for the weight when two or three segments are
// multiplied together.
constexpr int64_t kRunSides[] = {7, 4};

#if defined(DLA_WITH_AVX512_BF16)
namespace avx512_bf16 {
void multiply_runs(const Bf16Runs& r);
}
#endif

}  // namespace dla_fast::cpu
