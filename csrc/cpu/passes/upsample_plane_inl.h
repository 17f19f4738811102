// The learned upsampling of one channel of a contiguous map, by rows and by planes (kernels.h: UpRow, UpPlane and
// their backwards). Included by tile_kernels_inl.h, inside a namespace and under one instruction set.

// Values [0, count) of a row behind a zero, with zeros up to `room`; all zeros where there is no row.
template <class A>
inline const A* padded(const A* row, int64_t count, int64_t room, A* to) {
  to[0] = A(0);
  const int64_t n = row == nullptr ? 0 : count;
  for (int64_t i = 0; i < n; ++i) to[i + 1] = row[i];
  for (int64_t i = n; i < room; ++i) to[i + 1] = A(0);
  return to + 1;
}

// Positions are rounded up to whole vectors; what lies behind the last is computed from zeros and never used.
template <class A>
inline int64_t whole_vectors(int64_t n) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  return (n + lanes - 1) / lanes * lanes;
}

// Output o = F g + q lies between positions g - 1 and g, or from the middle of the group on between g and g + 1.
template <class A, int64_t F>
inline void up_groups(const A* n, const A* r, const UpRow<A>& u, A* out) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  for (int64_t g = 0; g < u.width; g += lanes) {
    A phases[F][lanes];
#pragma GCC unroll 8
    for (int64_t q = 0; q < F; ++q) {
      const int64_t k = (q + F / 2) % F, at = g + (q < F / 2 ? 0 : 1);
      const A wn0 = u.weight_near[k], wn1 = u.weight_near[k + F];
      const A wf0 = u.weight_far[k], wf1 = u.weight_far[k + F];
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        phases[q][i] = n[at + i] * wn0 + n[at + i - 1] * wn1 + r[at + i] * wf0 + r[at + i - 1] * wf1;
      }
    }
    A* to = out + g * F;
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      for (int64_t q = 0; q < F; ++q) to[i * F + q] = phases[q][i];
    }
  }
}

// The same for any factor, from position 0 on: f / 2 values before the first output.
template <class A>
inline void up_positions(const A* n, const A* r, const UpRow<A>& u, A* whole) {
  const int64_t f = u.factor;
  for (int64_t i = 0; i <= u.width; ++i) {
    for (int64_t k = 0; k < f; ++k) {
      whole[i * f + k] = n[i] * u.weight_near[k] + n[i - 1] * u.weight_near[k + f] + r[i] * u.weight_far[k] +
                         r[i - 1] * u.weight_far[k + f];
    }
  }
}

template <class A>
void up_row_plane(const UpRow<A>& u) {
  const int64_t f = u.factor, count = whole_vectors<A>(u.width + 1), room = u.width + 1 + kPlaneSlack;
  const A* n = padded(u.near, u.width, count, u.scratch);
  const A* r = padded(u.far, u.width, count, u.scratch + room);
  const int64_t values = u.end - u.begin;
  // Straight to the output where it is whole and ends on a vector.
  const bool grouped = f == 2 || f == 4 || f == 8;
  const bool direct = grouped && values == f * u.width && u.width % VectorOf<A>::lanes == 0;
  A* whole = direct ? u.out : u.scratch + 2 * room;
  if (f == 2) {
    up_groups<A, 2>(n, r, u, whole);
  } else if (f == 4) {
    up_groups<A, 4>(n, r, u, whole);
  } else if (f == 8) {
    up_groups<A, 8>(n, r, u, whole);
  } else {
    up_positions(n, r, u, whole);
  }
  const A* from = direct ? u.out : whole + u.begin + (grouped ? 0 : f / 2);
  if (u.skip != nullptr) {
#pragma omp simd
    for (int64_t o = 0; o < values; ++o) u.out[o] = from[o] + u.skip[o];
  } else if (!direct) {
    for (int64_t o = 0; o < values; ++o) u.out[o] = from[o];
  }
}

enum class Order { zip_low, zip_high, even, odd, right, left };

// Where lane i of n comes from: lanes of the first vector, then those of the second.
constexpr int source_lane(Order order, int i, int n) {
  switch (order) {
    case Order::zip_low:
      return i / 2 + i % 2 * n;
    case Order::zip_high:
      return n / 2 + i / 2 + i % 2 * n;
    case Order::even:
      return 2 * i;
    case Order::odd:
      return 2 * i + 1;
    case Order::right:
      return i == 0 ? n : i - 1;
    case Order::left:
      return i + 1;
  }
  return i;
}

template <Order O, class V, int... I>
inline V picked(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, source_lane(O, I, sizeof...(I))...);
#else
  constexpr int n = sizeof...(I);
  return V{(source_lane(O, I, n) < n ? a[source_lane(O, I, n)] : b[source_lane(O, I, n) - n])...};
#endif
}

template <Order O, class A>
inline typename VectorOf<A>::type shuffled(typename VectorOf<A>::type a, typename VectorOf<A>::type b) {
  return picked<O>(a, b, std::make_integer_sequence<int, VectorOf<A>::lanes>());
}

// F vectors of one phase each become F vectors of whole groups, one after another; split() is the inverse.
template <class A, int F>
inline void interleave(typename VectorOf<A>::type (&v)[F]) {
  if constexpr (F > 1) {
    typename VectorOf<A>::type even[F / 2], odd[F / 2];
    for (int i = 0; i < F / 2; ++i) even[i] = v[2 * i], odd[i] = v[2 * i + 1];
    interleave<A, F / 2>(even);
    interleave<A, F / 2>(odd);
    for (int i = 0; i < F / 2; ++i) {
      v[2 * i] = shuffled<Order::zip_low, A>(even[i], odd[i]);
      v[2 * i + 1] = shuffled<Order::zip_high, A>(even[i], odd[i]);
    }
  }
}

template <class A, int F>
inline void split(typename VectorOf<A>::type (&v)[F]) {
  if constexpr (F > 1) {
    typename VectorOf<A>::type even[F / 2], odd[F / 2];
    for (int i = 0; i < F / 2; ++i) {
      even[i] = shuffled<Order::even, A>(v[2 * i], v[2 * i + 1]);
      odd[i] = shuffled<Order::odd, A>(v[2 * i], v[2 * i + 1]);
    }
    split<A, F / 2>(even);
    split<A, F / 2>(odd);
    for (int i = 0; i < F / 2; ++i) v[2 * i] = even[i], v[2 * i + 1] = odd[i];
  }
}

template <class A, int F>
inline void up_plane_factor(const UpPlane<A>& u) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  constexpr int R = F == 2 ? 2 : 1;  // rows whose weights stay in registers
  const int64_t width = u.width, top = u.begin * F - F / 2, first = top < 0 ? 0 : top;
  for (int64_t ky = 0; ky < F; ky += R) {
    A w[R][F][4];
    for (int r = 0; r < R; ++r) {
      for (int q = 0; q < F; ++q) {
        const A *near = u.weight + (ky + r) * 2 * F + (q + F / 2) % F, *far = near + 2 * F * F;
        w[r][q][0] = near[0], w[r][q][1] = near[F], w[r][q][2] = far[0], w[r][q][3] = far[F];
      }
    }
    for (int64_t i = u.begin; i < u.end; ++i) {
      const A* n = i < u.height ? u.x + (i - u.begin) * width : u.zeros;
      const A* m = i > 0 ? u.x + (i - u.begin - 1) * width : u.zeros;
      const int64_t o = i * F - F / 2 + ky;
      for (int64_t g = 0; g < width; g += lanes) {
        const V n1 = load_lanes(n + g, lanes), m1 = load_lanes(m + g, lanes);
        const bool begins = g == 0, ends = g + lanes == width;
        const V n0 = begins ? shuffled<Order::right, A>(n1, V{}) : load_lanes(n + g - 1, lanes);
        const V m0 = begins ? shuffled<Order::right, A>(m1, V{}) : load_lanes(m + g - 1, lanes);
        const V n2 = ends ? shuffled<Order::left, A>(n1, V{}) : load_lanes(n + g + 1, lanes);
        const V m2 = ends ? shuffled<Order::left, A>(m1, V{}) : load_lanes(m + g + 1, lanes);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          if (o + r < 0 || o + r >= F * u.height) continue;
          V v[F];
#pragma GCC unroll 8
          for (int q = 0; q < F; ++q) {
            v[q] = q < F / 2 ? n1 * w[r][q][0] + n0 * w[r][q][1] + m1 * w[r][q][2] + m0 * w[r][q][3]
                             : n2 * w[r][q][0] + n1 * w[r][q][1] + m2 * w[r][q][2] + m1 * w[r][q][3];
          }
          interleave<A, F>(v);
          const int64_t at = ((o + r - first) * width + g) * F;
          for (int q = 0; q < F; ++q) {
            if (u.skip != nullptr) v[q] += load_lanes(u.skip + at + q * lanes, lanes);
            store_lanes(u.out + at + q * lanes, v[q], lanes);
          }
        }
      }
    }
  }
}

template <class A>
void up_plane(const UpPlane<A>& u) {
  if (u.factor == 2) {
    up_plane_factor<A, 2>(u);
  } else if (u.factor == 4) {
    up_plane_factor<A, 4>(u);
  } else {
    up_plane_factor<A, 8>(u);
  }
}

// Adds the lanes of each of N vectors to to[N], all of them at once: each step halves the vectors that are left.
template <class A, int N>
inline void add_lanes(typename VectorOf<A>::type (&v)[N], double* to) {
  constexpr int lanes = VectorOf<A>::lanes, left = N / lanes;
  for (int n = N / 2; n >= left; n /= 2) {
    for (int i = 0; i < n; ++i) {
      v[i] = shuffled<Order::zip_low, A>(v[i], v[i + n]) + shuffled<Order::zip_high, A>(v[i], v[i + n]);
    }
  }
  for (int i = 0; i < left; ++i) {
    for (int p = 0; p < lanes; ++p) to[i + left * p] += v[i][p];
  }
}

template <class A, int F, bool DX, bool DW>
inline void up_plane_backward_factor(const UpPlaneBackward<A>& u) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  // As many rows of the kernel as have their sums of dw in registers.
  constexpr int R = F == 8 ? 1 : (DLA_VECTOR_BYTES == 64 ? 8 : 4) / F;
  const int64_t width = u.width, ld = width + kPlaneMargin, top = u.begin * F - F / 2, first = top < 0 ? 0 : top;
  // phases[r][q][j] = row r of dy at j F + q, between zeros.
  A* phases = u.scratch + kPlaneMargin;
  for (int64_t r = 0; r < (u.end - u.begin + 1) * F; ++r) {
    const int64_t o = top + r;
    const bool inside = o >= 0 && o < F * u.height;
    const A* row = inside ? u.dy + (o - first) * F * width : nullptr;
    for (int64_t g = 0; g < width; g += lanes) {
      V v[F] = {};
      if (inside) {
        for (int q = 0; q < F; ++q) v[q] = load_lanes(row + g * F + q * lanes, lanes);
        split<A, F>(v);
      }
      for (int q = 0; q < F; ++q) store_lanes(phases + (r * F + q) * ld + g, v[q], lanes);
    }
  }
  V all[4 * F * F];
  for (int64_t ky = 0; ky < 2 * F; ky += R) {
    const A* w = u.weight + ky * 2 * F;
    V sum[R][2 * F] = {};
    for (int64_t i = 0; i < u.end - u.begin; ++i) {
      const A* rows = phases + (i * F + ky) * F * ld;
      for (int64_t g = 0; g < width; g += lanes) {
        const int64_t at = i * width + g;
        const V x = DW ? load_lanes(u.x + at, lanes) : V{};
        V acc[R] = {};
        if (DX && ky > 0) acc[0] = load_lanes(u.dx + at, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
          for (int k = 0; k < 2 * F; ++k) {
            // Column j F - F / 2 + k is of group j, or of one beside it.
            const int q = (k + F / 2) % F, shift = (k + F / 2) / F - 1;
            const V d = load_lanes(rows + (r * F + q) * ld + g + shift, lanes);
            if constexpr (DX) acc[r] += d * w[r * 2 * F + k];
            if constexpr (DW) sum[r][k] += x * d;
          }
        }
        for (int r = 1; r < R; ++r) acc[0] += acc[r];
        if constexpr (DX) store_lanes(u.dx + at, acc[0], lanes);
      }
    }
    for (int r = 0; DW && r < R; ++r) {
      for (int k = 0; k < 2 * F; ++k) all[(ky + r) * 2 * F + k] = sum[r][k];
    }
  }
  if constexpr (DW) add_lanes<A>(all, u.dw);
}

template <class A, int F>
inline void up_plane_backward_of(const UpPlaneBackward<A>& u) {
  if (u.dx == nullptr) {
    up_plane_backward_factor<A, F, false, true>(u);
  } else if (u.dw == nullptr) {
    up_plane_backward_factor<A, F, true, false>(u);
  } else {
    up_plane_backward_factor<A, F, true, true>(u);
  }
}

template <class A>
void up_plane_backward(const UpPlaneBackward<A>& u) {
  if (u.factor == 2) {
    up_plane_backward_of<A, 2>(u);
  } else if (u.factor == 4) {
    up_plane_backward_of<A, 4>(u);
  } else {
    up_plane_backward_of<A, 8>(u);
  }
}

// A row of any factor: phases[k][i] = dy[i f + k - f / 2] of kernel row ky, zero outside the row.
template <class A, bool DW>
inline void up_plane_row(const UpRowBackward<A>& u, int64_t ky, const A* x, A* dx, A* phases, int64_t ld, A* sums) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  const int64_t f = u.factor;
  for (int64_t i = 0; i <= u.width; ++i) {
    for (int64_t k = 0; k < f; ++k) {
      const int64_t o = i * f + k - f / 2;
      phases[k * ld + i] = o >= 0 && o < u.out_width ? u.dy[ky][o] : A(0);
    }
  }
  for (int64_t k = 0; k < f; ++k) {
    const A *d = phases + k * ld, w0 = u.weight[ky * 2 * f + k], w1 = u.weight[ky * 2 * f + k + f];
    A *to0 = sums + (ky * 2 * f + k) * lanes, *to1 = to0 + f * lanes;
    V s0 = DW ? load_lanes(to0, lanes) : V{}, s1 = DW ? load_lanes(to1, lanes) : V{};
    for (int64_t i = 0; i < u.width; i += lanes) {
      const V d0 = load_lanes(d + i, lanes), d1 = load_lanes(d + i + 1, lanes);
      store_lanes(dx + i, load_lanes(dx + i, lanes) + (d0 * w0 + d1 * w1), lanes);
      if constexpr (DW) {
        const V v = load_lanes(x + i, lanes);
        s0 += v * d0;
        s1 += v * d1;
      }
    }
    if constexpr (DW) {
      store_lanes(to0, s0, lanes);
      store_lanes(to1, s1, lanes);
    }
  }
}

template <class A, bool DW>
inline void up_row_plane_backward_of(const UpRowBackward<A>& u) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  const int64_t f = u.factor, ld = u.width + 2 + kPlaneSlack, count = whole_vectors<A>(u.width);
  // Zeros behind the last value, from the caller and kept: whole vectors are read.
  A *x = u.scratch, *dx = x + ld, *phases = dx + ld, *sums = phases + f * ld;
  for (int64_t i = 0; DW && i < u.width; ++i) x[i] = u.x[i];
  for (int64_t i = 0; i < count; ++i) dx[i] = A(0);
  for (int64_t ky = 0; ky < 2 * f; ++ky) {
    if (u.dy[ky] != nullptr) up_plane_row<A, DW>(u, ky, x, dx, phases, ld, sums);
  }
  for (int64_t i = 0; u.dx != nullptr && i < u.width; ++i) u.dx[i] = dx[i];
  if (!DW || !u.flush) return;
  for (int64_t t = 0; t < 4 * f * f; ++t) {
    double sum = 0;
    for (int64_t j = 0; j < lanes; ++j) {
      sum += sums[t * lanes + j];
      sums[t * lanes + j] = A(0);
    }
    u.dw[t] += sum;
  }
}

template <class A>
void up_row_plane_backward(const UpRowBackward<A>& u) {
  u.dw != nullptr ? up_row_plane_backward_of<A, true>(u) : up_row_plane_backward_of<A, false>(u);
}
