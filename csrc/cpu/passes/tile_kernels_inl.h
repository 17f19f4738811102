// Bodies of the tile kernels (kernels.h), compiled once per instruction set: the includer sets DLA_ISA (a namespace
// name), DLA_VECTOR_BYTES and the target, after every header is in, so that no library code is compiled for it.

namespace dla_fast::cpu::DLA_ISA {
namespace {

#include "../shared/vectors_inl.h"

#include "scalars_inl.h"

#include "upsample_inl.h"

#include "upsample_plane_inl.h"

template <class T, class A>
void load(Strided<const T> src, Strided<A> dst, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* s = src.data + r * src.ld;
    A* d = dst.data + r * dst.ld;
    if constexpr (std::is_same_v<T, A>) {
      for (int64_t c = 0; c < cols; ++c) d[c] = s[c];
    } else {
      widen_row(s, d, cols);
    }
  }
}

#if DLA_VECTOR_BYTES >= 32
// Eight rows of eight floats, transposed in registers.
inline void transpose8(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * ld_src);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * ld_dst, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

#if DLA_VECTOR_BYTES == 64
#include "../shared/avx512_transpose_inl.h"

// Blocks of sixteen rows of sixteen floats: half the shuffles of eight, and whole cache lines.
inline void transpose_blocks16(Strided<const float> src, Strided<float> dst, int64_t rows, int64_t cols) {
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    for (int64_t c0 = 0; c0 < cols; c0 += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(src.data + (r0 + i) * src.ld + c0);
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(dst.data + (c0 + i) * dst.ld + r0, r[i]);
    }
  }
}
#endif

template <class T, class A>
void transpose_blocks(Strided<const T> src, Strided<A> dst, int64_t rows, int64_t cols) {
  constexpr int64_t block = 8;
  A wide[block * block];
  for (int64_t r0 = 0; r0 < rows; r0 += block) {
    const int64_t nr = rows - r0 < block ? rows - r0 : block;
    for (int64_t c0 = 0; c0 < cols; c0 += block) {
      const int64_t nc = cols - c0 < block ? cols - c0 : block;
      const A* from = nullptr;
      int64_t ld = block;
      if constexpr (std::is_same_v<T, A>) {
        from = src.data + r0 * src.ld + c0;
        ld = src.ld;
      } else {
        for (int64_t r = 0; r < nr; ++r) widen_row(src.data + (r0 + r) * src.ld + c0, wide + r * block, nc);
        from = wide;
      }
      A* to = dst.data + c0 * dst.ld + r0;
#if DLA_VECTOR_BYTES >= 32
      if constexpr (std::is_same_v<A, float>) {
        if (nr == block && nc == block) {
          transpose8(from, ld, to, dst.ld);
          continue;
        }
      }
#endif
      for (int64_t c = 0; c < nc; ++c) {
        for (int64_t r = 0; r < nr; ++r) to[c * dst.ld + r] = from[r * ld + c];
      }
    }
  }
}

template <class T, class A>
void load_transposed(Strided<const T> src, Strided<A> dst, int64_t rows, int64_t cols) {
  int64_t whole_rows = 0, whole_cols = 0;
#if DLA_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    whole_rows = rows / 16 * 16;
    whole_cols = cols / 16 * 16;
    transpose_blocks16(src, dst, whole_rows, whole_cols);
  }
#endif
  // What is left: to the right, and below.
  transpose_blocks<T, A>({src.data + whole_cols, src.ld}, {dst.data + whole_cols * dst.ld, dst.ld}, whole_rows,
                         cols - whole_cols);
  transpose_blocks<T, A>({src.data + whole_rows * src.ld, src.ld}, {dst.data + whole_rows, dst.ld}, rows - whole_rows,
                         cols);
}

template <class T, class A>
void store(Strided<const A> src, Strided<T> dst, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* s = src.data + r * src.ld;
    T* d = dst.data + r * dst.ld;
    if constexpr (std::is_same_v<T, A>) {
      for (int64_t c = 0; c < cols; ++c) d[c] = s[c];
    } else {
      narrow_row(s, d, cols);
    }
  }
}

#include "norm_inl.h"

// Calls F<ACT, ROWS>::run for the activation and layout of a call.
#define DLA_DISPATCH_TILE(FUNCTION, ...)                                                                               \
  switch (norm.act) {                                                                                                  \
    case Act::identity:                                                                                                \
      return shape.channels_are_rows ? FUNCTION<Act::identity, true>                                                   \
                                           __VA_ARGS__ : FUNCTION<Act::identity, false> __VA_ARGS__;                   \
    case Act::relu:                                                                                                    \
      return shape.channels_are_rows ? FUNCTION<Act::relu, true> __VA_ARGS__ : FUNCTION<Act::relu, false> __VA_ARGS__; \
    case Act::silu:                                                                                                    \
      return shape.channels_are_rows ? FUNCTION<Act::silu, true> __VA_ARGS__ : FUNCTION<Act::silu, false> __VA_ARGS__; \
    case Act::leaky_relu:                                                                                              \
      return shape.channels_are_rows ? FUNCTION<Act::leaky_relu, true>                                                 \
                                           __VA_ARGS__ : FUNCTION<Act::leaky_relu, false> __VA_ARGS__;                 \
    case Act::hardswish:                                                                                               \
      return shape.channels_are_rows ? FUNCTION<Act::hardswish, true>                                                  \
                                           __VA_ARGS__ : FUNCTION<Act::hardswish, false> __VA_ARGS__;                  \
  }

template <class Z, class T, class Y, class A>
struct Tail {
  template <Act ACT, bool ROWS>
  static void run(const Shape& s, const Norm<A>& n, Strided<const Z> z, Strided<const T> r, Strided<Y> y) {
    tail_tile<Z, T, Y, A, ACT, ROWS>(s, n, z, r, y);
  }
  static void call(const Shape& shape, const Norm<A>& norm, Strided<const Z> z, Strided<const T> residual,
                   Strided<Y> y) {
    DLA_DISPATCH_TILE(run, (shape, norm, z, residual, y))
  }
};

template <class D, class T, class A>
struct Reduce {
  template <Act ACT, bool ROWS>
  static void run(const Shape& s, const Norm<A>& n, Strided<const D> dy, Strided<const T> z, Strided<const T> r,
                  Strided<T> du, double* s0, double* s1) {
    reduce_tile<D, T, A, ACT, ROWS>(s, n, dy, z, r, du, s0, s1);
  }
  static void call(const Shape& shape, const Norm<A>& norm, Strided<const D> dy, Strided<const T> z,
                   Strided<const T> residual, Strided<T> du, double* sum_dy, double* sum_dy_xhat) {
    DLA_DISPATCH_TILE(run, (shape, norm, dy, z, residual, du, sum_dy, sum_dy_xhat))
  }
};

template <class T, class A>
struct Apply {
  template <Act ACT, bool ROWS>
  static void run(const Shape& s, const Norm<A>& n, const A* m0, const A* m1, Strided<const T> dy, Strided<const T> z,
                  Strided<const T> r, Strided<A> dz, Strided<A> du) {
    apply_tile<T, A, ACT, ROWS>(s, n, m0, m1, dy, z, r, dz, du);
  }
  static void call(const Shape& shape, const Norm<A>& norm, const A* mean_dy, const A* mean_dy_xhat,
                   Strided<const T> dy, Strided<const T> z, Strided<const T> residual, Strided<A> dz, Strided<A> du) {
    DLA_DISPATCH_TILE(run, (shape, norm, mean_dy, mean_dy_xhat, dy, z, residual, dz, du))
  }
};

#undef DLA_DISPATCH_TILE

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  using A = acc_t<T>;
  static const Kernels<T> table = {&load<T, A>,
                                   &load_transposed<T, A>,
                                   &store<T, A>,
                                   &Tail<T, T, T, A>::call,
                                   &Tail<A, T, T, A>::call,
                                   &Tail<T, T, A, A>::call,
                                   &finite<A>,
                                   &moments<T, A>,
                                   &Reduce<T, T, A>::call,
                                   &Reduce<A, T, A>::call,
                                   &Apply<T, A>::call,
                                   &up_row<A>,
                                   &up_row_plane<A>,
                                   &up_row_backward<A>,
                                   &up_row_plane_backward<A>,
                                   &up_plane<A>,
                                   &up_plane_backward<A>};
  return table;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<c10::BFloat16>& kernels<c10::BFloat16>();
template const Kernels<c10::Half>& kernels<c10::Half>();

}  // namespace dla_fast::cpu::DLA_ISA
