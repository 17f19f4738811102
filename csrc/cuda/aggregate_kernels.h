// Aggregation node in inference, for problems so small that latency decides: y = act(BN(sum of W_i x_i) + x_0).
//
// M pixels, K = sum of the inputs' channels, N outputs. One launch. A block makes 32 pixels x 32 outputs; its eight
// warps divide the depth among them, so that a deep node is no longer than an eighth of its depth. Nothing is staged:
// each lane reads the words of its fragments from memory, 16 bytes at a time. The order of the depth in a product is
// free as long as both operands agree, so a lane's 16 bytes are the words of two products. The warps' sums meet in
// shared memory, where BN, the residual and the activation follow. (M K ceil(N / 32) + N K ceil(M / 32) + M N) b bytes
// are issued, all but (M K + N K + M N) b of them to the caches; 2 M N K flops.
//
// x_i: (M, C_i) channels_last or (images, C_i, pixels); weight: (N, K); y like x_i.

#pragma once

#include "mma.h"

namespace dla_fast::cuda {

constexpr int kTile = 32;        // pixels and outputs of a block
constexpr int kDepthWords = 16;  // of 32 bits: what a warp takes of the depth at once

struct NodeShape {
  int64_t images, pixels, channels;  // channels: of the output
  int depth;
};

// Values to a word of 32 bits.
template <class T>
constexpr int kPerWord = 4 / sizeof(T);

template <class T>
__device__ __forceinline__ uint32_t word_of(T low, T high) {
  if constexpr (sizeof(T) == 4) {
    return tf32_word(low);
  } else {
    uint16_t a, b;
    memcpy(&a, &low, 2);
    memcpy(&b, &high, 2);
    return static_cast<uint32_t>(a) | static_cast<uint32_t>(b) << 16;
  }
}

// Four words along the depth of a row whose values lie side by side, from depth k on; zero from `end` on. WIDE: they
// are aligned to 16 bytes, and a row ends at a multiple of that.
template <bool WIDE, class T>
__device__ __forceinline__ void depth_words(const T* row, int k, int end, uint32_t (&words)[4]) {
  constexpr int P = kPerWord<T>;
  T values[4 * P];
  if constexpr (WIDE) {
    if (k < end) {
      const auto pack = load<4 * P>(row + k);
#pragma unroll
      for (int i = 0; i < 4 * P; ++i) values[i] = pack.v[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4 * P; ++i) values[i] = narrow<T>(0.f);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4 * P; ++i) values[i] = k + i < end ? row[k + i] : narrow<T>(0.f);
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = word_of(values[w * P], values[w * P + P - 1]);
}

// A lane's words of the pixels, [row][word]: rows are its four pixels. channels_last: pixels g, g + 8, g + 16, g + 24.
// Contiguous: pixels 4 g to 4 g + 3, which lie side by side; WIDE reads them at once.
template <bool CL, bool WIDE, class T>
__device__ __forceinline__ void pixel_words(const T* x, int channels, int k, int64_t image, int64_t pixel,
                                            const NodeShape& s, int g, uint32_t (&words)[4][4]) {
  constexpr int P = kPerWord<T>;
  if constexpr (CL) {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
      const int64_t at = pixel + g + 8 * row;
      const bool inside = at < s.pixels;
      depth_words<WIDE>(x + (image * s.pixels + (inside ? at : 0)) * channels, k, inside ? channels : 0, words[row]);
    }
  } else {
    T values[4 * P][4];
    const int64_t at = pixel + 4 * g;
#pragma unroll
    for (int i = 0; i < 4 * P; ++i) {
      const T* from = x + (image * channels + (k + i)) * s.pixels + at;
      if constexpr (WIDE) {
        if (k + i < channels && at < s.pixels) {
          const auto pack = load<4>(from);
#pragma unroll
          for (int row = 0; row < 4; ++row) values[i][row] = pack.v[row];
        } else {
#pragma unroll
          for (int row = 0; row < 4; ++row) values[i][row] = narrow<T>(0.f);
        }
      } else {
#pragma unroll
        for (int row = 0; row < 4; ++row) {
          values[i][row] = k + i < channels && at + row < s.pixels ? from[row] : narrow<T>(0.f);
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 4; ++row) {
#pragma unroll
      for (int w = 0; w < 4; ++w) words[row][w] = word_of(values[w * P][row], values[w * P + P - 1][row]);
    }
  }
}

template <class T, bool CL, bool WIDE>
__global__ void __launch_bounds__(kThreads, 1)
    aggregate_inference_kernel(NodeShape s, Norm norm, const __grid_constant__ Inputs xs, const T* weight,
                               Vector conv_bias, bool residual, T* y) {
  constexpr int P = kPerWord<T>, STEP = kDepthWords * P, WARPS = kThreads / 32;
  DLA_SHARED(float, sums, WARPS * kTile * (kTile + 1));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t per_image = (s.pixels + kTile - 1) / kTile;
  const int64_t image = blockIdx.x / per_image, pixel = blockIdx.x % per_image * kTile;
  const int64_t output = static_cast<int64_t>(blockIdx.y) * kTile;
  // d[pixels of 16][outputs of 8].
  float d[2][4][4] = {};
  int offset = 0, turn = warp;
  for (int input = 0; input < xs.count; ++input) {
    const int channels = xs.channels[input];
    const T* x = static_cast<const T*>(xs.data[input]);
    int k = turn * STEP;
    for (; k < channels; k += WARPS * STEP) {
      uint32_t a[4][4], b[4][4];
      pixel_words<CL, WIDE>(x, channels, k + t * 4 * P, image, pixel, s, g, a);
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        const int64_t n = output + column * 8 + g;
        const bool inside = n < s.channels;
        depth_words<WIDE>(weight + (inside ? n : 0) * s.depth + offset, k + t * 4 * P, inside ? channels : 0,
                          b[column]);
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int rows = 0; rows < 2; ++rows) {
          const uint32_t of_a[4] = {a[2 * rows][2 * step], a[2 * rows + 1][2 * step], a[2 * rows][2 * step + 1],
                                    a[2 * rows + 1][2 * step + 1]};
#pragma unroll
          for (int column = 0; column < 4; ++column) {
            const uint32_t of_b[2] = {b[column][2 * step], b[column][2 * step + 1]};
            multiply_add<T>(d[rows][column], of_a, of_b);
          }
        }
      }
    }
    // The next input goes on with the warp whose turn it is.
    const int taken = (channels + STEP - 1) / STEP;
    turn = (turn - taken % WARPS + WARPS) % WARPS;
    offset += channels;
  }
#pragma unroll
  for (int rows = 0; rows < 2; ++rows) {
#pragma unroll
    for (int column = 0; column < 4; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * rows + i / 2;  // of the lane's four pixels
        const int at = CL ? g + 8 * row : 4 * g + row;
        sums[(warp * kTile + at) * (kTile + 1) + column * 8 + 2 * t + i % 2] = d[rows][column][i];
      }
    }
  }
  __syncthreads();
  // Neighbouring threads write neighbours in memory.
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int row = CL ? i / kTile : i % kTile, column = CL ? i % kTile : i / kTile;
    const int64_t p = pixel + row, n = output + column;
    if (p >= s.pixels || n >= s.channels) continue;
    float z = 0.f;
    for (int w = 0; w < WARPS; ++w) z += sums[(w * kTile + row) * (kTile + 1) + column];
    const float scale =
        value_of<float>(norm.gamma, n, 1.f) / sqrtf(value_of<float>(norm.var, n, 1.f) + static_cast<float>(norm.eps));
    float u = (z + value_of<float>(conv_bias, n, 0.f) - value_of<float>(norm.mean, n, 0.f)) * scale +
              value_of<float>(norm.beta, n, 0.f);
    const int64_t to = CL ? (image * s.pixels + p) * s.channels + n : (image * s.channels + n) * s.pixels + p;
    if (residual) u += widen(static_cast<const T*>(xs.data[0])[to]);
    const float slope = static_cast<float>(norm.slope);
    y[to] = narrow<T>(with_act(norm.act, [&](auto act) { return activate<act.value>(slope, u); }));
  }
}

}  // namespace dla_fast::cuda
