// Gradients of the learned upsampling by 2 or 4, channels_last: as upsample_backward_kernels.h, by phases of dy.
//
// dy is f x f maps of the size of x, its phases; four taps of the kernel belong to each. A thread keeps to one phase
// and walks pixels of x in strips of R: each needs 2 x 2 values of the phase, of which a strip reads every one once a
// row of x. It sums these times its four weights, which is its phase's part of dx, and times x into the gradient of its
// four weights, which stays in registers. The phases of a pixel stand in one warp, where the parts of dx are added up.
// Per vector of dy: 1 + 1 / R reads, twice (the second from cache), and 8 flops a value.
//
// Layouts and partial as in upsample_backward_kernels.h.

#pragma once

#include "upsample_kernels.h"

namespace dla_fast::cuda {

// Adds up N values over the threads of a warp whose positions differ in bits from APART on, in a fixed order. The sums
// are divided among them: where a bit is set a thread keeps the upper half of what is left. While one is left, all have
// it.
template <int N, int APART, class A, int V>
__device__ __forceinline__ void add_in_warp(A (&values)[V], int position) {
  if constexpr (APART < 32) {
    if constexpr (N > 1) {
      const bool upper = position & APART;
#pragma unroll
      for (int k = 0; k < N / 2; ++k) {
        const A kept = upper ? values[N / 2 + k] : values[k], given = upper ? values[k] : values[N / 2 + k];
        values[k] = kept + __shfl_xor_sync(0xffffffff, given, APART);
      }
    } else {
      values[0] += __shfl_xor_sync(0xffffffff, values[0], APART);
    }
    add_in_warp<(N > 1 ? N / 2 : 1), 2 * APART>(values, position);
  }
}

// Thread: V channels of R pixels and one phase. position in the warp = phase * COLUMNS + inner * lanes + lane, where
// the warps and what is left of COLUMNS take different strips.
template <class T, int V, int F>
__global__ void __launch_bounds__(kThreads, kArchitecture < 100 ? 2 : 1)
    upsample_backward_kernel(UpShape s, int lanes, const T* dy, const T* x, const T* weight, acc_t<T>* partial, T* dx) {
  using A = acc_t<T>;
  constexpr int R = 2, PHASES = F * F, COLUMNS = 32 / PHASES, TAPS = 4 * F * F, P = F / 2;
  // Weights lie in shared memory 16 bytes by 16 bytes, neighbouring threads' side by side.
  constexpr int PART = 16 / sizeof(A), PARTS = V / PART;
  DLA_SHARED(A, weights, 4 * 32 * V);
  DLA_SHARED(A, sums, kThreads * V);
  const int position = threadIdx.x % 32, warp = threadIdx.x / 32, inners = COLUMNS / lanes;
  const int phase = position / COLUMNS, lane = position % lanes, inner = position % COLUMNS / lanes;
  const int py = phase / F, px = phase % F, down = (py + P) / F, right = (px + P) / F;
  const int tap = (py + P) % F * 2 * F + (px + P) % F;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * lanes + lane) * V;
  const bool here = channel < s.channels;
  if (warp < 4) {
    // Tap 2 a + b of the four: the kernel's first or second half by rows and by columns.
    const int from = tap + (warp / 2 * 2 * F + warp % 2) * F;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      weights[((warp * PARTS + v / PART) * 32 + position) * PART + v % PART] =
          here ? A(widen(weight[(channel + v) * TAPS + from])) : A(0);
    }
  }
  __syncthreads();
  A dw[4][V] = {};
  const int strips = (s.width + R - 1) / R, slots = kThreads / 32 * inners;
  const int64_t count = s.images * s.height * strips, step = static_cast<int64_t>(gridDim.y) * slots;
  const int64_t line = s.out_width * s.channels * F, apart = F * s.channels;
  int64_t i = static_cast<int64_t>(blockIdx.y) * slots + warp * inners + inner;
  Strips at(i, step, strips, s.height);
  // The lanes of a warp go round equally often: they hand each other values.
  for (int64_t begin = i - inner; begin < count; begin += step, i += step, at.advance()) {
    const bool active = here && i < count;
    const int ix = at.strip * R, iy = at.row;
    // The phase's values that the first half of the kernel meets stand `down` rows and `right` columns before.
    const bool above = active && iy >= down, below = active && iy + 1 - down < s.height;
    const T* from =
        dy + channel +
        ((at.image * s.out_height + (iy - down) * F + py) * s.out_width + (ix - right) * F + px) * s.channels;
    const int64_t pixel = ((at.image * s.height + iy) * s.width + ix) * s.channels + channel;
    Pack<T, V> read[2][R + 1], own[R];
#pragma unroll
    for (int b = 0; b <= R; ++b) {
      const bool inside = ix + b >= right && ix + b - right < s.width;
      read[0][b] = load_if<V>(above && inside, from);
      read[1][b] = load_if<V>(below && inside, from + line);
      from += apart;
    }
#pragma unroll
    for (int r = 0; r < R; ++r) own[r] = load_if<V>(active && ix + r < s.width, x + pixel + r * s.channels);
    A grad[R + 1][V], in[R][V], out[R][V] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) widen_all(own[r], in[r]);
#pragma unroll
    for (int a = 0; a < 2; ++a) {
#pragma unroll
      for (int b = 0; b <= R; ++b) widen_all(read[a][b], grad[b]);
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const auto w = load_shared<PART>(weights, (((2 * a + b) * PARTS + part) * 32 + position) * PART);
#pragma unroll
          for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int k = 0; k < PART; ++k) {
              const int v = part * PART + k;
              out[r][v] += grad[r + b][v] * w.v[k];
              dw[2 * a + b][v] += grad[r + b][v] * in[r][v];
            }
          }
        }
      }
    }
    if (dx == nullptr) continue;
    constexpr int LEFT = V > PHASES ? V / PHASES : 1;
    int first = 0, bit = COLUMNS;
#pragma unroll
    for (int half = V / 2; half >= LEFT; half /= 2, bit *= 2) first += position & bit ? half : 0;
    // Of threads that have the same sum one writes it.
    const bool writes = active && position < bit;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      add_in_warp<V, COLUMNS>(out[r], position);
      Pack<T, LEFT> value;
#pragma unroll
      for (int k = 0; k < LEFT; ++k) value.v[k] = narrow<T>(out[r][k]);
      if (writes && ix + r < s.width) store<LEFT>(dx + pixel + r * s.channels + first, value);
    }
  }
  if (partial == nullptr) return;
  // One tap after the other, so that shared memory holds V values a thread. A warp adds up a channel of each vector.
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v * kThreads + threadIdx.x] = dw[q][v];
    __syncthreads();
    if (warp < V && inner == 0 && here) {
      A sum = A(0);
      for (int other = 0; other < kThreads / 32; ++other) {
        for (int k = 0; k < inners; ++k) sum += sums[warp * kThreads + other * 32 + position + k * lanes];
      }
      partial[(blockIdx.y * s.channels + channel + warp) * TAPS + tap + (q / 2 * 2 * F + q % 2) * F] = sum;
    }
    __syncthreads();
  }
}

}  // namespace dla_fast::cuda
