// The inner product kernel: MR x NV vectors of c stay in registers while every input is accumulated.
// Included by tile_kernels_inl.h, inside a namespace and under one instruction set.

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(DLA_VECTOR_BYTES)));
  typedef A unaligned __attribute__((vector_size(DLA_VECTOR_BYTES), aligned(sizeof(A))));
  static constexpr int lanes = DLA_VECTOR_BYTES / sizeof(A);
};

#if DLA_VECTOR_BYTES == 64
constexpr int kRows = 6, kVectors = 4;
#else
constexpr int kRows = 6, kVectors = 2;
#endif

template <class A>
inline typename VectorOf<A>::type load_lanes(const A* p, int64_t n) {
  using V = VectorOf<A>;
  if (n >= V::lanes) return *reinterpret_cast<const typename V::unaligned*>(p);
  typename V::type v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

template <class A>
inline void store_lanes(A* p, typename VectorOf<A>::type v, int64_t n) {
  using V = VectorOf<A>;
  if (n >= V::lanes) {
    *reinterpret_cast<typename V::unaligned*>(p) = v;
    return;
  }
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

// Products are added up in registers this often before they go on to c: a sum of sums rounds far less than one long
// chain, and c is in cache.
constexpr int64_t kDepth = 128;

// Asks for the next lines of what the caller will read after this product.
inline void fetch(Ahead& ahead, int lines) {
  for (; lines > 0 && ahead.rows > 0; --lines) {
    __builtin_prefetch(ahead.at + 64 * ahead.line, 0, 2);
    if (++ahead.line >= ahead.lines) {
      ahead.line = 0;
      ahead.at += ahead.stride;
      --ahead.rows;
    }
  }
}

template <class A, int MR, int NV, bool TRANSPOSED>
inline __attribute__((always_inline)) void accumulate(typename VectorOf<A>::type (&acc)[MR][NV], const A* a,
                                                      int64_t lda, const A* b, int64_t ldb, int64_t count,
                                                      Ahead* ahead) {
  using V = VectorOf<A>;
  constexpr int64_t line = 64 / sizeof(A);
  for (int64_t p0 = 0; p0 < count; p0 += line) {
    if constexpr (!TRANSPOSED) {
      // The next rows of a: memory is too far for the processor to begin on them by itself.
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) __builtin_prefetch(a + (MR + i) * lda + p0, 0, 2);
    }
    if (ahead != nullptr) fetch(*ahead, MR);
    const int64_t end = count - p0 < line ? count : p0 + line;
    for (int64_t p = p0; p < end; ++p) {
      typename V::type bv[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) bv[j] = *reinterpret_cast<const typename V::unaligned*>(b + p * ldb + j * V::lanes);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const A av = TRANSPOSED ? a[p * lda + i] : a[i * lda + p];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
      }
    }
  }
}

template <class A, int MR, int NV>
inline __attribute__((always_inline)) void flush(typename VectorOf<A>::type (&acc)[MR][NV], A* c, int64_t ldc,
                                                 int64_t n, bool add) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      A* to = c + i * ldc + j * lanes;
      store_lanes(to, add ? acc[i][j] + load_lanes(to, n - j * lanes) : acc[i][j], n - j * lanes);
      acc[i][j] = typename VectorOf<A>::type{};
    }
  }
}

template <class A, int MR, int NV, bool TRANSPOSED>
inline void micro(const Gemm<A>& g, int64_t i0, int64_t j0) {
  typename VectorOf<A>::type acc[MR][NV] = {};
  A* c = g.c + i0 * g.ldc + j0;
  const A* b = g.b == nullptr ? nullptr : g.b + j0;
  bool add = g.add;
  // c may lie far away: fetched now, it is there when the products are done.
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NV; ++j) __builtin_prefetch(c + i * g.ldc + j * VectorOf<A>::lanes, 1);
  }
  int64_t depth = 0;
  for (int64_t s = 0; s < g.segment_count; ++s) {
    const Segment<A>& segment = g.segments[s];
    const A* a = segment.a + (TRANSPOSED ? i0 : i0 * segment.lda);
    if (segment.b != nullptr) b = segment.b + j0;
    for (int64_t p = 0; p < segment.k;) {
      const int64_t count = segment.k - p < kDepth - depth ? segment.k - p : kDepth - depth;
      accumulate<A, MR, NV, TRANSPOSED>(acc, a + (TRANSPOSED ? p * segment.lda : p), segment.lda, b, g.ldb, count,
                                        g.ahead);
      b += count * g.ldb;
      p += count;
      depth += count;
      if (depth == kDepth) {
        flush<A, MR, NV>(acc, c, g.ldc, g.n - j0, add);
        add = true;
        depth = 0;
      }
    }
  }
  // Nothing is left over only where all of it has been written.
  if (depth > 0 || !add) flush<A, MR, NV>(acc, c, g.ldc, g.n - j0, add);
}

template <class A, int NV, bool TRANSPOSED>
inline void column(const Gemm<A>& g, int64_t j0) {
  int64_t i = 0;
  for (; i + kRows <= g.m; i += kRows) micro<A, kRows, NV, TRANSPOSED>(g, i, j0);
  switch (g.m - i) {
    case 5:
      return micro<A, 5, NV, TRANSPOSED>(g, i, j0);
    case 4:
      return micro<A, 4, NV, TRANSPOSED>(g, i, j0);
    case 3:
      return micro<A, 3, NV, TRANSPOSED>(g, i, j0);
    case 2:
      return micro<A, 2, NV, TRANSPOSED>(g, i, j0);
    case 1:
      return micro<A, 1, NV, TRANSPOSED>(g, i, j0);
    default:
      return;
  }
}

template <class A, bool TRANSPOSED>
inline void columns(const Gemm<A>& g) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  for (int64_t j = 0; j < g.n; j += kVectors * lanes) {
    const int64_t vectors = (g.n - j + lanes - 1) / lanes;
    if (vectors >= kVectors) {
      column<A, kVectors, TRANSPOSED>(g, j);
#if DLA_VECTOR_BYTES == 64
    } else if (vectors == 3) {
      column<A, 3, TRANSPOSED>(g, j);
    } else if (vectors == 2) {
      column<A, 2, TRANSPOSED>(g, j);
#endif
    } else {
      column<A, 1, TRANSPOSED>(g, j);
    }
  }
}

template <class A>
void gemm(const Gemm<A>& g) {
  if (g.transposed) {
    columns<A, true>(g);
  } else {
    columns<A, false>(g);
  }
}
