// Learned upsampling: depthwise transposed convolution with kernel 2f, stride f, padding p = f / 2, and an optional
// add.
//
// y[oy, ox] = sum over the up to 2 x 2 pixels (iy, ix) with 0 <= oy + p - iy f < 2f of x[iy, ix] w[oy + p - iy f, ...].
// With oy + p = q f + r these are iy = q (row r of the kernel) and iy = q - 1 (row r + f): the cell q has f phases r,
// and its f x f outputs need the same four values of x. A thread reads those once and writes all phases from registers.
// Per low-resolution pixel and channel: 1 value read, f^2 written (and f^2 read for the add), 8 f^2 flops.
//
// x: (images, channels, H, W), y and skip: (images, channels, (H - 1) f - 2p + 2f, ...), weight: (channels, 2f, 2f).

#pragma once

#include "device.h"

namespace dla_fast::cuda {

struct UpShape {
  int64_t images, channels;
  int height, width, out_height, out_width, factor;
};

// channels_last. Thread: V channels of R cells side by side, whose phases share the weights that they load.
// STAGED: the block's weights lie in shared memory, tap by tap; else they are read where they are.
template <class T, int V, int R, bool STAGED>
__global__ void __launch_bounds__(kThreads, 1)
    upsample_kernel(UpShape s, int lanes, const T* x, const T* weight, const T* skip, T* y) {
  using A = acc_t<T>;
  DLA_DYNAMIC_SHARED(T, staged);
  const int f = s.factor, pad = f / 2, taps = 4 * f * f;
  const int lane = threadIdx.x % lanes, slot = threadIdx.x / lanes, slots = kThreads / lanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * lanes * V, channel = first + lane * V;
  if constexpr (STAGED) {
    const int wide = lanes * V;
    for (int i = threadIdx.x; i < wide * taps; i += kThreads) {
      // Neighbouring threads read neighbouring taps of a channel.
      const int c = i / taps, tap = i % taps;
      staged[tap * wide + c] = first + c < s.channels ? weight[(first + c) * taps + tap] : narrow<T>(A(0));
    }
    __syncthreads();
  }
  if (channel >= s.channels) return;
  const int strips = (s.width + R) / R;
  const int64_t count = s.images * (s.height + 1) * strips;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * slots + slot; i < count;
       i += static_cast<int64_t>(gridDim.y) * slots) {
    const int qx = static_cast<int>(i % strips) * R;
    const int64_t row = i / strips;
    const int qy = static_cast<int>(row % (s.height + 1));
    const int64_t image = row / (s.height + 1);
    // Rows qy - 1 and qy, columns qx - 1 to qx + R - 1; zero outside the map.
    A in[2][R + 1][V];
#pragma unroll
    for (int a = 0; a < 2; ++a) {
#pragma unroll
      for (int b = 0; b <= R; ++b) {
        const int iy = qy - 1 + a, ix = qx - 1 + b;
        if (iy >= 0 && iy < s.height && ix >= 0 && ix < s.width) {
          const auto value = load<V>(x + ((image * s.height + iy) * s.width + ix) * s.channels + channel);
#pragma unroll
          for (int v = 0; v < V; ++v) in[a][b][v] = widen(value.v[v]);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) in[a][b][v] = A(0);
        }
      }
    }
    for (int ry = 0; ry < f; ++ry) {
      const int oy = f * qy + ry - pad;
      if (oy < 0 || oy >= s.out_height) continue;
      for (int rx = 0; rx < f; ++rx) {
        A w[2][2][V];
#pragma unroll
        for (int a = 0; a < 2; ++a) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            // The row and column before come with the kernel's second half.
            const int tap = (ry + (1 - a) * f) * 2 * f + rx + (1 - b) * f;
            Pack<T, V> value;
            if constexpr (STAGED) {
              value = load_shared<V>(staged, tap * lanes * V + lane * V);
            } else {
#pragma unroll
              for (int v = 0; v < V; ++v) value.v[v] = weight[(channel + v) * taps + tap];
            }
#pragma unroll
            for (int v = 0; v < V; ++v) w[a][b][v] = widen(value.v[v]);
          }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int ox = f * (qx + r) + rx - pad;
          if (ox < 0 || ox >= s.out_width) continue;
          const int64_t to = ((image * s.out_height + oy) * s.out_width + ox) * s.channels + channel;
          Pack<T, V> out, added;
          if (skip != nullptr) added = load<V>(skip + to);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            A sum = in[0][r][v] * w[0][0][v] + in[0][r + 1][v] * w[0][1][v] + in[1][r][v] * w[1][0][v] +
                    in[1][r + 1][v] * w[1][1][v];
            if (skip != nullptr) sum += widen(added.v[v]);
            out.v[v] = narrow<T>(sum);
          }
          store<V>(y + to, out);
        }
      }
    }
  }
}

// Contiguous, f = F, rows of y a multiple of W = max(V, F). Thread: W outputs in a row of all F phases of a cell row,
// written V at a time.
template <class T, int V, int F>
__global__ void __launch_bounds__(kThreads, 1)
    upsample_rows_kernel(UpShape s, const T* x, const T* weight, const T* skip, T* y) {
  using A = acc_t<T>;
  constexpr int W = V > F ? V : F, P = F / 2, Q = W / F + 2;
  const int chunks = s.out_width / W;
  const int64_t count = s.images * s.channels * (s.height + 1) * chunks;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int chunk = static_cast<int>(i % chunks);
    const int64_t row = i / chunks;
    const int qy = static_cast<int>(row % (s.height + 1));
    const int64_t plane = row / (s.height + 1);
    const T* from = x + plane * s.height * s.width;
    const T* taps = weight + plane % s.channels * (4 * F * F);
    A in[2][Q];
#pragma unroll
    for (int a = 0; a < 2; ++a) {
#pragma unroll
      for (int b = 0; b < Q; ++b) {
        const int iy = qy - 1 + a, ix = chunk * (W / F) - 1 + b;
        const bool inside = iy >= 0 && iy < s.height && ix >= 0 && ix < s.width;
        in[a][b] = inside ? widen(from[static_cast<int64_t>(iy) * s.width + ix]) : A(0);
      }
    }
    for (int ry = 0; ry < F; ++ry) {
      const int oy = F * qy + ry - P;
      if (oy < 0 || oy >= s.out_height) continue;
      const auto low = load<2 * F>(taps + ry * 2 * F), high = load<2 * F>(taps + (ry + F) * 2 * F);
      const int64_t to = (plane * s.out_height + oy) * s.out_width + static_cast<int64_t>(chunk) * W;
#pragma unroll
      for (int part = 0; part < W; part += V) {
        Pack<T, V> out, added;
        if (skip != nullptr) added = load<V>(skip + to + part);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int q = (part + v + P) / F, r = (part + v + P) % F;
          A sum = in[0][q] * widen(high.v[r + F]) + in[0][q + 1] * widen(high.v[r]) + in[1][q] * widen(low.v[r + F]) +
                  in[1][q + 1] * widen(low.v[r]);
          if (skip != nullptr) sum += widen(added.v[v]);
          out.v[v] = narrow<T>(sum);
        }
        store<V>(y + to + part, out);
      }
    }
  }
}

// Contiguous, any f and size: a thread an output.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    upsample_any_kernel(UpShape s, const T* x, const T* weight, const T* skip, T* y) {
  using A = acc_t<T>;
  const int f = s.factor, pad = f / 2;
  const int64_t count = s.images * s.channels * s.out_height * s.out_width;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int ox = static_cast<int>(i % s.out_width);
    const int64_t row = i / s.out_width;
    const int oy = static_cast<int>(row % s.out_height);
    const int64_t plane = row / s.out_height;
    const T* from = x + plane * s.height * s.width;
    const T* taps = weight + plane % s.channels * (4 * static_cast<int64_t>(f) * f);
    const int qy = (oy + pad) / f, ry = (oy + pad) % f, qx = (ox + pad) / f, rx = (ox + pad) % f;
    A sum = skip != nullptr ? A(widen(skip[i])) : A(0);
#pragma unroll
    for (int a = 0; a < 2; ++a) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int iy = qy - a, ix = qx - b;
        if (iy >= 0 && iy < s.height && ix >= 0 && ix < s.width) {
          sum += widen(from[static_cast<int64_t>(iy) * s.width + ix]) * widen(taps[(ry + a * f) * 2 * f + rx + b * f]);
        }
      }
    }
    y[i] = narrow<T>(sum);
  }
}

}  // namespace dla_fast::cuda
