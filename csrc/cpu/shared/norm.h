// The normalisation of one call, without torch: its vectors, its gradient tile by tile, and the moments of a batch.

#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dla_fast::cpu {

// The vectors so many times one after another: of as many pixels side by side, as Tiling folds them.
template <class T>
std::vector<T> repeated(const std::vector<T>& values, int64_t times);

// One value a channel, in the accumulation type; center is the mean less the convolution's bias.
template <class A>
struct NormVectors {
  std::vector<A> center, rstd, scale, shift;
  Act act;
  A slope;

  void repeat(int64_t times);

  Norm<A> from(int64_t channel) const {
    return {center.data() + channel, rstd.data() + channel, scale.data() + channel, shift.data() + channel, act, slope};
  }
};

// What a unit's output is formed of, y = act(norm(z) + residual), by who reads it: maps in one layout.
template <class T>
struct Ending {
  using A = acc_t<T>;

  NormVectors<A> norm;
  const T *z, *residual;  // residual: null where there is none

  // y of a tile that begins with so many values before it and a channel, rows `ld` apart.
  void form(const Shape& shape, int64_t channel, int64_t at, int64_t ld, Strided<A> y) const {
    kernels<T>().form(shape, norm.from(channel), {z + at, ld}, {residual == nullptr ? nullptr : residual + at, ld}, y);
  }
};

// What the gradient of z is formed from: maps in one layout, and what the batch's statistics take from it (nothing
// where they are frozen: times a value that is not finite a zero is NaN).
template <class T>
struct TailGradient {
  using A = acc_t<T>;

  NormVectors<A> norm;
  std::vector<A> mean_dy, mean_dy_xhat;
  const T *dy, *z;
  const T* residual;  // null where there is none

  void repeat(int64_t times) {
    norm.repeat(times);
    mean_dy = repeated(mean_dy, times);
    mean_dy_xhat = repeated(mean_dy_xhat, times);
  }

  bool frozen() const { return mean_dy.empty(); }

  // dz of a tile that begins with so many values before it and a channel, rows `ld` apart; and the gradient du of what
  // is activated where its data is not null.
  void form(const Shape& shape, int64_t channel, int64_t at, int64_t ld, Strided<A> dz, Strided<A> du) const {
    kernels<T>().apply(shape, norm.from(channel), frozen() ? nullptr : mean_dy.data() + channel,
                       frozen() ? nullptr : mean_dy_xhat.data() + channel, {dy + at, ld}, {z + at, ld},
                       {residual == nullptr ? nullptr : residual + at, ld}, dz, du);
  }
};

// Per group and channel the sums of dy' and of dy' * x_hat.
struct GradientSums {
  int64_t groups, channels;
  std::vector<double> dy, dy_xhat;

  GradientSums(int64_t groups, int64_t channels)
      : groups(groups), channels(channels), dy(groups * channels), dy_xhat(groups * channels) {}

  // The groups' in order.
  template <class A>
  void finalise(A* sum_dy, A* sum_dy_xhat) const;
};

// Per group and channel: mean, m2, delta of the tile kernels' moments, and how many values they stand for.
template <class A>
struct MomentPartials {
  int64_t groups, channels;
  std::vector<A> mean, m2, delta;
  std::vector<int64_t> count;

  MomentPartials(int64_t groups, int64_t channels)
      : groups(groups),
        channels(channels),
        mean(groups * channels),
        m2(groups * channels),
        delta(groups * channels),
        count(groups) {}

  // Mean and biased variance by Chan, Golub and LeVeque's pairwise formula (1979), summed in double.
  void finalise(A* mean_out, A* var_out) const;
};

}  // namespace dla_fast::cpu
