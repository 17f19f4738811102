// Gradients of the learned upsampling, of its input and of its weight from one reading of dy where f is 2, 4 or 8.
//
// dx[iy, ix] = sum over the kernel's 2f x 2f taps of dy[iy f + ky - p, ix f + kx - p] w[ky, kx], p = f / 2;
// dw[ky, kx] = sum over images and pixels of dy[iy f + ky - p, ix f + kx - p] x[iy, ix]. Per low-resolution pixel and
// channel: 2 values of x and dx and f^2 of dy, each of which four taps need: they come from cache again; 16 f^2 flops.
//
// A thread keeps its share of the weight's gradient in registers over all its pixels. So that it fits, the taps are
// divided by kernel rows among G threads, whose parts of dx are added up in shared memory. Each block leaves one sum
// per tap; `weight_sum_kernel` adds them in order.
//
// Layouts as in upsample_kernels.h; partial: (blocks, channels, 4 f^2), accumulation type.

#pragma once

#include "partial_sums.h"
#include "upsample_kernels.h"

namespace dla_fast::cuda {

// How the taps of f = F are divided: rows of the kernel per thread, threads per pixel. 64 registers hold the sums.
template <class T, int V, int F>
struct TapGroups {
  static constexpr int kSums = 64 / (sizeof(acc_t<T>) / 4) / (2 * F * V);
  static constexpr int rows = kSums < 1 ? 1 : kSums > 2 * F ? 2 * F : kSums;
  static constexpr int count = 2 * F / rows;
};

// channels_last where phases are more than a warp has threads. Thread: V channels of X pixels side by side and `rows`
// rows of the kernel. thread = (group * slots + slot) * lanes + lane.
template <class T, int V, int F>
__global__ void __launch_bounds__(kThreads, 1)
    upsample_backward_taps_kernel(UpShape s, int lanes, const T* dy, const T* x, const T* weight, acc_t<T>* partial,
                                  T* dx) {
  using A = acc_t<T>;
  constexpr int X = 2, ROWS = TapGroups<T, V, F>::rows, G = TapGroups<T, V, F>::count, P = F / 2, TAPS = 4 * F * F;
  DLA_DYNAMIC_SHARED(T, staged);
  DLA_SHARED(A, sums, kThreads * X * V);
  const int wide = lanes * V, slots = kThreads / (lanes * G);
  const int lane = threadIdx.x % lanes, slot = threadIdx.x / lanes % slots, group = threadIdx.x / (lanes * slots);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * wide, channel = first + lane * V;
  const bool here = channel < s.channels;
  for (int i = threadIdx.x; i < wide * TAPS; i += kThreads) {
    const int c = i / TAPS, tap = i % TAPS;
    staged[tap * wide + c] = first + c < s.channels ? weight[(first + c) * TAPS + tap] : narrow<T>(A(0));
  }
  __syncthreads();
  A dw[ROWS][2 * F][V] = {};
  const int strips = (s.width + X - 1) / X;
  const int64_t count = s.images * s.height * strips, step = static_cast<int64_t>(gridDim.y) * slots;
  // All threads of a block go round equally often: they meet at barriers.
  for (int64_t begin = static_cast<int64_t>(blockIdx.y) * slots; begin < count; begin += step) {
    const int64_t i = begin + slot;
    const bool active = here && i < count;
    const int ix = active ? static_cast<int>(i % strips) * X : 0;
    const int64_t row = active ? i / strips : 0;
    const int iy = static_cast<int>(row % s.height);
    const int64_t image = row / s.height;
    const int64_t pixel = ((image * s.height + iy) * s.width + ix) * s.channels + channel;
    A in[X][V], out[X][V] = {};
#pragma unroll
    for (int p = 0; p < X; ++p) {
      Pack<T, V> value;
      const bool there = active && ix + p < s.width;
      if (there) value = load<V>(x + pixel + p * s.channels);
#pragma unroll
      for (int v = 0; v < V; ++v) in[p][v] = there ? A(widen(value.v[v])) : A(0);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int ky = group * ROWS + r, oy = iy * F + ky - P;
      if (!active || oy < 0 || oy >= s.out_height) continue;
      const T* line = dy + (image * s.out_height + oy) * s.out_width * s.channels + channel;
#pragma unroll
      for (int j = 0; j < (X + 1) * F; ++j) {
        const int ox = ix * F + j - P;
        if (ox < 0 || ox >= s.out_width) continue;
        const auto grad = load<V>(line + ox * s.channels);
#pragma unroll
        for (int p = 0; p < X; ++p) {
          const int kx = j - p * F;
          if (kx < 0 || kx >= 2 * F) continue;
          const auto w = load_shared<V>(staged, (ky * 2 * F + kx) * wide + lane * V);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            out[p][v] += widen(grad.v[v]) * widen(w.v[v]);
            dw[r][kx][v] += widen(grad.v[v]) * in[p][v];
          }
        }
      }
    }
    if (dx == nullptr) continue;
    if constexpr (G == 1) {
#pragma unroll
      for (int p = 0; p < X; ++p) {
        if (!active || ix + p >= s.width) continue;
        Pack<T, V> value;
#pragma unroll
        for (int v = 0; v < V; ++v) value.v[v] = narrow<T>(out[p][v]);
        store<V>(dx + pixel + p * s.channels, value);
      }
    } else {
#pragma unroll
      for (int p = 0; p < X; ++p) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[(p * V + v) * kThreads + threadIdx.x] = out[p][v];
      }
      __syncthreads();
      // The first X groups write a pixel each.
      if (group < X && active && ix + group < s.width) {
        Pack<T, V> value;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          A sum = A(0);
          for (int g = 0; g < G; ++g) sum += sums[(group * V + v) * kThreads + (g * slots + slot) * lanes + lane];
          value.v[v] = narrow<T>(sum);
        }
        store<V>(dx + pixel + group * s.channels, value);
      }
      __syncthreads();
    }
  }
  if (partial == nullptr) return;
  // One tap after the other, so that shared memory holds V values a thread.
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int kx = 0; kx < 2 * F; ++kx) {
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v * kThreads + threadIdx.x] = dw[r][kx][v];
      __syncthreads();
      add_over_slots<V>(sums, slot, slots, lanes);
      if (slot == 0 && here) {
        A* to = partial + (blockIdx.y * s.channels + channel) * TAPS + (group * ROWS + r) * 2 * F + kx;
#pragma unroll
        for (int v = 0; v < V; ++v) to[v * TAPS] = sums[v * kThreads + threadIdx.x];
      }
      __syncthreads();
    }
  }
}

// The same for contiguous maps whose rows of y are a multiple of W = max(V, F). A block takes one channel. Thread: W
// values of a row of dy, which are W / F pixels of dx, and `rows` rows of the kernel.
template <class T, int F>
constexpr int kRowsBackwardResident = sizeof(T) == 8 ? 1 : (F == 2 ? 3 : 2);

template <class T, int V, int F>
__global__ void __launch_bounds__(kThreads, F == 2 || kArchitecture < 100 ? kRowsBackwardResident<T, F> : 1)
    upsample_rows_backward_kernel(UpShape s, const T* dy, const T* x, const T* weight, acc_t<T>* partial, T* dx) {
  using A = acc_t<T>;
  constexpr int W = V > F ? V : F, X = W / F, P = F / 2, TAPS = 4 * F * F;
  constexpr int ROWS = TapGroups<T, 1, F>::rows, G = TapGroups<T, 1, F>::count, slots = kThreads / G;
  DLA_SHARED(A, taps, TAPS);
  DLA_SHARED(A, sums, kThreads * X);
  const int slot = threadIdx.x % slots, group = threadIdx.x / slots;
  const int64_t channel = blockIdx.x;
  for (int i = threadIdx.x; i < TAPS; i += kThreads) taps[i] = widen(weight[channel * TAPS + i]);
  __syncthreads();
  A dw[ROWS][2 * F] = {};
  const int chunks = s.out_width / W;
  const int64_t count = s.images * s.height * chunks, step = static_cast<int64_t>(gridDim.y) * slots;
  int64_t i = static_cast<int64_t>(blockIdx.y) * slots + slot;
  Strips at(i, step, chunks, s.height);
  for (; i - slot < count; i += step, at.advance()) {
    const bool active = i < count;
    const int chunk = at.strip, iy = at.row;
    const int64_t plane = at.image * s.channels + channel;
    const int64_t pixel = (plane * s.height + iy) * s.width + chunk * X;
    const T* lines = dy + (plane * s.out_height + iy * F + group * ROWS - P) * s.out_width + chunk * W;
    A in[X], out[X] = {};
    widen_all(load_if<X>(active, x + pixel), in);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int ky = group * ROWS + r, oy = iy * F + ky - P;
      const bool there = active && oy >= 0 && oy < s.out_height;
      // Without a branch the loads of all rows are on their way at once; of larger kernels they do not fit registers.
      if (F > 2 && !there) continue;
      const T* line = lines + r * s.out_width;
      // P values from the neighbours on either side, W of the thread's own.
      A grad[W + F];
#pragma unroll
      for (int j = 0; j < P; ++j) {
        grad[j] = widen(load_if<1>(there && chunk > 0, line - P + j).v[0]);
        grad[W + P + j] = widen(load_if<1>(there && chunk + 1 < chunks, line + W + j).v[0]);
      }
#pragma unroll
      for (int part = 0; part < W; part += V) {
        A value[V];
        widen_all(load_if<V>(there, line + part), value);
#pragma unroll
        for (int v = 0; v < V; ++v) grad[P + part + v] = value[v];
      }
#pragma unroll
      for (int kx = 0; kx < 2 * F; ++kx) {
        const A w = taps[ky * 2 * F + kx];
#pragma unroll
        for (int p = 0; p < X; ++p) {
          out[p] += grad[p * F + kx] * w;
          dw[r][kx] += grad[p * F + kx] * in[p];
        }
      }
    }
    if (dx == nullptr) continue;
    if constexpr (G > 1) {
#pragma unroll
      for (int p = 0; p < X; ++p) sums[p * kThreads + threadIdx.x] = out[p];
      __syncthreads();
      if (group == 0) {
#pragma unroll
        for (int p = 0; p < X; ++p) {
          for (int g = 1; g < G; ++g) out[p] += sums[p * kThreads + g * slots + slot];
        }
      }
      __syncthreads();
    }
    if (active && group == 0) {
      store<X>(dx + pixel, narrow_all<T>(out));
    }
  }
  if (partial == nullptr) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int kx = 0; kx < 2 * F; ++kx) {
      sums[threadIdx.x] = dw[r][kx];
      __syncthreads();
      add_over_slots<1>(sums, slot, slots, 1);
      if (slot == 0) {
        partial[(blockIdx.y * s.channels + channel) * TAPS + (group * ROWS + r) * 2 * F + kx] = sums[threadIdx.x];
      }
      __syncthreads();
    }
  }
}

// dw from the sums of the blocks.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    weight_sum_kernel(const acc_t<T>* partial, int64_t count, int64_t blocks, T* dweight) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  const int slot = threadIdx.x / kLanes;
  double sum[1] = {0.0};
  if (i < count) {
    const auto add = [&](int64_t, const acc_t<T>(&of)[1]) { sum[0] += of[0]; };
    each_group<1>(partial + i, count, 0, blocks, slot, kThreads / kLanes, add);
  }
  sum_over_slots(sum, kLanes);
  if (slot == 0 && i < count) dweight[i] = narrow<T>(static_cast<acc_t<T>>(sum[0]));
}

// Distance in memory of neighbours in a map.
struct Steps {
  int64_t image, channel, row, column;
};

// Any f, either layout: a thread a value of dx.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    upsample_any_dx_kernel(UpShape s, Steps small, Steps large, const T* dy, const T* weight, T* dx) {
  using A = acc_t<T>;
  const int f = s.factor, pad = f / 2;
  const int64_t count = s.images * s.channels * s.height * s.width;
  const bool channels_last = small.channel == 1 && s.channels > 1;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    // Neighbouring threads take neighbours in memory.
    int64_t rest = i, channel = 0;
    if (channels_last) {
      channel = rest % s.channels;
      rest /= s.channels;
    }
    const int ix = static_cast<int>(rest % s.width);
    rest /= s.width;
    const int iy = static_cast<int>(rest % s.height);
    rest /= s.height;
    if (!channels_last) {
      channel = rest % s.channels;
      rest /= s.channels;
    }
    const T* from = dy + rest * large.image + channel * large.channel;
    const T* taps = weight + channel * (4 * static_cast<int64_t>(f) * f);
    A sum = A(0);
    for (int ky = 0; ky < 2 * f; ++ky) {
      const int oy = iy * f + ky - pad;
      if (oy < 0 || oy >= s.out_height) continue;
      for (int kx = 0; kx < 2 * f; ++kx) {
        const int ox = ix * f + kx - pad;
        if (ox >= 0 && ox < s.out_width) {
          sum += widen(from[oy * large.row + ox * large.column]) * widen(taps[ky * 2 * f + kx]);
        }
      }
    }
    dx[rest * small.image + channel * small.channel + iy * small.row + ix * small.column] = narrow<T>(sum);
  }
}

// Any f, either layout: a block a tap of a channel.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    upsample_any_dw_kernel(UpShape s, Steps small, Steps large, const T* dy, const T* x, T* dweight) {
  const int f = s.factor, pad = f / 2;
  const int64_t taps = 4 * static_cast<int64_t>(f) * f, pixels = static_cast<int64_t>(s.height) * s.width;
  const int64_t channel = blockIdx.x / taps;
  const int ky = static_cast<int>(blockIdx.x % taps) / (2 * f), kx = static_cast<int>(blockIdx.x % taps) % (2 * f);
  double sum[1] = {0.0};
  for (int64_t i = threadIdx.x; i < s.images * pixels; i += kThreads) {
    const int64_t image = i / pixels;
    const int iy = static_cast<int>(i % pixels) / s.width, ix = static_cast<int>(i % pixels) % s.width;
    const int oy = iy * f + ky - pad, ox = ix * f + kx - pad;
    if (oy < 0 || oy >= s.out_height || ox < 0 || ox >= s.out_width) continue;
    const acc_t<T> grad = widen(dy[image * large.image + channel * large.channel + oy * large.row + ox * large.column]);
    sum[0] += static_cast<double>(grad) *
              widen(x[image * small.image + channel * small.channel + iy * small.row + ix * small.column]);
  }
  sum_over_slots(sum, 1);
  if (threadIdx.x == 0) dweight[blockIdx.x] = narrow<T>(static_cast<acc_t<T>>(sum[0]));
}

}  // namespace dla_fast::cuda
