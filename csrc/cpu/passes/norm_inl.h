// The passes of the normalisation over one tile. Included by tile_kernels_inl.h, inside a namespace and under one
// instruction set. Sums are kept on the stack and written once: other threads write beside them.

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

// The loops below say simd because the compiler cannot know that outputs and parameters never overlap. n: how many
// values, or as a constant, so that a narrow row is no loop at all.
template <class Z, class T, class Y, class A, Act ACT, bool ROWS, class N>
inline __attribute__((always_inline)) void tail_row(const Norm<A>& norm, int64_t r, int64_t c, N n, Strided<const Z> z,
                                                    Strided<const T> residual, Strided<Y> y) {
  A zb[kChunk], rb[kChunk], yb[kChunk];
  const Along<A, ROWS> center(norm.center, r, c), scale(norm.scale, r, c), shift(norm.shift, r, c);
  const A* zr = read<Z, A>(at(z, r, c), zb, n);
  Y* out = y.data + r * y.ld + c;
  A* yr = yb;
  if constexpr (std::is_same_v<Y, A>) yr = out;
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
  if constexpr (!std::is_same_v<Y, A>) narrow_row(yb, out, n);
}

template <class Z, class T, class Y, class A, Act ACT, bool ROWS>
void tail_tile(const Shape& shape, const Norm<A>& norm, Strided<const Z> z, Strided<const T> residual, Strided<Y> y) {
  const auto rows = [&](auto n) {
    for (int64_t r = 0; r < shape.rows; ++r) tail_row<Z, T, Y, A, ACT, ROWS>(norm, r, 0, n, z, residual, y);
  };
  if constexpr (!ROWS && std::is_same_v<Z, float> && std::is_same_v<T, float>) {
    if (shape.cols == 64) return rows(std::integral_constant<int64_t, 64>());
    if (shape.cols == 32) return rows(std::integral_constant<int64_t, 32>());
    if (shape.cols == 16) return rows(std::integral_constant<int64_t, 16>());
  }
  for (int64_t r = 0; r < shape.rows; ++r) {
    for (int64_t c = 0; c < shape.cols; c += kChunk) {
      const int64_t n = shape.cols - c < kChunk ? shape.cols - c : kChunk;
      tail_row<Z, T, Y, A, ACT, ROWS>(norm, r, c, n, z, residual, y);
    }
  }
}

// Rows of a tile taken together, where columns are channels: parameters and sums are then loaded once for all of them.
constexpr int kTogether = 4;

// Calls f(r, std::integral_constant<int, R>) for R rows from r on.
template <class F>
inline void rows_together(int64_t begin, int64_t end, const F& f) {
  int64_t r = begin;
  for (; r + kTogether <= end; r += kTogether) f(r, std::integral_constant<int, kTogether>());
  for (; r < end; ++r) f(r, std::integral_constant<int, 1>());
}

// R rows as A. Not inlined: the passes convert in dozens of places, and a copy of the loop in each took a third of
// their compile time and of their code.
template <int R, class T, class A>
__attribute__((noinline)) void widen_rows(const T* from, int64_t ld, int64_t n, A (*to)[kChunk]) {
  for (int j = 0; j < R; ++j) widen_row(from + j * ld, to[j], n);
}

// Chunk [c, c + n) of R rows as A: in place or in buffer. All of them are its first row where there is no matrix.
template <class A, int R>
struct Rows {
  const A* p[R];

  template <class T>
  Rows(Strided<const T> m, int64_t r, int64_t c, int64_t n, A (*buffer)[kChunk]) {
    if constexpr (std::is_same_v<T, A>) {
      for (int j = 0; j < R; ++j) p[j] = m.data == nullptr ? buffer[0] : at(m, r + j, c);
    } else {
      if (m.data != nullptr) widen_rows<R>(at(m, r, c), m.ld, n, buffer);
      for (int j = 0; j < R; ++j) p[j] = buffer[m.data == nullptr ? 0 : j];
    }
  }
  A operator()(int j, int64_t i) const { return p[j][i]; }
};

template <class A>
inline A lane_sum(typename VectorOf<A>::type v) {
  A sum = 0;
  for (int i = 0; i < VectorOf<A>::lanes; ++i) sum += v[i];
  return sum;
}

// The same in double, and by halves: rows are short, and a chain of all lanes would take as long as a row.
template <class A>
inline double double_sum(typename VectorOf<A>::type v) {
  constexpr int lanes = VectorOf<A>::lanes;
  double sum[lanes];
  for (int i = 0; i < lanes; ++i) sum[i] = v[i];
#pragma GCC unroll 4
  for (int half = lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

// Over a row: the sum of f(value), of one value or a vector of them. Four chains, and for each chunk a new one.
template <int SUMS, class T, class A, class F>
inline void sum_row(Strided<const T> z, int64_t row, int64_t cols, A (&out)[SUMS], const F& f) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  constexpr int chains = 4;
  A zb[kChunk];
  V total[SUMS] = {};
  for (int64_t c = 0; c < cols; c += kChunk) {
    const int64_t n = cols - c < kChunk ? cols - c : kChunk;
    const A* zr = read<T, A>(at(z, row, c), zb, n);
    V chunk[chains][SUMS] = {};
    int64_t i = 0;
    for (; i + chains * lanes <= n; i += chains * lanes) {
#pragma GCC unroll 4
      for (int j = 0; j < chains; ++j) f(load_lanes(zr + i + j * lanes, lanes), chunk[j]);
    }
    for (; i + lanes <= n; i += lanes) f(load_lanes(zr + i, lanes), chunk[0]);
    for (; i < n; ++i) f(zr[i], out);
    for (int s = 0; s < SUMS; ++s) total[s] += (chunk[0][s] + chunk[1][s]) + (chunk[2][s] + chunk[3][s]);
  }
  for (int s = 0; s < SUMS; ++s) out[s] += lane_sum<A>(total[s]);
}

// The mean of a part of the tile, an eighth or so, is what the sums are taken about: then one pass over the rest does.
// It lies within sqrt(7) standard deviations of the tile's mean whatever the values are, since the part has its share
// in them, so that taking n (part's mean - mean)^2 off the squares amplifies rounding eight times at most.
inline int64_t part_of(int64_t values) {
  const int64_t part = (values + 7) / 8;
  return values < 16 ? values : (part < 16 ? 16 : part);
}

// Of a value that is not finite the difference is NaN, and so is the sum.
template <class A>
bool finite(Strided<const A> values, int64_t rows, int64_t cols) {
  A sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const A* const row = values.data + r * values.ld;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < cols; ++i) sum += row[i] - row[i];
  }
  return sum == A(0);
}

// What sums are taken about has to be finite: what an infinity adds up to is infinite, less itself it is NaN.
template <class A>
inline A finite_or_zero(A v) {
  return v - v == A(0) ? v : A(0);
}

template <class T, class A>
void moments(const Shape& shape, Strided<const T> z, A* mean, A* m2, A* delta) {
  const int64_t part = part_of(shape.channels_are_rows ? shape.cols : shape.rows);
  if (shape.channels_are_rows) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      A sum[1] = {}, sums[2] = {};
      sum_row<1>(z, r, part, sum, [](auto v, auto& to) { to[0] += v; });
      const A m = finite_or_zero(sum[0] / A(part));
      sum_row<2>(z, r, shape.cols, sums, [m](auto v, auto& to) {
        const auto d = v - m;
        to[0] += d;
        to[1] += d * d;
      });
      mean[r] = m;
      delta[r] = sums[0];
      m2[r] = sums[1];
    }
    return;
  }
  const A inverse = A(1) / A(part);
  A zb[kTogether][kChunk];
  for (int64_t c = 0; c < shape.cols; c += kChunk) {
    const int64_t n = shape.cols - c < kChunk ? shape.cols - c : kChunk;
    A sum[kChunk] = {}, rest[kChunk] = {}, squares[kChunk] = {};
    rows_together(0, part, [&](int64_t r, auto count) {
      constexpr int R = decltype(count)::value;
      const Rows<A, R> zr(z, r, c, n, zb);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        A s = zr(0, i);
#pragma GCC unroll 4
        for (int j = 1; j < R; ++j) s += zr(j, i);
        sum[i] += s;
      }
    });
    for (int64_t i = 0; i < n; ++i) sum[i] = finite_or_zero(sum[i] * inverse);
    rows_together(0, shape.rows, [&](int64_t r, auto count) {
      constexpr int R = decltype(count)::value;
      const Rows<A, R> zr(z, r, c, n, zb);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        A s = 0, q = 0;
#pragma GCC unroll 4
        for (int j = 0; j < R; ++j) {
          const A d = zr(j, i) - sum[i];
          s += d;
          q += d * d;
        }
        rest[i] += s;
        squares[i] += q;
      }
    });
    for (int64_t i = 0; i < n; ++i) mean[c + i] = sum[i];
    for (int64_t i = 0; i < n; ++i) delta[c + i] = rest[i];
    for (int64_t i = 0; i < n; ++i) m2[c + i] = squares[i];
  }
}

// Few values are added in A before a partial sum goes on in double; x_hat is (z - center) * rstd, and its rstd waits
// until then. D: what dy is in. WRITE: dy' goes to du.
template <class D, class T, class A, Act ACT, bool WRITE>
void reduce_rows(const Shape& shape, const Norm<A>& norm, Strided<const D> dy, Strided<const T> z,
                 Strided<const T> residual, Strided<T> du, double* sum_dy, double* sum_dy_xhat) {
  constexpr int64_t depth = 16 * VectorOf<A>::lanes < kChunk ? 16 * VectorOf<A>::lanes : kChunk;
  A db[kChunk], zb[kChunk], rb[kChunk] = {}, gb[kChunk];
  for (int64_t r = 0; r < shape.rows; ++r) {
    const A center = norm.center[r], scale = norm.scale[r], shift = norm.shift[r];
    double t0 = 0, t1 = 0;
    for (int64_t c = 0; c < shape.cols; c += depth) {
      const int64_t n = shape.cols - c < depth ? shape.cols - c : depth;
      const A* dr = read<D, A>(at(dy, r, c), db, n);
      const A* zr = read<T, A>(at(z, r, c), zb, n);
      const A* rr = residual.data == nullptr ? rb : read<T, A>(at(residual, r, c), rb, n);
      A* gr = gb;
      if constexpr (WRITE && std::is_same_v<T, A>) gr = du.data + r * du.ld + c;
      // A vector's lanes by hand: as many chains of additions whether or not a compiler makes vectors of the loop.
      constexpr int64_t lanes = VectorOf<A>::lanes;
      typename VectorOf<A>::type s0 = {}, s1 = {};
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) {
        A g[lanes], h[lanes];
#pragma omp simd
        for (int64_t j = 0; j < lanes; ++j) {
          const A d = zr[i + j] - center;
          g[j] = backward_of<ACT, A>(d * scale + shift + rr[i + j], dr[i + j], norm.slope);
          h[j] = g[j] * d;
        }
        if constexpr (WRITE) store_lanes<A>(gr + i, load_lanes(g, lanes), lanes);
        s0 += load_lanes(g, lanes);
        s1 += load_lanes(h, lanes);
      }
      for (; i < n; ++i) {
        const A d = zr[i] - center;
        const A g = backward_of<ACT, A>(d * scale + shift + rr[i], dr[i], norm.slope);
        if constexpr (WRITE) gr[i] = g;
        t0 += g;
        t1 += g * d;
      }
      if constexpr (WRITE && !std::is_same_v<T, A>) narrow_row(gb, du.data + r * du.ld + c, n);
      t0 += double_sum<A>(s0);
      t1 += double_sum<A>(s1);
    }
    sum_dy[r] += t0;
    sum_dy_xhat[r] += t1 * norm.rstd[r];
  }
}

template <class D, class T, class A, Act ACT, bool WRITE>
void reduce_columns(const Shape& shape, const Norm<A>& norm, Strided<const D> dy, Strided<const T> z,
                    Strided<const T> residual, Strided<T> du, double* sum_dy, double* sum_dy_xhat) {
  constexpr int64_t depth = 16;
  A db[kTogether][kChunk], zb[kTogether][kChunk], rb[kTogether][kChunk], gb[kTogether][kChunk];
  const int64_t most = shape.cols < kChunk ? shape.cols : kChunk;
  for (int64_t i = 0; i < most; ++i) rb[0][i] = A(0);
  for (int64_t c = 0; c < shape.cols; c += kChunk) {
    const int64_t n = shape.cols - c < kChunk ? shape.cols - c : kChunk;
    const A *center = norm.center + c, *scale = norm.scale + c, *shift = norm.shift + c;
    double t0[kChunk], t1[kChunk];
    for (int64_t i = 0; i < n; ++i) t0[i] = t1[i] = 0;
    for (int64_t r0 = 0; r0 < shape.rows; r0 += depth) {
      A s0[kChunk], s1[kChunk];
      for (int64_t i = 0; i < n; ++i) s0[i] = s1[i] = A(0);
      rows_together(r0, r0 + depth < shape.rows ? r0 + depth : shape.rows, [&](int64_t r, auto count) {
        constexpr int R = decltype(count)::value;
        const Rows<A, R> dr(dy, r, c, n, db), zr(z, r, c, n, zb), rr(residual, r, c, n, rb);
        A* gr[R];
        for (int j = 0; j < R; ++j) {
          gr[j] = gb[j];
          if constexpr (WRITE && std::is_same_v<T, A>) gr[j] = du.data + (r + j) * du.ld + c;
        }
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          A a = 0, b = 0;
#pragma GCC unroll 4
          for (int j = 0; j < R; ++j) {
            const A d = zr(j, i) - center[i];
            const A g = backward_of<ACT, A>(d * scale[i] + shift[i] + rr(j, i), dr(j, i), norm.slope);
            if constexpr (WRITE) gr[j][i] = g;
            a += g;
            b += g * d;
          }
          s0[i] += a;
          s1[i] += b;
        }
        if constexpr (WRITE && !std::is_same_v<T, A>) {
          for (int j = 0; j < R; ++j) narrow_row(gb[j], du.data + (r + j) * du.ld + c, n);
        }
      });
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        t0[i] += s0[i];
        t1[i] += s1[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      sum_dy[c + i] += t0[i];
      sum_dy_xhat[c + i] += t1[i] * norm.rstd[c + i];
    }
  }
}

template <class D, class T, class A, Act ACT, bool ROWS>
void reduce_tile(const Shape& shape, const Norm<A>& norm, Strided<const D> dy, Strided<const T> z,
                 Strided<const T> residual, Strided<T> du, double* sum_dy, double* sum_dy_xhat) {
  const auto run = [&](auto write) {
    constexpr bool WRITE = decltype(write)::value;
    if constexpr (ROWS) {
      reduce_rows<D, T, A, ACT, WRITE>(shape, norm, dy, z, residual, du, sum_dy, sum_dy_xhat);
    } else {
      reduce_columns<D, T, A, ACT, WRITE>(shape, norm, dy, z, residual, du, sum_dy, sum_dy_xhat);
    }
  };
  du.data == nullptr ? run(std::false_type()) : run(std::true_type());
}

// dz = scale * dy' + slope * (z - center) + offset, with what does not depend on the pixel in two vectors; scale * dy'
// where statistics are frozen.
template <class T, class A, Act ACT, bool ROWS>
void apply_tile(const Shape& shape, const Norm<A>& norm, const A* mean_dy, const A* mean_dy_xhat, Strided<const T> dy,
                Strided<const T> z, Strided<const T> residual, Strided<A> dz, Strided<A> du) {
  A db[kTogether][kChunk], zb[kTogether][kChunk], rb[kTogether][kChunk], slope[kChunk], offset[kChunk];
  for (A& v : rb[0]) v = A(0);
  for (int64_t c = 0; c < shape.cols; c += kChunk) {
    const int64_t n = shape.cols - c < kChunk ? shape.cols - c : kChunk;
    const auto prepare = [&](int64_t from, int64_t count) {
      if (mean_dy == nullptr) return;
      for (int64_t i = 0; i < count; ++i) {
        offset[i] = -norm.scale[from + i] * mean_dy[from + i];
        slope[i] = -norm.scale[from + i] * norm.rstd[from + i] * mean_dy_xhat[from + i];
      }
    };
    if (!ROWS) prepare(c, n);
    const auto rows = [&](int64_t r, auto count) {
      constexpr int R = decltype(count)::value;
      if (ROWS) prepare(r, 1);
      const Along<A, ROWS> center(norm.center, r, c), scale(norm.scale, r, c), shift(norm.shift, r, c), by(slope, 0, 0),
          more(offset, 0, 0);
      const Rows<A, R> dr(dy, r, c, n, db), zr(z, r, c, n, zb), rr(residual, r, c, n, rb);
      const auto write = [&](auto with_du, auto frozen) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < R; ++j) {
            const A d = zr(j, i) - center[i];
            const A g = backward_of<ACT, A>(d * scale[i] + shift[i] + rr(j, i), dr(j, i), norm.slope);
            if constexpr (decltype(with_du)::value) du.data[(r + j) * du.ld + c + i] = g;
            A out = scale[i] * g;
            if constexpr (!decltype(frozen)::value) out += by[i] * d + more[i];
            dz.data[(r + j) * dz.ld + c + i] = out;
          }
        }
      };
      const auto choose = [&](auto frozen) {
        du.data == nullptr ? write(std::false_type(), frozen) : write(std::true_type(), frozen);
      };
      mean_dy == nullptr ? choose(std::true_type()) : choose(std::false_type());
    };
    if constexpr (ROWS) {
      for (int64_t r = 0; r < shape.rows; ++r) rows(r, std::integral_constant<int, 1>());
    } else {
      rows_together(0, shape.rows, rows);
    }
  }
}
