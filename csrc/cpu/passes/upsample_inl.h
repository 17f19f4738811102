// Rows of the learned upsampling of channels_last maps (kernels.h: UpRow, UpRowBackward). Included by
// tile_kernels_inl.h, inside a namespace and under one instruction set.

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
