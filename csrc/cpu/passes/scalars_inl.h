// Storage conversions and activations, one value or one row at a time.
// Included by tile_kernels_inl.h, inside a namespace and under one instruction set.

inline float widen(c10::BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.x) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof(out));
  return out;
}

inline void narrow(float v, c10::BFloat16& out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.x = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}

inline void widen_row(const c10::BFloat16* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
}

inline void narrow_row(const float* src, c10::BFloat16* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) narrow(src[i], dst[i]);
}

#if DLA_VECTOR_BYTES >= 32
inline void widen_row(const c10::Half* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
  for (; i < n; ++i) dst[i] = _cvtsh_ss(src[i].x);
}

inline void narrow_row(const float* src, c10::Half* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), h);
  }
  for (; i < n; ++i) dst[i].x = _cvtss_sh(src[i], _MM_FROUND_TO_NEAREST_INT);
}
#else
inline void widen_row(const c10::Half* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

inline void narrow_row(const float* src, c10::Half* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = c10::Half(src[i]);
}
#endif

// n <= kChunk values as A: in place where they are A already, else widened into buffer.
template <class T, class A>
inline const A* read(const T* p, A* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, A>) {
    return p;
  } else {
    widen_row(p, buffer, n);
    return buffer;
  }
}

// exp by range reduction and a degree-6 polynomial (Cephes' coefficients), written so that it vectorises; NaN passes,
// and what is infinite or nearly so is infinite.
inline float exp_of(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.8f ? 88.8f : x;        // the power of two is infinite then
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const float shifted = x * 1.44269504088896341f + magic;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t power = (bits + 127u) << 23;
  float scale;
  __builtin_memcpy(&scale, &power, sizeof(scale));
  return p * scale;
}

inline double exp_of(double x) {
  return __builtin_exp(x);
}

template <class A>
inline A sigmoid(A x) {
  return A(1) / (A(1) + exp_of(-x));
}

// Comparisons are written so that NaN takes the branch that keeps it.
template <Act ACT, class A>
inline A forward_of(A u, A slope) {
  if constexpr (ACT == Act::relu) return u < A(0) ? A(0) : u;
  if constexpr (ACT == Act::leaky_relu) return u > A(0) ? u : u * slope;
  if constexpr (ACT == Act::silu) return u * sigmoid(u);
  if constexpr (ACT == Act::hardswish) {
    const A t = u + A(3);
    const A low = t < A(0) ? A(0) : t;
    return u * (low > A(6) ? A(6) : low) / A(6);
  }
  return u;
}

template <Act ACT, class A>
inline A backward_of(A u, A dy, A slope) {
  if constexpr (ACT == Act::relu) return u <= A(0) ? A(0) : dy;
  if constexpr (ACT == Act::leaky_relu) return u > A(0) ? dy : dy * slope;
  if constexpr (ACT == Act::silu) {
    const A s = sigmoid(u);
    return dy * (s * (A(1) + u * (A(1) - s)));
  }
  if constexpr (ACT == Act::hardswish) {
    const A inside = dy * (u / A(3) + A(0.5));
    return u < A(-3) ? A(0) : (u > A(3) ? dy : inside);
  }
  return dy;
}
