// IDA's learned upsampling: depthwise transposed convolution, kernel 2f, stride f, padding f / 2.

#pragma once

#include <tuple>

#include "common.h"

namespace dla_fast::cpu {

Tensor upsample(const Tensor& x, const Tensor& weight, int64_t factor);

Tensor upsample_add(const Tensor& x, const Tensor& skip, const Tensor& weight, int64_t factor);

std::tuple<Tensor, Tensor> upsample_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t factor,
                                             bool need_dx, bool need_dw);

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

// The kernel in the accumulation type: [2f][2f][C] for channels_last, else [C][2f][2f].
template <class T, class A>
Scratch<A> pack_up_weight(const Tensor& weight, int64_t factor, bool channels_last) {
  const int64_t channels = weight.size(0), taps = 4 * factor * factor;
  const Tensor w = weight.contiguous();
  Scratch<A> packed(channels * taps);
  const Strided<const T> from = {w.const_data_ptr<T>(), taps};
  if (channels_last) {
    kernels<T>().load_transposed(from, {packed.get(), channels}, channels, taps);
  } else {
    kernels<T>().load(from, {packed.get(), taps}, channels, taps);
  }
  return packed;
}

}  // namespace dla_fast::cpu
