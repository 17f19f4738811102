// What sums of products become where they are finished in registers.

#pragma once

#include "../shared/kernels.h"

namespace dla_fast::cpu {

// y = act((z - center) * scale + shift + residual), where act is ReLU or nothing. y and residual are laid out alike.
template <class T>
struct Finish {
  using A = acc_t<T>;
  const A *center, *scale, *shift;
  bool relu;
  const T* residual;  // or null
  T* y;
  int64_t ld;

  // Whether it serves a norm.
  static bool serves(const Norm<A>& norm) { return norm.act == Act::relu || norm.act == Act::identity; }
  static Finish of(const Norm<A>& norm, const T* residual, T* y, int64_t ld) {
    return {norm.center, norm.scale, norm.shift, norm.act == Act::relu, residual, y, ld};
  }

  // Of the columns from `channel` on, and of y from so many values on.
  Finish from(int64_t channel, int64_t at) const {
    return {center + channel,
            scale + channel,
            shift + channel,
            relu,
            residual == nullptr ? nullptr : residual + at,
            y + at,
            ld};
  }
};

}  // namespace dla_fast::cpu
