// Bodies of the tile kernels (kernels.h), compiled once per instruction set: the includer sets DLA_ISA (a namespace
// name), DLA_VECTOR_BYTES and the target, after every header is in, so that no library code is compiled for it.

namespace dla_fast::cpu::DLA_ISA {
namespace {

#include "gemm_inl.h"

#include "scalars_inl.h"

#include "upsample_inl.h"

#include "winograd_inl.h"

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

template <class T, class A>
void load_transposed(Strided<const T> src, Strided<A> dst, int64_t rows, int64_t cols) {
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

// A per-channel parameter along a row: one value for the whole row, or one per column.
template <class A, bool ROWS>
struct Along {
  const A* p;
  A value;
  Along(const A* base, int64_t row, int64_t col) : p(base + (ROWS ? row : col)), value(*p) {}
  A operator[](int64_t i) const {
    if constexpr (ROWS) {
      return value;
    } else {
      return p[i];
    }
  }
};

template <class T>
inline const T* at(Strided<const T> m, int64_t r, int64_t c) {
  return m.data == nullptr ? nullptr : m.data + r * m.ld + c;
}

// The loops below say simd because the compiler cannot know that outputs and parameters never overlap.
template <class Z, class T, class A, Act ACT, bool ROWS>
void tail_tile(const Shape& shape, const Norm<A>& norm, Strided<const Z> z, Strided<const T> residual, Strided<T> y) {
  A zb[kChunk], rb[kChunk], yb[kChunk];
  for (int64_t r = 0; r < shape.rows; ++r) {
    for (int64_t c = 0; c < shape.cols; c += kChunk) {
      const int64_t n = shape.cols - c < kChunk ? shape.cols - c : kChunk;
      const Along<A, ROWS> center(norm.center, r, c), scale(norm.scale, r, c), shift(norm.shift, r, c);
      const A* zr = read<Z, A>(at(z, r, c), zb, n);
      T* out = y.data + r * y.ld + c;
      A* yr = yb;
      if constexpr (std::is_same_v<T, A>) yr = out;
      if (residual.data != nullptr) {
        const A* rr = read<T, A>(at(residual, r, c), rb, n);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          yr[i] = forward_of<ACT, A>((zr[i] - center[i]) * scale[i] + shift[i] + rr[i], norm.slope);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          yr[i] = forward_of<ACT, A>((zr[i] - center[i]) * scale[i] + shift[i], norm.slope);
        }
      }
      if constexpr (!std::is_same_v<T, A>) narrow_row(yb, out, n);
    }
  }
}

template <class T, class A>
void moments(const Shape& shape, Strided<const T> z, A* mean, A* m2, A* delta) {
  A zb[kChunk];
  const int64_t channels = shape.channels_are_rows ? shape.rows : shape.cols;
  for (int64_t i = 0; i < channels; ++i) mean[i] = m2[i] = delta[i] = A(0);
  const A inverse = A(1) / A(shape.channels_are_rows ? shape.cols : shape.rows);
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      for (int64_t c = 0; c < shape.cols; c += kChunk) {
        const int64_t n = shape.cols - c < kChunk ? shape.cols - c : kChunk;
        const A* zr = read<T, A>(at(z, r, c), zb, n);
        if (shape.channels_are_rows) {
          if (pass == 0) {
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; ++i) sum += zr[i];
            mean[r] += sum;
          } else {
            const A m = mean[r];
            A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
            for (int64_t i = 0; i < n; ++i) {
              const A d = zr[i] - m;
              sum += d;
              squares += d * d;
            }
            delta[r] += sum;
            m2[r] += squares;
          }
        } else if (pass == 0) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) mean[c + i] += zr[i];
        } else {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            const A d = zr[i] - mean[c + i];
            delta[c + i] += d;
            m2[c + i] += d * d;
          }
        }
      }
    }
    if (pass == 0) {
      for (int64_t i = 0; i < channels; ++i) mean[i] *= inverse;
    }
  }
}

template <class T, class A, Act ACT, bool ROWS>
void reduce_tile(const Shape& shape, const Norm<A>& norm, Strided<const T> dy, Strided<const T> z,
                 Strided<const T> residual, double* sum_dy, double* sum_dy_xhat) {
  // Few values are added in A before a partial sum goes on in double.
  constexpr int64_t depth = 16;
  A db[kChunk], zb[kChunk], rb[kChunk] = {}, s0[kChunk], s1[kChunk];
  for (int64_t c = 0; c < shape.cols; c += kChunk) {
    const int64_t n = shape.cols - c < kChunk ? shape.cols - c : kChunk;
    for (int64_t r = 0; r < shape.rows; ++r) {
      const Along<A, ROWS> center(norm.center, r, c), rstd(norm.rstd, r, c), scale(norm.scale, r, c),
          shift(norm.shift, r, c);
      const A* dr = read<T, A>(at(dy, r, c), db, n);
      const A* zr = read<T, A>(at(z, r, c), zb, n);
      const A* rr = residual.data == nullptr ? rb : read<T, A>(at(residual, r, c), rb, n);
      const bool first = ROWS || r % depth == 0;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const A d = zr[i] - center[i];
        const A g = backward_of<ACT, A>(d * scale[i] + shift[i] + rr[i], dr[i], norm.slope);
        const A h = g * (d * rstd[i]);
        s0[i] = first ? g : s0[i] + g;
        s1[i] = first ? h : s1[i] + h;
      }
      if constexpr (ROWS) {
        double t0 = 0, t1 = 0;
#pragma omp simd reduction(+ : t0, t1)
        for (int64_t i = 0; i < n; ++i) {
          t0 += s0[i];
          t1 += s1[i];
        }
        sum_dy[r] += t0;
        sum_dy_xhat[r] += t1;
      } else if (r % depth == depth - 1 || r == shape.rows - 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          sum_dy[c + i] += s0[i];
          sum_dy_xhat[c + i] += s1[i];
        }
      }
    }
  }
}

template <class T, class A, Act ACT, bool ROWS>
void apply_tile(const Shape& shape, const Norm<A>& norm, const A* mean_dy, const A* mean_dy_xhat, Strided<const T> dy,
                Strided<const T> z, Strided<const T> residual, Strided<A> dz, Strided<A> du) {
  A db[kChunk], zb[kChunk], rb[kChunk] = {}, ub[kChunk];
  for (int64_t r = 0; r < shape.rows; ++r) {
    for (int64_t c = 0; c < shape.cols; c += kChunk) {
      const int64_t n = shape.cols - c < kChunk ? shape.cols - c : kChunk;
      const Along<A, ROWS> center(norm.center, r, c), rstd(norm.rstd, r, c), scale(norm.scale, r, c),
          shift(norm.shift, r, c), m0(mean_dy, r, c), m1(mean_dy_xhat, r, c);
      const A* dr = read<T, A>(at(dy, r, c), db, n);
      const A* zr = read<T, A>(at(z, r, c), zb, n);
      const A* rr = residual.data == nullptr ? rb : read<T, A>(at(residual, r, c), rb, n);
      A* out = dz.data + r * dz.ld + c;
      A* ur = du.data == nullptr ? ub : du.data + r * du.ld + c;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const A d = zr[i] - center[i];
        const A g = backward_of<ACT, A>(d * scale[i] + shift[i] + rr[i], dr[i], norm.slope);
        ur[i] = g;
        out[i] = scale[i] * (g - m0[i] - (d * rstd[i]) * m1[i]);
      }
    }
  }
}

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

template <class Z, class T, class A>
struct Tail {
  template <Act ACT, bool ROWS>
  static void run(const Shape& s, const Norm<A>& n, Strided<const Z> z, Strided<const T> r, Strided<T> y) {
    tail_tile<Z, T, A, ACT, ROWS>(s, n, z, r, y);
  }
  static void call(const Shape& shape, const Norm<A>& norm, Strided<const Z> z, Strided<const T> residual,
                   Strided<T> y) {
    DLA_DISPATCH_TILE(run, (shape, norm, z, residual, y))
  }
};

template <class T, class A>
struct Reduce {
  template <Act ACT, bool ROWS>
  static void run(const Shape& s, const Norm<A>& n, Strided<const T> dy, Strided<const T> z, Strided<const T> r,
                  double* s0, double* s1) {
    reduce_tile<T, A, ACT, ROWS>(s, n, dy, z, r, s0, s1);
  }
  static void call(const Shape& shape, const Norm<A>& norm, Strided<const T> dy, Strided<const T> z,
                   Strided<const T> residual, double* sum_dy, double* sum_dy_xhat) {
    DLA_DISPATCH_TILE(run, (shape, norm, dy, z, residual, sum_dy, sum_dy_xhat))
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
  static const Kernels<T> table = {&gemm<A>,
                                   &load<T, A>,
                                   &load_transposed<T, A>,
                                   &store<T, A>,
                                   &Tail<T, T, A>::call,
                                   &Tail<A, T, A>::call,
                                   &moments<T, A>,
                                   &Reduce<T, A>::call,
                                   &Apply<T, A>::call,
                                   &up_row<A>,
                                   &up_row_plane<A>,
                                   &up_row_backward<A>,
                                   &up_row_plane_backward<A>,
                                   &winograd_input<A>,
                                   &winograd_gradient<A>,
                                   &winograd_output<A>,
                                   &winograd_weight<A>,
                                   &winograd_weight_gradient<A>};
  return table;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<c10::BFloat16>& kernels<c10::BFloat16>();
template const Kernels<c10::Half>& kernels<c10::Half>();

}  // namespace dla_fast::cpu::DLA_ISA
