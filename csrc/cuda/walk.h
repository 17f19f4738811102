// How the passes of the normalisation tail walk a map.
//
// A vector is V values in a row in memory. channels_last: V channels of one pixel; a block takes `lanes` vectors side
// by side, and the pixels of a group with the rest of its threads, so that a thread meets the same V channels all
// along. Contiguous: V pixels of a channel; a block takes one channel.
//
// A multiprocessor reads at the rate of memory while some 30 KB are on their way to it. Blocks are therefore as many as
// are resident at once (`resident`, which launch bounds hold the registers to), and each thread has U vectors of
// every map on their way before it uses one.

#pragma once

#include "device.h"

namespace dla_fast::cuda {

// Blocks that a multiprocessor runs at once. An activation that is asked for takes more registers.
constexpr int resident(Act act) {
  return act == Act::kRelu || act == Act::kIdentity ? 3 : 2;
}

// The map and its cut into blocks. `count` vectors per channel (V of them at a time if channels_last).
struct Walk {
  int64_t channels, pixels, count, size;
  int lanes;
};

template <class T, int V, bool CL>
struct Position {
  // How many channels a vector belongs to, and over how many sums its values are spread.
  static constexpr int K = CL ? V : 1, SUMS = CL ? V : V < 4 ? V : 4;
  int64_t channel;
  // The next vector's place in memory and, contiguous, in its plane; how many are left.
  int64_t offset = 0, at = 0;
  int left = 0;
  bool here;

  __device__ __forceinline__ explicit Position(const Walk& w) {
    const int lane = threadIdx.x % w.lanes, slot = threadIdx.x / w.lanes, step = kThreads / w.lanes;
    channel = CL ? (static_cast<int64_t>(blockIdx.x) * w.lanes + lane) * V : blockIdx.x;
    here = channel < w.channels;
    const int64_t first = blockIdx.y * w.size + slot;
    int64_t last = static_cast<int64_t>(blockIdx.y + 1) * w.size;
    last = last < w.count ? last : w.count;
    if (here && first < last) left = static_cast<int>((last - first - 1) / step) + 1;
    if constexpr (CL) {
      offset = first * w.channels + channel;
      jump_ = step * w.channels;
    } else {
      vectors_ = w.pixels / V;
      hop_ = step % vectors_;
      const int64_t image = first / vectors_, plane = w.channels * w.pixels;
      at = first % vectors_;
      offset = image * plane + channel * w.pixels + at * V;
      jump_ = step / vectors_ * plane + hop_ * V;
      wrap_ = plane - vectors_ * V;
    }
  }

  // Calls `fetch(u, offset)` for U vectors, so that their loads overlap, then `use(u, offset)` for each, until none of
  // this thread's is left.
  template <int U, class Fetch, class Use>
  __device__ __forceinline__ void each(const Fetch& fetch, const Use& use) {
    int64_t to[U];
    for (; left >= U; left -= U) {
#pragma unroll
      for (int u = 0; u < U; ++u) fetch(u, to[u] = next());
#pragma unroll
      for (int u = 0; u < U; ++u) use(u, to[u]);
    }
#pragma unroll
    for (int u = 0; u < U - 1; ++u) {
      if (u < left) fetch(u, to[u] = next());
    }
#pragma unroll
    for (int u = 0; u < U - 1; ++u) {
      if (u < left) use(u, to[u]);
    }
  }

 private:
  int64_t vectors_ = 0, hop_ = 0, jump_ = 0, wrap_ = 0;

  // Advances by addition: a division costs more than what is done with a vector.
  __device__ __forceinline__ int64_t next() {
    const int64_t now = offset;
    offset += jump_;
    if constexpr (!CL) {
      at += hop_;
      if (at >= vectors_) {
        at -= vectors_;
        offset += wrap_;
      }
    }
    return now;
  }
};

}  // namespace dla_fast::cuda
