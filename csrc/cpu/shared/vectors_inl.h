// Vectors of the instruction set DLA_VECTOR_BYTES belongs to, inside a namespace and under that instruction set.

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(DLA_VECTOR_BYTES)));
  typedef A unaligned __attribute__((vector_size(DLA_VECTOR_BYTES), aligned(sizeof(A))));
  static constexpr int lanes = DLA_VECTOR_BYTES / sizeof(A);
};

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
