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

// A row between a zero on either side; all zeros where there is none.
template <class A>
inline const A* padded(const A* row, int64_t width, A* to) {
  to[0] = to[width + 1] = A(0);
  for (int64_t i = 0; i < width; ++i) to[i + 1] = row == nullptr ? A(0) : row[i];
  return to + 1;
}

template <class A, int64_t F>
inline void interleave(const A* phases, int64_t count, int64_t factor, A* out) {
  const int64_t f = F > 0 ? F : factor;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < f; ++k) out[i * f + k] = phases[k * count + i];
  }
}

template <class A>
void up_row_plane(const UpRow<A>& u) {
  const int64_t f = u.factor, pad = f / 2, count = u.width + 1;
  const A* n = padded(u.near, u.width, u.scratch);
  const A* r = padded(u.far, u.width, u.scratch + u.width + 2);
  A* whole = u.scratch + 2 * (u.width + 2);
  // Every phase of the row on its own, then interleaved a position at a time through a block that stays in cache.
  constexpr int64_t block = 64;
  A phases[block * 8];
  for (int64_t k0 = 0; k0 < f; k0 += 8) {
    const int64_t ks = f - k0 < 8 ? f - k0 : 8;
    for (int64_t i0 = 0; i0 < count; i0 += block) {
      const int64_t n_block = count - i0 < block ? count - i0 : block;
      for (int64_t k = 0; k < ks; ++k) {
        const A wn0 = u.weight_near[k0 + k], wn1 = u.weight_near[k0 + k + f];
        const A wf0 = u.weight_far[k0 + k], wf1 = u.weight_far[k0 + k + f];
        A* v = phases + k * n_block;
#pragma omp simd
        for (int64_t i = 0; i < n_block; ++i) {
          const int64_t at = i0 + i;
          v[i] = n[at] * wn0 + n[at - 1] * wn1 + r[at] * wf0 + r[at - 1] * wf1;
        }
      }
      if (f == 2) {
        interleave<A, 2>(phases, n_block, f, whole + i0 * f);
      } else if (f == 4) {
        interleave<A, 4>(phases, n_block, f, whole + i0 * f);
      } else if (f == 8) {
        interleave<A, 8>(phases, n_block, f, whole + i0 * f);
      } else {
        for (int64_t i = 0; i < n_block; ++i) {
          for (int64_t k = 0; k < ks; ++k) whole[(i0 + i) * f + k0 + k] = phases[k * n_block + i];
        }
      }
    }
  }
  for (int64_t o = u.begin; o < u.end; ++o) {
    u.out[o - u.begin] = u.skip != nullptr ? whole[o + pad] + u.skip[o - u.begin] : whole[o + pad];
  }
}

// Columns of x whose product with column k of the kernel falls inside the map: [first, last).
inline int64_t first_column(int64_t k, int64_t f) {
  const int64_t pad = f / 2;
  return k >= pad ? 0 : (pad - k + f - 1) / f;
}
inline int64_t last_column(int64_t k, int64_t f, int64_t width, int64_t out_width) {
  const int64_t room = out_width - 1 + f / 2 - k;
  const int64_t last = room < 0 ? 0 : room / f + 1;
  return last < width ? last : width;
}

// Channels [c, c + n) of up_row_backward, n at most NV vectors.
template <class A, int NV>
inline void up_block_backward(const UpRowBackward<A>& u, int64_t c, int64_t n) {
  using V = VectorOf<A>;
  const int64_t channels = u.channels, f = u.factor, pad = f / 2;
  const auto load = [&](const A* p, int v) { return load_lanes(p + v * V::lanes, n - v * V::lanes); };
  for (int64_t i = 0; u.dx != nullptr && i < u.width; ++i) {
    typename V::type acc[NV] = {};
    const int64_t from = i * f - pad, k0 = from < 0 ? -from : 0;
    const int64_t k1 = u.out_width - from < 2 * f ? u.out_width - from : 2 * f;
    for (int64_t ky = 0; ky < 2 * f; ++ky) {
      if (u.dy[ky] == nullptr) continue;
      for (int64_t kx = k0; kx < k1; ++kx) {
        const A* d = u.dy[ky] + (from + kx) * channels + c;
        const A* w = u.weight + (ky * 2 * f + kx) * channels + c;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[v] += load(d, v) * load(w, v);
      }
    }
    for (int v = 0; v < NV; ++v) store_lanes(u.dx + i * channels + c + v * V::lanes, acc[v], n - v * V::lanes);
  }
  for (int64_t ky = 0; u.dw != nullptr && ky < 2 * f; ++ky) {
    if (u.dy[ky] == nullptr) continue;
    for (int64_t kx = 0; kx < 2 * f; ++kx) {
      typename V::type acc[NV] = {};
      const int64_t last = last_column(kx, f, u.width, u.out_width);
      for (int64_t i = first_column(kx, f); i < last; ++i) {
        const A* x = u.x + i * channels + c;
        const A* d = u.dy[ky] + (i * f - pad + kx) * channels + c;
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[v] += load(x, v) * load(d, v);
      }
      double* dw = u.dw + (ky * 2 * f + kx) * channels + c;
      for (int64_t j = 0; j < n; ++j) dw[j] += acc[j / V::lanes][j % V::lanes];
    }
  }
}

template <class A>
void up_row_backward(const UpRowBackward<A>& u) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  int64_t c = 0;
  for (; c + 4 * lanes <= u.channels; c += 4 * lanes) up_block_backward<A, 4>(u, c, 4 * lanes);
  for (; c < u.channels; c += lanes) {
    up_block_backward<A, 1>(u, c, u.channels - c < lanes ? u.channels - c : lanes);
  }
}

template <class A>
void up_row_plane_backward(const UpRowBackward<A>& u) {
  const int64_t f = u.factor, pad = f / 2, count = u.width + 1;
  if (u.dx != nullptr) {
    for (int64_t i = 0; i < u.width; ++i) u.dx[i] = A(0);
  }
  for (int64_t ky = 0; ky < 2 * f; ++ky) {
    if (u.dy[ky] == nullptr) continue;
    for (int64_t k = 0; k < f; ++k) {
      // What of this row meets columns k and k + f of the kernel, side by side.
      A* d = u.scratch;
      const int64_t first = first_column(k, f);
      int64_t last = (u.out_width - 1 + pad - k) / f + 1;
      last = last < count ? last : count;
      for (int64_t i = 0; i < first; ++i) d[i] = A(0);
      for (int64_t i = first; i < last; ++i) d[i] = u.dy[ky][i * f + k - pad];
      for (int64_t i = last; i < count; ++i) d[i] = A(0);
      if (u.dx != nullptr) {
        const A w0 = u.weight[ky * 2 * f + k], w1 = u.weight[ky * 2 * f + k + f];
#pragma omp simd
        for (int64_t i = 0; i < u.width; ++i) u.dx[i] += d[i] * w0 + d[i + 1] * w1;
      }
      if (u.dw != nullptr) {
        A s0 = 0, s1 = 0;
#pragma omp simd reduction(+ : s0, s1)
        for (int64_t i = 0; i < u.width; ++i) {
          s0 += u.x[i] * d[i];
          s1 += u.x[i] * d[i + 1];
        }
        u.dw[ky * 2 * f + k] += s0;
        u.dw[ky * 2 * f + k + f] += s1;
      }
    }
  }
}
