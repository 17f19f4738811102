// The last sums of reductions: of what the blocks of a pass have left, a value per block and channel.
//
// They are megabytes at most, and come from cache, so that the time is that of the longest chain of loads and
// additions. A block takes few channels, a sector of memory's worth of doubles, and all its threads share what is to be
// added, each with many loads on their way; then the threads' sums are added as a tree. The order is fixed.

#pragma once

#include "device.h"

namespace dla_fast::cuda {

// Channels that a block takes; its other threads share the groups.
constexpr int kLanes = 4;

// Calls `add(g, values)` for this thread's groups with their value in each of N planes of partial results, 8 groups at
// a time, so that their loads overlap; past the last group with zeros. In a fixed order.
template <int N, class P, class Add>
__device__ __forceinline__ void each_group(const P* from, int64_t stride, int64_t plane, int64_t groups, int slot,
                                           int slots, const Add& add) {
  constexpr int U = 8;
  for (int64_t g = slot; g < groups; g += U * slots) {
    P values[U][N];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t at = g + u * slots;
#pragma unroll
      for (int n = 0; n < N; ++n) values[u][n] = at < groups ? from[n * plane + at * stride] : P(0);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) add(g + u * slots, values[u]);
  }
}

}  // namespace dla_fast::cuda
