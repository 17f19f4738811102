// The tile kernels of the passes, without torch: what they compute and how a call picks an instruction set. Those of
// the products are in products/float_gemm.h.
//
// A tile is a small matrix held in cache: rows are pixels and columns channels for channels_last tensors, rows are
// channels and columns pixels for contiguous ones. T is the storage type, acc_t<T> the type everything is computed in.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "isa.h"

namespace dla_fast::cpu {

// Values of a row that the passes over every value take at once.
constexpr int64_t kChunk = 256;

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Act : int { identity, relu, silu, leaky_relu, hardswish };

template <class T>
struct Strided {
  T* data;
  int64_t ld;
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

template <class T>
struct Kernels {
  using A = acc_t<T>;

  // dst (rows x cols, or cols x rows when transposing) in A from src (rows x cols) in T.
  void (*load)(Strided<const T> src, Strided<A> dst, int64_t rows, int64_t cols);
  void (*load_transposed)(Strided<const T> src, Strided<A> dst, int64_t rows, int64_t cols);
  void (*store)(Strided<const A> src, Strided<T> dst, int64_t rows, int64_t cols);
  // y = act(u); z in T, or still in A. residual.data may be null.
  void (*tail)(const Shape&, const Norm<A>&, Strided<const T> z, Strided<const T> residual, Strided<T> y);
  void (*tail_accumulated)(const Shape&, const Norm<A>&, Strided<const A> z, Strided<const T> residual, Strided<T> y);
  // The same into A, for who multiplies it.
  void (*form)(const Shape&, const Norm<A>&, Strided<const T> z, Strided<const T> residual, Strided<A> y);
  // Whether all values are finite.
  bool (*finite)(Strided<const A> values, int64_t rows, int64_t cols);
  // Per channel of the tile: a finite value near its mean, and the sums of (z - value)^2 and of z - value.
  void (*moments)(const Shape&, Strided<const T> z, A* mean, A* m2, A* delta);
  // Adds to, per channel: the sum of dy' = dy * act'(u), and of dy' * x_hat. dy' goes to du where its data is not null,
  // which may be dy itself. dy in T, or still in A.
  void (*reduce)(const Shape&, const Norm<A>&, Strided<const T> dy, Strided<const T> z, Strided<const T> residual,
                 Strided<T> du, double* sum_dy, double* sum_dy_xhat);
  void (*reduce_accumulated)(const Shape&, const Norm<A>&, Strided<const A> dy, Strided<const T> z,
                             Strided<const T> residual, Strided<T> du, double* sum_dy, double* sum_dy_xhat);
  // dz = scale * (dy' - mean_dy - x_hat * mean_dy_xhat), or scale * dy' where both are null; du = dy' where its data is
  // not null.
  void (*apply)(const Shape&, const Norm<A>&, const A* mean_dy, const A* mean_dy_xhat, Strided<const T> dy,
                Strided<const T> z, Strided<const T> residual, Strided<A> dz, Strided<A> du);
  void (*up_row)(const UpRow<A>&);
  void (*up_row_plane)(const UpRow<A>&);
  void (*up_row_backward)(const UpRowBackward<A>&);
  void (*up_row_plane_backward)(const UpRowBackward<A>&);
  void (*up_plane)(const UpPlane<A>&);
  void (*up_plane_backward)(const UpPlaneBackward<A>&);
};

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
    case Isa::amx_emulated:
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
