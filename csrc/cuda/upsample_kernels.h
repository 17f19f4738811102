// Learned upsampling: depthwise transposed convolution with kernel 2f, stride f, padding p = f / 2, and an optional
// add.
//
// y[oy, ox] = sum over the up to 2 x 2 pixels (iy, ix) with 0 <= oy + p - iy f < 2f of x[iy, ix] w[oy + p - iy f, ...].
// With oy + p = q f + r these are iy = q (row r of the kernel) and iy = q - 1 (row r + f), likewise along a row. So a
// phase (oy mod f, ox mod f) of y needs the same four weights everywhere, and the f x f values of a cell q the same
// four values of x. Per low-resolution pixel and channel: 1 value read, f^2 written (and f^2 read for the add), 8 f^2
// flops.
//
// x: (images, channels, H, W), y and skip: (images, channels, (H - 1) f - 2p + 2f, ...), weight: (channels, 2f, 2f).

#pragma once

#include "device.h"

namespace dla_fast::cuda {

struct UpShape {
  int64_t images, channels;
  int height, width, out_height, out_width, factor;
};

// Strips of a map, row after row and image after image. Advances by a fixed number of strips, by addition: a division
// costs more than what is done with a value.
struct Strips {
  int strip, row;
  int64_t image;

  __device__ __forceinline__ Strips(int64_t first, int64_t step, int strips, int rows)
      : strip(static_cast<int>(first % strips)),
        row(static_cast<int>(first / strips % rows)),
        image(first / strips / rows),
        strips_(strips),
        rows_(rows),
        more_strips_(static_cast<int>(step % strips)),
        more_rows_(static_cast<int>(step / strips % rows)),
        more_images_(step / strips / rows) {}

  __device__ __forceinline__ void advance() {
    strip += more_strips_;
    row += more_rows_;
    image += more_images_;
    if (strip >= strips_) {
      strip -= strips_;
      ++row;
    }
    if (row >= rows_) {
      row -= rows_;
      ++image;
    }
  }

 private:
  int strips_, rows_, more_strips_, more_rows_;
  int64_t more_images_;
};

// channels_last. Thread: V channels of one phase, whose weights stay in registers, and R values of that phase in a row
// at a time. thread = (slot * phases + phase) * lanes + lane; a block has `phases` of the f^2, so that what these read
// of x comes from cache for all but one.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    upsample_kernel(UpShape s, int lanes, int phases, const T* x, const T* weight, const T* skip, T* y) {
  using A = acc_t<T>;
  const int f = s.factor, pad = f / 2;
  const int lane = threadIdx.x % lanes, rest = threadIdx.x / lanes, slots = kThreads / lanes / phases;
  const int64_t along = (s.channels + lanes * V - 1) / (lanes * V);
  const int64_t channel = (blockIdx.x % along * lanes + lane) * V;
  const int slot = rest / phases, phase = static_cast<int>(blockIdx.x / along) * phases + rest % phases;
  if (slot >= slots || phase >= f * f || channel >= s.channels) return;
  const int py = phase / f, px = phase % f, down = (py + pad) / f, right = (px + pad) / f;
  A w[2][2][V];
#pragma unroll
  for (int a = 0; a < 2; ++a) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      // The row and column before come with the kernel's second half.
      const int64_t tap = ((py + pad) % f + (1 - a) * f) * 2 * static_cast<int64_t>(f) + (px + pad) % f + (1 - b) * f;
#pragma unroll
      for (int v = 0; v < V; ++v) w[a][b][v] = widen(weight[(channel + v) * (4 * static_cast<int64_t>(f) * f) + tap]);
    }
  }
  with_or_without(skip, [&](auto with) {
    constexpr int R = with.value && sizeof(T) == 2 ? 2 : 4;
    const int rows = (s.out_height + f - 1) / f, strips = ((s.out_width + f - 1) / f + R - 1) / R;
    const int64_t count = s.images * rows * strips, step = static_cast<int64_t>(gridDim.y) * slots;
    const int64_t line = s.width * s.channels, apart = f * s.channels;
    int64_t i = static_cast<int64_t>(blockIdx.y) * slots + slot;
    for (Strips at(i, step, strips, rows); i < count; i += step, at.advance()) {
      const int oy = at.row * f + py, ox = at.strip * (R * f) + px;
      if (oy >= s.out_height) continue;
      const int iy = at.row + down - 1, ix = at.strip * R + right - 1;
      const bool above = iy >= 0, below = iy + 1 < s.height;
      // Pointers advance by addition, too.
      const T* from = x + ((at.image * s.height + iy) * s.width + ix) * s.channels + channel;
      int64_t to = ((at.image * s.out_height + oy) * s.out_width + ox) * s.channels + channel;
      Pack<T, V> in[2][R + 1], added[R];
#pragma unroll
      for (int b = 0; b <= R; ++b) {
        const bool inside = ix + b >= 0 && ix + b < s.width;
        in[0][b] = load_if<V>(inside && above, from);
        in[1][b] = load_if<V>(inside && below, from + line);
        from += s.channels;
      }
      if constexpr (with.value) {
#pragma unroll
        for (int r = 0; r < R; ++r) added[r] = load_if<V>(ox + r * f < s.out_width, skip + to + r * apart);
      }
      A before[2][V], now[2][V];
      widen_all(in[0][0], before[0]);
      widen_all(in[1][0], before[1]);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        A sum[V] = {};
        if constexpr (with.value) widen_all(added[r], sum);
        widen_all(in[0][r + 1], now[0]);
        widen_all(in[1][r + 1], now[1]);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A value =
              before[0][v] * w[0][0][v] + now[0][v] * w[0][1][v] + before[1][v] * w[1][0][v] + now[1][v] * w[1][1][v];
          sum[v] = with.value ? value + sum[v] : value;
          before[0][v] = now[0][v];
          before[1][v] = now[1][v];
        }
        if (ox + r * f < s.out_width) store<V>(y + to, narrow_all<T>(sum));
        to += apart;
      }
    }
  });
}

// Contiguous, f = F, rows of y a multiple of W = max(V, F). A block takes one channel. Thread: W outputs in a row of
// all F phases of a cell row, written V at a time.
template <class T>
constexpr int kRowsResident = sizeof(T) == 8 ? 2 : 3;

template <class T, int V, int F>
__global__ void __launch_bounds__(kThreads, kRowsResident<T>)
    upsample_rows_kernel(UpShape s, const T* x, const T* weight, const T* skip, T* y) {
  using A = acc_t<T>;
  constexpr int W = V > F ? V : F, P = F / 2, X = W / F, TAPS = 4 * F * F, PART = 16 / sizeof(A);
  // Of the smallest kernel the weights fit into registers, and all that is added is read before any of it is used.
  constexpr bool KEPT = F == 2;
  DLA_SHARED(A, taps, TAPS);
  const int64_t channel = blockIdx.x;
  for (int i = threadIdx.x; i < TAPS; i += kThreads) taps[i] = widen(weight[channel * TAPS + i]);
  __syncthreads();
  A kept[KEPT ? TAPS : 1];
  if constexpr (KEPT) {
#pragma unroll
    for (int i = 0; i < TAPS; ++i) kept[i] = taps[i];
  }
  const int chunks = s.out_width / W;
  const int64_t count = s.images * (s.height + 1) * chunks, step = static_cast<int64_t>(gridDim.y) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  for (Strips at(i, step, chunks, s.height + 1); i < count; i += step, at.advance()) {
    const int ix = at.strip * X, iy = at.row - 1;
    const int64_t plane = at.image * s.channels + channel;
    const T* from = x + (plane * s.height + iy) * s.width + ix;
    const int64_t to = (plane * s.out_height + at.row * F - P) * s.out_width + ix * F;
    const auto addend = [&](int ry, int part) {
      const int oy = at.row * F + ry - P;
      return load_if<V>(skip != nullptr && oy >= 0 && oy < s.out_height, skip + to + ry * s.out_width + part);
    };
    Pack<T, V> added[KEPT ? F : 1];
    if constexpr (KEPT) {
#pragma unroll
      for (int ry = 0; ry < F; ++ry) added[ry] = addend(ry, 0);
    }
    // Rows iy and iy + 1, columns ix - 1 to ix + X; zero outside the map.
    A in[2][X + 2];
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      const bool there = iy + a >= 0 && iy + a < s.height;
      const auto middle = load_if<X>(there, from + a * s.width);
      in[a][0] = widen(load_if<1>(there && ix > 0, from + a * s.width - 1).v[0]);
      in[a][X + 1] = widen(load_if<1>(there && ix + X < s.width, from + a * s.width + X).v[0]);
#pragma unroll
      for (int b = 0; b < X; ++b) in[a][b + 1] = widen(middle.v[b]);
    }
#pragma unroll
    for (int ry = 0; ry < F; ++ry) {
      const int oy = at.row * F + ry - P;
      if (oy < 0 || oy >= s.out_height) continue;
      A low[2 * F], high[2 * F];
      if constexpr (KEPT) {
#pragma unroll
        for (int k = 0; k < 2 * F; ++k) {
          low[k] = kept[ry * 2 * F + k];
          high[k] = kept[(ry + F) * 2 * F + k];
        }
      } else {
#pragma unroll
        for (int part = 0; part < 2 * F; part += PART) {
          const auto lows = load_shared<PART>(taps, ry * 2 * F + part);
          const auto highs = load_shared<PART>(taps, (ry + F) * 2 * F + part);
#pragma unroll
          for (int k = 0; k < PART; ++k) {
            low[part + k] = lows.v[k];
            high[part + k] = highs.v[k];
          }
        }
      }
#pragma unroll
      for (int part = 0; part < W; part += V) {
        A sum[V], add[V] = {};
        if (skip != nullptr) widen_all(KEPT ? added[KEPT ? ry : 0] : addend(ry, part), add);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int q = (part + v + P) / F, r = (part + v + P) % F;
          sum[v] = in[0][q] * high[r + F] + in[0][q + 1] * high[r] + in[1][q] * low[r + F] + in[1][q + 1] * low[r];
          if (skip != nullptr) sum[v] += add[v];
        }
        store<V>(y + to + ry * s.out_width + part, narrow_all<T>(sum));
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
