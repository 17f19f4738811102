// What the learned upsampling and the convolutions that upsample on the way share.

#pragma once

#include <type_traits>

#include "kernels.h"
#include "scratch.h"

namespace dla_fast::cpu {

inline int64_t upsampled(int64_t size, int64_t factor) {
  return (size - 1) * factor - 2 * (factor / 2) + 2 * factor;
}

// Rows as the kernels read them: in place where they are A, else widened.
template <class T, class A>
const A* row_of(const T* row, int64_t values, A* scratch) {
  if (row == nullptr) return nullptr;
  if constexpr (std::is_same_v<T, A>) {
    return row;
  } else {
    kernels<T>().load({row, values}, {scratch, values}, 1, values);
    return scratch;
  }
}

// The kernel [C][2f][2f] in the accumulation type: [2f][2f][C] for channels_last, else as it is.
template <class T, class A>
Scratch<A> pack_up_weight(const T* weight, int64_t channels, int64_t factor, bool channels_last) {
  const int64_t taps = 4 * factor * factor;
  Scratch<A> packed(channels * taps);
  if (channels_last) {
    kernels<T>().load_transposed({weight, taps}, {packed.get(), channels}, channels, taps);
  } else {
    kernels<T>().load({weight, taps}, {packed.get(), taps}, channels, taps);
  }
  return packed;
}

}  // namespace dla_fast::cpu
