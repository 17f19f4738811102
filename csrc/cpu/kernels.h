// The tile kernels of the CPU backend, without torch: what they compute and how a call picks an instruction set.
//
// A tile is a small matrix held in cache: rows are pixels and columns channels for channels_last tensors, rows are
// channels and columns pixels for contiguous ones. T is the storage type, acc_t<T> the type everything is computed in.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace dla_fast::cpu {

// Values of a row that the passes over every value take at once.
constexpr int64_t kChunk = 256;

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Act : int { identity, relu, silu, leaky_relu, hardswish };

// Width of a packed panel of the right-hand matrix, in elements: a multiple of every vector length there is.
constexpr int64_t kPanel = 64;

template <class T>
struct Strided {
  T* data;
  int64_t ld;
};

// One input of a sum of products: M x k values read through lda (element (i, p) at a[i * lda + p], or at
// a[p * lda + i] when the left-hand side is transposed). Its right-hand side is b, or where that is null lies below
// that of the segment before.
template <class A>
struct Segment {
  const A* a;
  int64_t lda;
  int64_t k;
  const A* b = nullptr;
};

// Memory that is wanted soon: rows of so many cache lines, `stride` bytes apart. A product fetches it in passing and
// moves this on.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, rows = 0, lines = 0, line = 0;

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
};

// u = (z - center) * scale + shift + residual, x_hat = (z - center) * rstd, y = act(u).
template <class A>
struct Norm {
  const A* center;
  const A* rstd;
  const A* scale;
  const A* shift;
  Act act;
  A slope;
};

struct Shape {
  int64_t rows, cols;
  bool channels_are_rows;
};

// One row of a depthwise transposed convolution with kernel 2f, stride f, padding f / 2. Output row o takes two
// low-resolution rows, near = (o + f / 2) / f and far = near - 1 (null where there is none), with the kernel's rows
// (o + f / 2) % f and that plus f. channels_last: rows [width][channels], kernel rows [2f][channels]. Else one channel:
// rows [width], kernel rows [2f].
template <class A>
struct UpRow {
  const A *near, *far, *weight_near, *weight_far;
  const A* skip;  // a row to add, or null
  A* out;
  int64_t width, channels, factor;
  int64_t begin, end;  // output columns; `out` and `skip` point at the first
  A* scratch;          // up_row: zeros, `channels` of them; up_row_plane: plane_scratch(width, factor)
};

// Kernels that walk a plane take whole vectors, this much past its width at most.
constexpr int64_t kPlaneSlack = 64;
inline int64_t plane_scratch(int64_t width, int64_t factor) {
  return (factor + 2) * (width + 2 + kPlaneSlack) + 4 * factor * factor * 16;
}

// What one low-resolution row gives and takes in the backward of that: dx of the row, and its part of dw, from the 2f
// rows of dy it went into (null outside the map).
template <class A>
struct UpRowBackward {
  const A* const* dy;
  const A* x;
  const A* weight;  // [2f][2f][channels], or [2f][2f] of one channel
  A* dx;            // null where it is not needed, like dw
  double* dw;       // like weight; added to
  int64_t width, out_width, channels, factor;
  // Zeros before the first row of a slice; up_row_backward: like dw; up_row_plane_backward: plane_scratch(width,
  // factor).
  A* scratch;
  // channels_last: the rows of dy that the next row of x needs, to be fetched in passing, or null.
  const char* ahead = nullptr;
  // Whether the sums that were kept in scratch go to dw now.
  bool flush = true;
};

// Whole rows of one channel for the factors 2, 4 and 8: output rows [begin f - f / 2, end f - f / 2), as far as the map
// has them. Rows are `width` apart, those of the output f times as much: a multiple of kPlaneMargin, with zeros behind
// the last value.
template <class A>
struct UpPlane {
  const A* x;       // row begin, behind the one before it
  const A* weight;  // [2f][2f]
  const A* skip;    // laid out like out, or null
  A* out;           // from the first of those rows that the map has
  int64_t height, width, factor;
  int64_t begin, end;  // of [0, height]
  const A* zeros;      // `width` of them
};

// Its backward for low-resolution rows [begin, end).
template <class A>
struct UpPlaneBackward {
  const A* dy;  // from row begin f - f / 2 on, or from the first
  const A *x, *weight;
  A* dx;       // null where it is not needed, like dw
  double* dw;  // [2f][2f], added to
  int64_t height, width, factor;
  int64_t begin, end;  // x and dx point at the first
  A* scratch;          // plane_backward_scratch(width, factor, end - begin), zeros before the first call
};

constexpr int64_t kPlaneMargin = 16;  // a whole vector of any instruction set
inline int64_t plane_backward_scratch(int64_t width, int64_t factor, int64_t rows) {
  return (rows + 1) * factor * factor * (width + kPlaneMargin) + 2 * kPlaneMargin;
}

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

template <class T>
struct Kernels {
  using A = acc_t<T>;

  void (*gemm)(const Gemm<A>&);
  // dst (rows x cols, or cols x rows when transposing) in A from src (rows x cols) in T.
  void (*load)(Strided<const T> src, Strided<A> dst, int64_t rows, int64_t cols);
  void (*load_transposed)(Strided<const T> src, Strided<A> dst, int64_t rows, int64_t cols);
  void (*store)(Strided<const A> src, Strided<T> dst, int64_t rows, int64_t cols);
  // y = act(u); z in T, or still in A. residual.data may be null.
  void (*tail)(const Shape&, const Norm<A>&, Strided<const T> z, Strided<const T> residual, Strided<T> y);
  void (*tail_accumulated)(const Shape&, const Norm<A>&, Strided<const A> z, Strided<const T> residual, Strided<T> y);
  // Per channel of the tile: a value near its mean, and the sums of (z - value)^2 and of z - value.
  void (*moments)(const Shape&, Strided<const T> z, A* mean, A* m2, A* delta);
  // Adds to, per channel: the sum of dy' = dy * act'(u), and of dy' * x_hat.
  void (*reduce)(const Shape&, const Norm<A>&, Strided<const T> dy, Strided<const T> z, Strided<const T> residual,
                 double* sum_dy, double* sum_dy_xhat);
  // dz = scale * (dy' - mean_dy - x_hat * mean_dy_xhat); du = dy' where its data is not null.
  void (*apply)(const Shape&, const Norm<A>&, const A* mean_dy, const A* mean_dy_xhat, Strided<const T> dy,
                Strided<const T> z, Strided<const T> residual, Strided<A> dz, Strided<A> du);
  void (*up_row)(const UpRow<A>&);
  void (*up_row_plane)(const UpRow<A>&);
  void (*up_row_backward)(const UpRowBackward<A>&);
  void (*up_row_plane_backward)(const UpRowBackward<A>&);
  void (*up_plane)(const UpPlane<A>&);
  void (*up_plane_backward)(const UpPlaneBackward<A>&);
  // B^T x B of pixels [2 rows + 2][2 cols + 2][channels]; A dy A^T of pixels [2 rows][2 cols][channels].
  void (*winograd_input)(const WinogradTiles<A>&, const A* x);
  void (*winograd_gradient)(const WinogradTiles<A>&, const A* dy);
  // z[2 rows][2 cols][ld] = A^T m A.
  void (*winograd_output)(const WinogradTiles<A>& m, A* z);
  // u = G w G^T of nine taps (in reverse where flipped) `plane` apart, and w = G^T u G, along rows of channels.
  void (*winograd_weight)(const A* w, int64_t plane, bool flipped, int64_t channels, A* u, int64_t u_plane);
  void (*winograd_weight_gradient)(const A* u, int64_t u_plane, int64_t channels, A* w, int64_t plane);
};

// Those after avx512 add products of bfloat16 (bf16_gemm.h); all else of them is avx512's.
enum class Isa : int { generic, avx2, avx512, avx512_bf16, amx };

// The best instruction set of this machine, or the lesser one that DLA_FAST_CPU_ISA names.
Isa current_isa();
const char* isa_name(Isa isa);

namespace generic {
template <class T>
const Kernels<T>& kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T>
const Kernels<T>& kernels();
}
namespace avx512 {
template <class T>
const Kernels<T>& kernels();
}
#endif

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::amx:
    case Isa::avx512_bf16:
    case Isa::avx512:
      return avx512::kernels<T>();
    case Isa::avx2:
      return avx2::kernels<T>();
    default:
      break;
  }
#endif
  return generic::kernels<T>();
}

}  // namespace dla_fast::cpu
