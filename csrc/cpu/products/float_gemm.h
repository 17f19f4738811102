// Products of float and double matrices in vector instructions, and the transforms of Winograd's algorithm: what they
// compute and how a call picks an instruction set.

#pragma once

#include "../shared/kernels.h"
#include "finish.h"

namespace dla_fast::cpu {

// Width of a packed panel of the right-hand matrix, in elements: a multiple of every vector length there is.
constexpr int64_t kPanel = 64;

// One input of a sum of products: M x k values read through lda (element (i, p) at a[i * lda + p], or at
// a[p * lda + i] when the left-hand side is transposed). Its right-hand side is b, or where that is null lies below
// that of the segment before. Where rows come in groups, a group begins `step` values behind the one before, and a
// group of groups `outer` values behind the one before.
template <class A>
struct Segment {
  const A* a;
  int64_t lda;
  int64_t k;
  const A* b = nullptr;
  int64_t step = 0, outer = 0;
};

// Memory that is wanted soon: rows of so many cache lines, `stride` bytes apart. A product fetches it in passing,
// `pace` lines for each cache line of a, and moves this on.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, rows = 0, lines = 0, line = 0, pace = 1;

  template <class T>
  static Ahead of(Strided<const T> m, int64_t rows, int64_t cols) {
    return {reinterpret_cast<const char*>(m.data), m.ld * static_cast<int64_t>(sizeof(T)), rows,
            (cols * static_cast<int64_t>(sizeof(T)) + 63) / 64};
  }
};

// Asks for the next lines.
inline void fetch(Ahead& ahead, int64_t lines) {
  for (; lines > 0 && ahead.rows > 0; --lines) {
    __builtin_prefetch(ahead.at + 64 * ahead.line, 0, 2);
    if (++ahead.line >= ahead.lines) {
      ahead.line = 0;
      ahead.at += ahead.stride;
      --ahead.rows;
    }
  }
}

// c[M x N] (+)= sum over segments of a_s[M x k_s] * b_s[k_s x N]; the b_s lie one below the other in b, or where each
// segment says.
// b must be readable up to the next multiple of 64 bytes in each row; only N columns of c are touched.
template <class A>
struct Gemm {
  int64_t m, n;
  const Segment<A>* segments;
  int64_t segment_count;
  bool transposed;
  const A* b;
  int64_t ldb;
  A* c;
  int64_t ldc;
  bool add;
  Ahead* ahead = nullptr;
  bool far = false;              // b lies far away and ahead is what follows it: both are fetched as they are wanted
  int64_t group = 0, outer = 0;  // rows of a group, and groups of a group of them, where they come in groups
  const Finish<A>* finish = nullptr;  // what becomes of c, which then holds partial sums alone; not where transposed
};

// Winograd's minimal filtering F(2x2, 3x3): a tile of 2x2 outputs of a 3x3 convolution takes 16 products a channel pair
// where the sum of products takes 36. y = A^T [(G w G^T) (B^T x B)] A, with the products summed over channels between
// (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016). These are rows x cols tiles in the
// transformed domain: [16 positions, `plane` apart][tile, `ld` apart][channels].
template <class A>
struct WinogradTiles {
  int64_t rows, cols, channels;
  A* data;
  int64_t plane, ld;
};

template <class A>
struct FloatKernels {
  void (*gemm)(const Gemm<A>&);
  // B^T x B of pixels [2 rows + 2][2 cols + 2][channels]; A dy A^T of pixels [2 rows][2 cols][channels].
  void (*winograd_input)(const WinogradTiles<A>&, const A* x);
  void (*winograd_gradient)(const WinogradTiles<A>&, const A* dy);
  // z[2 rows][2 cols][ld] = A^T m A.
  void (*winograd_output)(const WinogradTiles<A>& m, A* z);
  // u = G w G^T of nine taps (in reverse where flipped) `plane` apart, and w = G^T u G, along rows of channels.
  void (*winograd_weight)(const A* w, int64_t plane, bool flipped, int64_t channels, A* u, int64_t u_plane);
  void (*winograd_weight_gradient)(const A* u, int64_t u_plane, int64_t channels, A* w, int64_t plane);
};

namespace generic {
template <class A>
const FloatKernels<A>& float_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <class A>
const FloatKernels<A>& float_kernels();
}
namespace avx512 {
template <class A>
const FloatKernels<A>& float_kernels();
}
#endif

template <class A>
const FloatKernels<A>& float_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::amx_emulated:
    case Isa::amx:
    case Isa::avx512_bf16:
    case Isa::avx512:
      return avx512::float_kernels<A>();
    case Isa::avx2:
      return avx2::float_kernels<A>();
    default:
      break;
  }
#endif
  return generic::float_kernels<A>();
}

}  // namespace dla_fast::cpu
