// The normalisation's passes over a whole map: moments, the tail y = act((z - mean) * gamma * rstd + beta + residual),
// and its backward.
//
// Traffic in elements of z (N of them): moments N; tail 2N, reduce 2N, apply 3N, and N more each for a residual. About
// 10 flops an element, so every pass is bound by memory.

#pragma once

#include "../shared/norm.h"

namespace dla_fast::cpu {

// A dense map.
struct MapSize {
  bool channels_last;
  int64_t images, channels, pixels;
  int64_t values() const { return images * channels * pixels; }
};

template <class T>
void moments_pass(const MapSize& size, const T* z, acc_t<T>* mean, acc_t<T>* var);

// residual may be null.
template <class T>
void tail_pass(const MapSize& size, NormVectors<acc_t<T>> norm, const T* z, const T* residual, T* y);

// Per channel: the sum of dy' = dy * act'(u), and of dy' * x_hat.
template <class T>
void reduce_pass(const MapSize& size, TailGradient<T> gradient, acc_t<T>* sum_dy, acc_t<T>* sum_dy_xhat);

// The same, and dy' in du, which may be dy itself.
template <class T>
void through_pass(const MapSize& size, TailGradient<T> gradient, T* du, acc_t<T>* sum_dy, acc_t<T>* sum_dy_xhat);

// dz, and du where that is not null.
template <class T>
void apply_pass(const MapSize& size, TailGradient<T> gradient, T* dz, T* du);

}  // namespace dla_fast::cpu
