// The transforms of Winograd's minimal filtering F(2x2, 3x3) (float_gemm.h), applied to vectors of channels.
// Included by float_gemm_isa_inl.h, inside a namespace and under one instruction set.

// One step of each transform, along one axis of a tile.
template <class V>
inline void input_step(const V (&d)[4], V (&t)[4]) {
  t[0] = d[0] - d[2];
  t[1] = d[1] + d[2];
  t[2] = d[2] - d[1];
  t[3] = d[1] - d[3];
}

template <class V>
inline void output_step(const V (&m)[4], V (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

template <class V>
inline void gradient_step(const V (&y)[2], V (&t)[4]) {
  t[0] = y[0];
  t[1] = y[0] + y[1];
  t[2] = y[0] - y[1];
  t[3] = -y[1];
}

template <class A, class V>
inline void weight_step(const V (&w)[3], V (&u)[4]) {
  const V ends = (w[0] + w[2]) * A(0.5), middle = w[1] * A(0.5);
  u[0] = w[0];
  u[1] = ends + middle;
  u[2] = ends - middle;
  u[3] = w[2];
}

template <class A, class V>
inline void weight_gradient_step(const V (&u)[4], V (&w)[3]) {
  const V sum = (u[1] + u[2]) * A(0.5);
  w[0] = u[0] + sum;
  w[1] = (u[1] - u[2]) * A(0.5);
  w[2] = sum + u[3];
}

// An in x in block to out x out, one axis after the other: STEP(values, results).
#define DLA_BOTH_AXES(STEP, IN, OUT, from, to)                                  \
  {                                                                             \
    V half[OUT][IN];                                                            \
    _Pragma("GCC unroll 8") for (int j = 0; j < IN; ++j) {                      \
      V column[IN], result[OUT];                                                \
      for (int i = 0; i < IN; ++i) column[i] = from[i][j];                      \
      STEP(column, result);                                                     \
      for (int i = 0; i < OUT; ++i) half[i][j] = result[i];                     \
    }                                                                           \
    _Pragma("GCC unroll 8") for (int i = 0; i < OUT; ++i) STEP(half[i], to[i]); \
  }

template <class A>
void winograd_input(const WinogradTiles<A>& t, const A* patch) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  const int64_t row = (2 * t.cols + 2) * t.channels;
  for (int64_t tile = 0; tile < t.rows * t.cols; ++tile) {
    const A* from = patch + tile / t.cols * 2 * row + tile % t.cols * 2 * t.channels;
    A* to = t.data + tile * t.ld;
    for (int64_t c = 0; c < t.channels; c += lanes) {
      const int64_t n = t.channels - c;
      V d[4][4], v[4][4];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) d[k / 4][k % 4] = load_lanes(from + k / 4 * row + k % 4 * t.channels + c, n);
      DLA_BOTH_AXES(input_step, 4, 4, d, v)
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) store_lanes(to + k * t.plane + c, v[k / 4][k % 4], n);
    }
  }
}

template <class A>
void winograd_gradient(const WinogradTiles<A>& t, const A* dy) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  const int64_t row = 2 * t.cols * t.channels;
  for (int64_t tile = 0; tile < t.rows * t.cols; ++tile) {
    const A* from = dy + tile / t.cols * 2 * row + tile % t.cols * 2 * t.channels;
    A* to = t.data + tile * t.ld;
    for (int64_t c = 0; c < t.channels; c += lanes) {
      const int64_t n = t.channels - c;
      V d[2][2], v[4][4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) d[k / 2][k % 2] = load_lanes(from + k / 2 * row + k % 2 * t.channels + c, n);
      DLA_BOTH_AXES(gradient_step, 2, 4, d, v)
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) store_lanes(to + k * t.plane + c, v[k / 4][k % 4], n);
    }
  }
}

template <class A>
void winograd_output(const WinogradTiles<A>& t, A* z) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  const int64_t row = 2 * t.cols * t.ld;
  for (int64_t tile = 0; tile < t.rows * t.cols; ++tile) {
    const A* from = t.data + tile * t.ld;
    A* to = z + tile / t.cols * 2 * row + tile % t.cols * 2 * t.ld;
    for (int64_t c = 0; c < t.channels; c += lanes) {
      const int64_t n = t.channels - c;
      V m[4][4], y[2][2];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) m[k / 4][k % 4] = load_lanes(from + k * t.plane + c, n);
      DLA_BOTH_AXES(output_step, 4, 2, m, y)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) store_lanes(to + k / 2 * row + k % 2 * t.ld + c, y[k / 2][k % 2], n);
    }
  }
}

// n: so many of a vector's lanes.
template <class A>
inline __attribute__((always_inline)) void weight_lanes(const A* taps, int64_t plane, A* u, int64_t u_plane,
                                                        int64_t n) {
  using V = typename VectorOf<A>::type;
  V w[3][3], v[4][4];
#pragma GCC unroll 16
  for (int k = 0; k < 9; ++k) w[k / 3][k % 3] = load_lanes(taps + k * plane, n);
  const auto step = [](const V(&from)[3], V(&to)[4]) { weight_step<A>(from, to); };
  DLA_BOTH_AXES(step, 3, 4, w, v)
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) store_lanes(u + k * u_plane, v[k / 4][k % 4], n);
}

template <class A>
void winograd_weight(const A* taps, int64_t plane, bool flipped, int64_t channels, A* u, int64_t u_plane) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  if (flipped) {
    taps += 8 * plane;
    plane = -plane;
  }
  int64_t c = 0;
  // All lanes is a constant: nothing is asked about each value then.
  for (; c + lanes <= channels; c += lanes) weight_lanes<A>(taps + c, plane, u + c, u_plane, lanes);
  if (c < channels) weight_lanes<A>(taps + c, plane, u + c, u_plane, channels - c);
}

template <class A>
void winograd_weight_gradient(const A* du, int64_t du_plane, int64_t channels, A* taps, int64_t plane) {
  using V = typename VectorOf<A>::type;
  constexpr int64_t lanes = VectorOf<A>::lanes;
  for (int64_t c = 0; c < channels; c += lanes) {
    const int64_t n = channels - c;
    V u[4][4], w[3][3];
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) u[k / 4][k % 4] = load_lanes(du + k * du_plane + c, n);
    const auto step = [](const V(&from)[4], V(&to)[3]) { weight_gradient_step<A>(from, to); };
    DLA_BOTH_AXES(step, 4, 3, u, w)
#pragma GCC unroll 16
    for (int k = 0; k < 9; ++k) store_lanes(taps + k * plane + c, w[k / 3][k % 3], n);
  }
}

#undef DLA_BOTH_AXES
