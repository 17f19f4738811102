// The inner product kernel: MR x NV vectors of c stay in registers while every input is accumulated.
// Included by float_gemm_isa_inl.h, inside a namespace and under one instruction set.

#if DLA_VECTOR_BYTES == 64
constexpr int kRows = 6, kVectors = 4;
#else
constexpr int kRows = 6, kVectors = 2;
#endif

// So many products are added up in registers before they go on to c: a sum of sums rounds far less than one long chain,
// and these rows of b stay in the first-level cache for all rows of a.
constexpr int64_t kDepth = 128;

// The same value, of unknown origin: what is computed from it is computed where it is used, and takes no register
// before.
template <class X>
inline __attribute__((always_inline)) X anew(X x) {
  asm("" : "+r"(x));
  return x;
}

// Rows of what is finished next, and of the residual that is added to them, NV vectors each: fetched a few at a time,
// so that the cache has room left for the misses of the products meanwhile.
template <class A>
struct NextRows {
  const A *y = nullptr, *residual = nullptr;
  int64_t ld = 0, rows = 0, pace = 0;

  template <int NV>
  inline __attribute__((always_inline)) void fetch() {
    for (int64_t left = pace; left > 0 && rows > 0; --left, --rows, y += ld) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) __builtin_prefetch(y + j * VectorOf<A>::lanes, 1);
      if (residual == nullptr) continue;
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) __builtin_prefetch(residual + j * VectorOf<A>::lanes);
      residual += ld;
    }
  }
};

// The rows of a lie `row` values behind it, those that are next about `next` behind these. More than kRows of them are
// lda apart.
template <class A, int MR, int NV, bool TRANSPOSED>
inline __attribute__((always_inline)) void accumulate(typename VectorOf<A>::type (&acc)[MR][NV], const A* a,
                                                      const int64_t (&row)[MR], int64_t next, int64_t lda, const A* b,
                                                      int64_t ldb, int64_t count, Ahead* ahead, NextRows<A>& written) {
  using V = VectorOf<A>;
  constexpr int64_t line = 64 / sizeof(A);
  // Many rows are reached from a pointer for every few of them: one for each is more than there are registers for.
  constexpr bool many = MR > kRows && !TRANSPOSED;
  constexpr int few = 4, pointers = many ? (MR + few - 1) / few : 1;
  const A* at[pointers];
#pragma GCC unroll 16
  for (int i = 0; i < pointers; ++i) at[i] = anew(a + row[0] + few * i * lda);
  for (int64_t p0 = 0; p0 < count; p0 += line) {
    // The next rows of a: memory is too far for the processor to begin on them by itself, unless they are one stream.
    if (!TRANSPOSED && lda > 2 * line) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        __builtin_prefetch(many ? at[i / few] + i % few * lda + next : a + row[i] + next + p0, 0, 2);
      }
    }
    if (ahead != nullptr) fetch(*ahead, MR * ahead->pace);
    if (!TRANSPOSED) written.template fetch<NV>();
    const int64_t end = count - p0 < line ? count : p0 + line;
    for (int64_t p = p0; p < end; ++p) {
      typename V::type bv[NV];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) bv[j] = *reinterpret_cast<const typename V::unaligned*>(b + p * ldb + j * V::lanes);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const A av = TRANSPOSED ? a[p * lda + i] : (many ? at[i / few][i % few * lda] : a[row[i] + p]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
      }
#pragma GCC unroll 16
      for (int i = 0; many && i < pointers; ++i) ++at[i];
    }
  }
}

// c (+)= acc, of which c has n columns.
template <class A, int MR, int NV>
inline __attribute__((always_inline)) void flush(const typename VectorOf<A>::type (&acc)[MR][NV], A* c, int64_t ldc,
                                                 int64_t n, bool add) {
  using V = VectorOf<A>;
  if (n >= NV * V::lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        A* to = c + i * ldc + j * V::lanes;
        store_lanes(to, add ? acc[i][j] + load_lanes(to, V::lanes) : acc[i][j], V::lanes);
      }
    }
    return;
  }
  // Through memory: lanes that are picked one by one would keep all of acc there, from its first sum on.
  alignas(64) A row[NV * V::lanes];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store_lanes(row + j * V::lanes, acc[i][j], V::lanes);
    A* to = c + i * ldc;
    for (int64_t j = 0; j < n; ++j) to[j] = add ? to[j] + row[j] : row[j];
  }
}

// y = act((acc (+ c) - center) * scale + shift + residual) of so many values of a row.
template <class A, int MR, int NV, bool RESIDUAL>
inline __attribute__((always_inline)) void finish_rows(const typename VectorOf<A>::type (&acc)[MR][NV],
                                                       const Finish<A>& f, int64_t i0, int64_t j0, int64_t n) {
  using V = VectorOf<A>;
  using Vector = typename V::type;
  const Vector least = Vector{} + (f.relu ? A(0) : -static_cast<A>(__builtin_inf()));
  A* const y = f.y + i0 * f.ld + j0;
  const A* const residual = RESIDUAL ? f.residual + i0 * f.ld + j0 : nullptr;
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    const int64_t at = j * V::lanes, lanes = n - at;
    const Vector center = load_lanes(f.center + j0 + at, lanes), scale = load_lanes(f.scale + j0 + at, lanes),
                 shift = load_lanes(f.shift + j0 + at, lanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      Vector u = (acc[i][j] - center) * scale + shift;
      if constexpr (RESIDUAL) u += load_lanes(residual + i * f.ld + at, lanes);
      store_lanes(y + i * f.ld + at, least > u ? least : u, lanes);  // NaN is not less, and stays
    }
  }
}

template <class A, int MR, int NV>
inline __attribute__((always_inline)) void finish(typename VectorOf<A>::type (&acc)[MR][NV], const Gemm<A>& g,
                                                  const A* c, int64_t i0, int64_t j0, bool add) {
  using V = VectorOf<A>;
  const Finish<A>& f = *g.finish;
  const int64_t n = g.n - j0;
  if (n >= NV * V::lanes) {
    if (add) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) acc[i][j] += load_lanes(c + i * g.ldc + j * V::lanes, V::lanes);
      }
    }
    // A constant: lanes are counted by no code then.
    constexpr int64_t whole = NV * V::lanes;
    return f.residual != nullptr ? finish_rows<A, MR, NV, true>(acc, f, i0, j0, whole)
                                 : finish_rows<A, MR, NV, false>(acc, f, i0, j0, whole);
  }
  alignas(64) A row[NV * V::lanes];
  const A least = f.relu ? A(0) : -static_cast<A>(__builtin_inf());
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store_lanes(row + j * V::lanes, acc[i][j], V::lanes);
    const int64_t at = (i0 + i) * f.ld + j0;
    for (int64_t j = 0; j < n; ++j) {
      const A z = add ? c[i * g.ldc + j] + row[j] : row[j];
      A u = (z - f.center[j0 + j]) * f.scale[j0 + j] + f.shift[j0 + j];
      if (f.residual != nullptr) u += f.residual[at + j];
      f.y[at + j] = least > u ? least : u;
    }
  }
}

// Where in the segments a block of the depth begins, and how deep it is.
template <class A>
struct Depth {
  int64_t segment, offset;
  const A* b;
  int64_t count;
};

// Goes on from there: calls f(segment, offset in it, b, count) for its parts and moves past them.
template <class A, class F>
inline __attribute__((always_inline)) void parts(const Gemm<A>& g, Depth<A>& at, const F& f) {
  for (int64_t left = at.count; left > 0;) {
    const Segment<A>& segment = g.segments[at.segment];
    if (at.offset == 0 && segment.b != nullptr) at.b = segment.b;
    const int64_t count = segment.k - at.offset < left ? segment.k - at.offset : left;
    if (count > 0) f(segment, at.offset, at.b, count);
    at.b += count * g.ldb;
    at.offset += count;
    left -= count;
    if (at.offset == segment.k) {
      ++at.segment;
      at.offset = 0;
    }
  }
}

// Where in a segment rows i0, i0 + 1, ... of a begin.
template <class A, int MR>
inline __attribute__((always_inline)) void rows_at(const Gemm<A>& g, const Segment<A>& segment, int64_t i0,
                                                   int64_t (&row)[MR]) {
  if (g.group == 0) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) row[i] = (i0 + i) * segment.lda;
    return;
  }
  int64_t group = i0 / g.group, within = i0 % g.group;
  int64_t outer = group / g.outer;
  group %= g.outer;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    row[i] = outer * segment.outer + group * segment.step + within * segment.lda;
    if (++within < g.group) continue;
    within = 0;
    if (++group < g.outer) continue;
    group = 0;
    ++outer;
  }
}

// How the products of a block of the depth go on: into c, to be added to it, or as what is finished.
struct Sums {
  bool add, last;
};

template <class A, int MR, int NV, bool TRANSPOSED>
inline void micro(const Gemm<A>& g, Depth<A> at, int64_t i0, int64_t j0, Sums sums, Ahead* ahead) {
  typename VectorOf<A>::type acc[MR][NV] = {};
  A* c = g.c + i0 * g.ldc + j0;
  const bool finishes = !TRANSPOSED && sums.last && g.finish != nullptr;
  NextRows<A> next;
  if (finishes) {
    const Finish<A>& f = *g.finish;
    const int64_t first = (i0 + MR) * f.ld + j0, lines = at.count * static_cast<int64_t>(sizeof(A)) / 64;
    next = {f.y + first, f.residual == nullptr ? nullptr : f.residual + first, f.ld, MR,
            lines >= MR ? 1 : (2 * lines >= MR ? 2 : (4 * lines >= MR ? 4 : MR))};
  } else {
    // c may lie far away: fetched now, it is there when the products are done.
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < NV; ++j) __builtin_prefetch(c + i * g.ldc + j * VectorOf<A>::lanes, 1);
    }
  }
  parts(g, at, [&](const Segment<A>& segment, int64_t p, const A* b, int64_t count) {
    int64_t row[MR] = {};
    if constexpr (!TRANSPOSED) rows_at(g, segment, i0, row);
    const A* a = segment.a + (TRANSPOSED ? p * segment.lda + i0 : p);
    accumulate<A, MR, NV, TRANSPOSED>(acc, a, row, MR * segment.lda, segment.lda, b + j0, g.ldb, count, ahead, next);
  });
  if constexpr (!TRANSPOSED) {
    if (finishes) return finish<A, MR, NV>(acc, g, anew(c), i0, j0, sums.add);
  }
  flush<A, MR, NV>(acc, anew(c), anew(g.ldc), g.n - j0, sums.add);
}

template <class A, int NV, bool TRANSPOSED>
inline void rows(const Gemm<A>& g, const Depth<A>& at, int64_t j0, Sums sums, Ahead* ahead) {
  // Few vectors leave registers for more rows, and without those would wait for their own sums. Maps are often
  // multiples of 14 wide.
  constexpr int kMany = NV > kVectors / 2 ? kRows : (TRANSPOSED ? 2 * kRows : 14);
  int64_t i = 0;
#if DLA_VECTOR_BYTES == 64
  // One row more is all that registers hold, and reads b less often. So many times that no rows are left over, which by
  // themselves would wait for b. Not where they come in groups: more than kRows of them have to be within one.
  if constexpr (!TRANSPOSED && NV == kVectors) {
    constexpr int more = kRows + 1;
    const int64_t rest = g.m - more * (g.m % kRows);
    int64_t count = rest < 0 || g.group > 0 ? 0 : g.m % kRows + rest / (kRows * more) * kRows;
    for (; count > 0; --count, i += more) micro<A, more, NV, TRANSPOSED>(g, at, i, j0, sums, ahead);
  }
#endif
  while (i + kRows <= g.m) {
    // So many are within a line.
    const int64_t left = g.group > 0 ? g.group - i % g.group : g.m - i;
    if (kMany > kRows && left >= kMany) {
      micro<A, kMany, NV, TRANSPOSED>(g, at, i, j0, sums, ahead);
      i += kMany;
    } else {
      micro<A, kRows, NV, TRANSPOSED>(g, at, i, j0, sums, ahead);
      i += kRows;
    }
  }
  switch (g.m - i) {
    case 5:
      micro<A, 5, NV, TRANSPOSED>(g, at, i, j0, sums, ahead);
      break;
    case 4:
      micro<A, 4, NV, TRANSPOSED>(g, at, i, j0, sums, ahead);
      break;
    case 3:
      micro<A, 3, NV, TRANSPOSED>(g, at, i, j0, sums, ahead);
      break;
    case 2:
      micro<A, 2, NV, TRANSPOSED>(g, at, i, j0, sums, ahead);
      break;
    case 1:
      micro<A, 1, NV, TRANSPOSED>(g, at, i, j0, sums, ahead);
      break;
    default:
      break;
  }
}

template <class A, int NV, bool TRANSPOSED>
inline void column(const Gemm<A>& g, int64_t j0) {
  int64_t total = 0;
  for (int64_t s = 0; s < g.segment_count; ++s) total += g.segments[s].k;
  if (total == 0) {
    if (!g.add || g.finish != nullptr) rows<A, NV, TRANSPOSED>(g, {0, 0, g.b, 0}, j0, {g.add, true}, nullptr);
    return;
  }
  // Narrow rows leave room for more of them. A weight's gradient sums pixels, which PyTorch adds up in shorter chains.
  constexpr int64_t depth = TRANSPOSED ? 48 : (NV <= kVectors / 2 ? 192 : kDepth);
  const int64_t blocks = (total + depth - 1) / depth, even = ((total + blocks - 1) / blocks + 15) / 16 * 16;
  constexpr int64_t most = NV * VectorOf<A>::lanes;
  const int64_t cols = g.n - j0 < most ? g.n - j0 : most;
  bool add = g.add;
  Depth<A> at = {0, 0, g.b, 0};
  for (int64_t done = 0; done < total; done += even, add = true) {
    at.count = total - done < even ? total - done : even;
    Depth<A> next = at;
    parts(g, next, [](const Segment<A>&, int64_t, const A*, int64_t) {});
    const int64_t left = total - done - at.count;
    if (!g.far) {
      rows<A, NV, TRANSPOSED>(g, at, j0, {add, left == 0}, g.ahead);
    } else {
      // What is wanted soonest: of a long column the rows of b below these, and only at its end what the caller says.
      Ahead ahead = g.ahead == nullptr ? Ahead{} : *g.ahead;
      if (left > 0) {
        const A* b = g.segments[next.segment].b;
        if (next.offset > 0 || b == nullptr) b = next.b;
        ahead = Ahead::of<const A>({b + j0, g.ldb}, left, cols);
      }
      ahead.rows = ahead.rows < even ? ahead.rows : even;
      ahead.pace = ahead.rows * ahead.lines / (g.m * at.count * static_cast<int64_t>(sizeof(A)) / 64 + 1) + 1;
      rows<A, NV, TRANSPOSED>(g, at, j0, {add, left == 0}, &ahead);
    }
    at = next;
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
