// How a product of a node is cut into tasks, and its weight's gradient into sums.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../shared/kernels.h"
#include "../shared/parallel.h"
#include "../shared/scratch.h"

namespace dla_fast::cpu {

// Rows of a channels_last tile: a multiple of the register tile; small enough that the last tiles of a call, with the
// panels that tasks may be cut into besides, keep every thread busy.
int64_t tile_rows(int64_t total, int64_t weights, int64_t panels);

// Tiles times groups of panels: as many tasks as keep the threads busy when there are few pixels. All tiles of a group
// come before the next group, so that threads share the weight and not the pixels.
struct Tasks {
  int64_t tiles, panels, groups, count;
  Tasks(int64_t tiles, int64_t panels);
  int64_t tile(int64_t task) const { return task % tiles; }
  // The panels of a task.
  int64_t begin(int64_t task) const { return panels * (task / tiles) / groups; }
  int64_t end(int64_t task) const { return panels * (task / tiles + 1) / groups; }
};

// Slices of the pixels that sum a weight's gradient each. A slice must be worth a thread, since it costs a private sum,
// and must have a tile, since its first one writes that.
inline int64_t slices_of(int64_t tiles, int64_t total, int64_t weights) {
  return std::clamp<int64_t>(std::min(tiles, total * weights / (1 << 18)), 1, thread_count());
}

// Those sums, added in order at the end. The first is formed in its place where that holds A; there are none where the
// gradient is not needed (dw is null).
template <class T>
class SlicedSums {
  using A = acc_t<T>;
  static constexpr bool in_place = std::is_same_v<T, A>;

 public:
  SlicedSums(T* dw, int64_t size, int64_t sums)
      : out_(dw), size_(size), scratch_(dw == nullptr ? 0 : (in_place ? sums - 1 : sums) * size) {
    for (int64_t s = 0; dw != nullptr && s < sums; ++s) at.push_back(scratch_.get() + (in_place ? s - 1 : s) * size);
    if constexpr (in_place) {
      if (dw != nullptr) at[0] = dw;
    }
  }

  void add() const {
    parallel_ranges(at.empty() ? 0 : size_, 16384, [&](int64_t begin, int64_t end) {
      for (size_t s = 1; s < at.size(); ++s) {
        for (int64_t i = begin; i < end; ++i) at[0][i] += at[s][i];
      }
      if constexpr (!in_place) kernels<T>().store({at[0] + begin, 0}, {out_ + begin, 0}, 1, end - begin);
    });
  }

  std::vector<A*> at;

 private:
  T* out_;
  int64_t size_;
  Scratch<A> scratch_;
};

}  // namespace dla_fast::cpu
