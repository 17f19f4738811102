// Rows of the learned upsampling (kernels.h: UpRow, UpRowBackward). Included by tile_kernels_inl.h, inside a namespace
// and under one instruction set.

template <class A>
void up_row(const UpRow<A>& u) {
  const int64_t channels = u.channels, f = u.factor, pad = f / 2;
  const A* zeros = u.scratch;
  for (int64_t o = u.begin; o < u.end; ++o) {
    const int64_t i = (o + pad) / f, k = (o + pad) % f;
    const bool right = i < u.width, left = i > 0;
    const A* n0 = right && u.near != nullptr ? u.near + i * channels : zeros;
    const A* n1 = left && u.near != nullptr ? u.near + (i - 1) * channels : zeros;
    const A* f0 = right && u.far != nullptr ? u.far + i * channels : zeros;
    const A* f1 = left && u.far != nullptr ? u.far + (i - 1) * channels : zeros;
    const A *wn0 = u.weight_near + k * channels, *wn1 = wn0 + f * channels;
    const A *wf0 = u.weight_far + k * channels, *wf1 = wf0 + f * channels;
    A* out = u.out + (o - u.begin) * channels;
    if (u.skip != nullptr) {
      const A* skip = u.skip + (o - u.begin) * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        out[c] = (n0[c] * wn0[c] + n1[c] * wn1[c] + f0[c] * wf0[c] + f1[c] * wf1[c]) + skip[c];
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        out[c] = n0[c] * wn0[c] + n1[c] * wn1[c] + f0[c] * wf0[c] + f1[c] * wf1[c];
      }
    }
  }
}

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

// Rows [ky, ky + R) and columns [first, first + KX) of the kernel, channels [c, c + n) of one vector: dx gains their
// part, dw its own. All R rows of dy exist.
template <class A, int R, int KX, bool DX, bool DW, bool WHOLE>
inline void up_taps(UpRowBackward<A>& u, int64_t ky, int64_t first, int64_t c, int64_t rest, bool begin) {
  using V = typename VectorOf<A>::type;
  const int64_t channels = u.channels, f = u.factor, from = first - f / 2, width = u.width;
  const int64_t n = WHOLE ? VectorOf<A>::lanes : rest;
  const A* x = u.x + c;
  A* dx = DX ? u.dx + c : nullptr;
  const int64_t tap = (ky * 2 * f + first) * channels + c;
  // A quarter of a line a tap and pixel: together the passes over a row fetch the next f rows of dy, no more.
  const char* ahead = u.ahead;
  constexpr int64_t lines = R * KX > 4 ? R * KX / 4 : 1;
  const int64_t step = ahead == nullptr ? 0 : 64;
  const A* dy[R];
  V w[R][KX] = {}, sum[R][KX] = {};
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    dy[r] = u.dy[ky + r] + c;
#pragma GCC unroll 8
    for (int k = 0; DX && k < KX; ++k) w[r][k] = load_lanes(u.weight + tap + (r * 2 * f + k) * channels, n);
  }
  const auto pixel = [&](int64_t i, auto inside) {
    const int64_t o = i * f + from;
    const V xi = DW ? load_lanes(x + i * channels, n) : V{};
    // One chain a row: a single one would be as long as there are taps.
    V acc[R] = {};
    if (DX && !begin) acc[0] = load_lanes(dx + i * channels, n);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int k = 0; k < KX; ++k) {
        if (!decltype(inside)::value && (o + k < 0 || o + k >= u.out_width)) continue;
        const V d = load_lanes(dy[r] + (o + k) * channels, n);
        if constexpr (DX) acc[r] += d * w[r][k];
        if constexpr (DW) sum[r][k] += xi * d;
      }
    }
    for (int r = 1; r < R; ++r) acc[0] += acc[r];
    if constexpr (DX) store_lanes(dx + i * channels, acc[0], n);
    for (int64_t line = 0; line < lines; ++line, ahead += step) __builtin_prefetch(ahead, 0, 2);
  };
  // All KX columns lie inside the map for i in [low, high).
  const int64_t low = from >= 0 ? 0 : (-from + f - 1) / f, room = u.out_width - KX - from;
  const int64_t high = room < 0 ? 0 : room / f + 1;
  int64_t i = 0;
  for (; i < width && i < low; ++i) pixel(i, std::false_type());
  for (; i < width && i < high; ++i) pixel(i, std::true_type());
  for (; i < width; ++i) pixel(i, std::false_type());
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int k = 0; DW && k < KX; ++k) {
      A* to = u.scratch + tap + (r * 2 * f + k) * channels;
      store_lanes(to, load_lanes(to, n) + sum[r][k], n);
    }
  }
  u.ahead = ahead;
}

// As many rows of the kernel at once as have their sums of dw in registers.
template <class A, int KX>
constexpr int rows_at_once() {
  return DLA_VECTOR_BYTES == 64 && KX < 16 ? 16 / KX < 4 ? 16 / KX : 4 : 1;
}

template <class A, int KX, bool DX, bool DW>
inline void up_columns(UpRowBackward<A>& u) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  constexpr int R = rows_at_once<A, KX>();
  const int64_t rows = 2 * u.factor;
  for (int64_t c = 0; c < u.channels; c += lanes) {
    const int64_t rest = u.channels - c;
    bool begin = true;
    for (int64_t ky = 0; ky < rows;) {
      bool together = rest >= lanes && ky + R <= rows;
      for (int r = 0; together && r < R; ++r) together = u.dy[ky + r] != nullptr;
      if (!together && u.dy[ky] == nullptr) {
        ++ky;
        continue;
      }
      for (int64_t first = 0; first < rows; first += KX) {
        if (together) {
          up_taps<A, R, KX, DX, DW, true>(u, ky, first, c, rest, begin);
        } else if (rest >= lanes) {
          up_taps<A, 1, KX, DX, DW, true>(u, ky, first, c, rest, begin);
        } else {
          up_taps<A, 1, KX, DX, DW, false>(u, ky, first, c, rest, begin);
        }
        begin = false;
      }
      ky += together ? R : 1;
    }
  }
}

template <class A, bool DX, bool DW>
inline void up_factor_columns(UpRowBackward<A>& u) {
  if (u.factor % 4 == 0) {
    up_columns<A, 8, DX, DW>(u);
  } else if (u.factor % 2 == 0) {
    up_columns<A, 4, DX, DW>(u);
  } else {
    up_columns<A, 2, DX, DW>(u);
  }
}

// Always a row of dy exists: position i f, since f / 2 < f.
template <class A>
void up_row_backward(const UpRowBackward<A>& given) {
  UpRowBackward<A> u = given;
  if (u.dx == nullptr) {
    up_factor_columns<A, false, true>(u);
  } else if (u.dw == nullptr) {
    up_factor_columns<A, true, false>(u);
  } else {
    up_factor_columns<A, true, true>(u);
  }
  if (u.dw == nullptr || !u.flush) return;
  const int64_t values = 4 * u.factor * u.factor * u.channels;
#pragma omp simd
  for (int64_t i = 0; i < values; ++i) {
    u.dw[i] += u.scratch[i];
    u.scratch[i] = A(0);
  }
}

// phases[k][i] = row[i F + k - F / 2], zero outside the row.
template <class A, int64_t F>
inline void deinterleave(const A* row, int64_t width, int64_t out_width, int64_t factor, int64_t ld, A* phases) {
  const int64_t f = F > 0 ? F : factor, pad = f / 2;
  const auto edge = [&](int64_t i) {
    for (int64_t k = 0; k < f; ++k) {
      const int64_t o = i * f + k - pad;
      phases[k * ld + i] = o >= 0 && o < out_width ? row[o] : A(0);
    }
  };
  if constexpr (F > 0) {
    // Group by group: the row is width groups of F, and a width of whole vectors leaves no rest.
    for (int64_t k = 0; k < F; ++k) phases[k * ld + (k < F / 2 ? 0 : width)] = A(0);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      for (int64_t q = 0; q < F / 2; ++q) {
        phases[(q + F / 2) * ld + i] = row[i * F + q];
        phases[q * ld + i + 1] = row[i * F + q + F / 2];
      }
    }
  } else {
    for (int64_t i = 0; i <= width; ++i) edge(i);
  }
}

// Rows [ky, ky + R) of the kernel: dx gains their part, sums of dw theirs. A row that is not there counts as zeros.
template <class A, int64_t F, int R, bool DW>
inline void up_plane_rows(const UpRowBackward<A>& u, int64_t ky, const A* x, A* dx, A* phases, int64_t ld, A* sums) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  for (int r = 0; r < R; ++r) {
    A* to = phases + r * F * ld;
    if (u.dy[ky + r] != nullptr) {
      deinterleave<A, F>(u.dy[ky + r], u.width, u.out_width, F, ld, to);
    } else {
      for (int64_t i = 0; i < F * ld; ++i) to[i] = A(0);
    }
  }
  V sum[R][2 * F] = {};
  const A* w = u.weight + ky * 2 * F;
  for (int64_t i = 0; i < u.width; i += lanes) {
    const V v = load_lanes(x + i, lanes);
    V acc[2] = {load_lanes(dx + i, lanes), V{}};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int64_t k = 0; k < F; ++k) {
        const A* d = phases + (r * F + k) * ld + i;
        const V d0 = load_lanes(d, lanes), d1 = load_lanes(d + 1, lanes);
        acc[0] += d0 * w[r * 2 * F + k];
        acc[1] += d1 * w[r * 2 * F + k + F];
        if constexpr (DW) {
          sum[r][k] += v * d0;
          sum[r][k + F] += v * d1;
        }
      }
    }
    store_lanes(dx + i, acc[0] + acc[1], lanes);
  }
  A* to = sums + ky * 2 * F * lanes;
  for (int64_t t = 0; DW && t < R * 2 * F; ++t) {
    store_lanes(to + t * lanes, load_lanes(to + t * lanes, lanes) + sum[t / (2 * F)][t % (2 * F)], lanes);
  }
}

// The same for any factor, a tap at a time.
template <class A, bool DW>
inline void up_plane_row(const UpRowBackward<A>& u, int64_t ky, const A* x, A* dx, A* phases, int64_t ld, A* sums) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  const int64_t f = u.factor;
  deinterleave<A, 0>(u.dy[ky], u.width, u.out_width, f, ld, phases);
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

template <class A, int64_t F, bool DW>
inline void up_plane_backward(const UpRowBackward<A>& u) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  const int64_t f = F > 0 ? F : u.factor, ld = u.width + 2 + kPlaneSlack, count = whole_vectors<A>(u.width);
  // Zeros behind the last value, from the caller and kept: whole vectors are read.
  A *x = u.scratch, *dx = x + ld, *phases = dx + ld, *sums = phases + (f > kPlaneRows ? f : kPlaneRows) * ld;
  for (int64_t i = 0; DW && i < u.width; ++i) x[i] = u.x[i];
  for (int64_t i = 0; i < count; ++i) dx[i] = A(0);
  if constexpr (F > 0) {
    constexpr int R = F == 2 ? 4 : 1;  // 16 sums of dw at most stay in registers
    for (int64_t ky = 0; ky < 2 * F; ky += R) {
      if (R > 1 || u.dy[ky] != nullptr) up_plane_rows<A, F, R, DW>(u, ky, x, dx, phases, ld, sums);
    }
  } else {
    for (int64_t ky = 0; ky < 2 * f; ++ky) {
      if (u.dy[ky] != nullptr) up_plane_row<A, DW>(u, ky, x, dx, phases, ld, sums);
    }
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

template <class A, bool DW>
inline void up_factor_backward(const UpRowBackward<A>& u) {
  if (u.factor == 2) {
    up_plane_backward<A, 2, DW>(u);
  } else if (u.factor == 4) {
    up_plane_backward<A, 4, DW>(u);
  } else if (u.factor == 8) {
    up_plane_backward<A, 8, DW>(u);
  } else {
    up_plane_backward<A, 0, DW>(u);
  }
}

template <class A>
void up_row_plane_backward(const UpRowBackward<A>& u) {
  u.dw != nullptr ? up_factor_backward<A, true>(u) : up_factor_backward<A, false>(u);
}
