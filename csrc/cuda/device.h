// What the kernels share: vectors of values in memory, conversions, the activations, sums over a block.
//
// Kernel bodies include this and nothing else of CUDA, torch or Python. Where nvcc does not compile them, the tests'
// cuda_host.h stands in for CUDA, and shared memory is checked for races there; hence the macros that declare it.

#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DLA_SHARED(T, name, n) __shared__ T name[n]
#define DLA_DYNAMIC_SHARED(T, name)                  \
  extern __shared__ __align__(16) char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
#define DLA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>((stream).handle)>>>(__VA_ARGS__)
#else
#include "cuda_host.h"
#endif

#include "launch.h"

namespace dla_fast::cuda {

using half = __half;
using bfloat16 = __nv_bfloat16;

template <class T>
struct Traits {
  using Acc = float;
};
template <>
struct Traits<double> {
  using Acc = double;
};
// What sums of T are kept in.
template <class T>
using acc_t = typename Traits<T>::Acc;

__device__ __forceinline__ float widen(float v) {
  return v;
}
__device__ __forceinline__ double widen(double v) {
  return v;
}
__device__ __forceinline__ float widen(half v) {
  return __half2float(v);
}
__device__ __forceinline__ float widen(bfloat16 v) {
  return __bfloat162float(v);
}

template <class T>
__device__ __forceinline__ T narrow(acc_t<T> v) {
  if constexpr (sizeof(T) >= 4) {
    return v;
  } else if constexpr (__is_same(T, half)) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// V values that are read and written at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

template <int BYTES>
struct Words {
  using type = uint16_t;
};
template <>
struct Words<4> {
  using type = uint32_t;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<16> {
  using type = uint4;
};

// As the vector types that the compiler knows: a structure's values it may read and write one by one.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  using W = typename Words<(sizeof(T) * V < 16 ? sizeof(T) * V : 16)>::type;
  constexpr int parts = sizeof(T) * V / sizeof(W);
  W words[parts];
#pragma unroll
  for (int i = 0; i < parts; ++i) words[i] = reinterpret_cast<const W*>(p)[i];
  Pack<T, V> pack;
  memcpy(&pack, words, sizeof(pack));
  return pack;
}

// V values that fit 16 bytes, or zeros where there are none.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_if(bool there, const T* p) {
  typename Words<sizeof(T) * V>::type words = {};
  if (there) words = *reinterpret_cast<const decltype(words)*>(p);
  Pack<T, V> pack;
  memcpy(&pack, &words, sizeof(pack));
  return pack;
}

template <class W>
__device__ __forceinline__ void store_words(W* p, const W& words) {
  *p = words;
}

#if defined(__CUDA_ARCH__)
// Written out: where a store stands behind branches, the compiler takes it apart.
template <>
__device__ __forceinline__ void store_words(uint4* p, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w));
}
#endif

template <int V, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  using W = typename Words<(sizeof(T) * V < 16 ? sizeof(T) * V : 16)>::type;
  constexpr int parts = sizeof(T) * V / sizeof(W);
  W words[parts];
  memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (int i = 0; i < parts; ++i) store_words(reinterpret_cast<W*>(p) + i, words[i]);
}

// All values of a vector: of those of 16 bits two share a word, and one instruction takes both or each.
template <class T, int V>
__device__ __forceinline__ void widen_all(const Pack<T, V>& pack, acc_t<T> (&out)[V]) {
  if constexpr (__is_same(T, bfloat16) && V % 2 == 0) {
    uint32_t words[V / 2];
    memcpy(words, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      // A bfloat16 is the upper half of a float.
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = widen(pack.v[v]);
  }
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> narrow_all(const acc_t<T> (&values)[V]) {
  Pack<T, V> pack;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    uint32_t words[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if constexpr (__is_same(T, half)) {
        const auto pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
        memcpy(&words[i], &pair, 4);
      } else {
        const auto pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        memcpy(&words[i], &pair, 4);
      }
    }
    memcpy(&pack, words, sizeof(pack));
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) pack.v[v] = narrow<T>(values[v]);
  }
  return pack;
}

// Values of a shared array from an index that is a multiple of V.
template <int V, class S>
__device__ __forceinline__ auto load_shared(S& shared, int index) {
#if defined(__CUDACC__)
  return load<V>(&shared[index]);
#else
  return cuda_host::load<V, Pack>(shared, index);
#endif
}

template <class S, class A, int K>
__device__ __forceinline__ void read_values(const void* from, int64_t channel, A (&out)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) out[k] = static_cast<A>(widen(static_cast<const S*>(from)[channel + k]));
}

// K values of a per-channel vector, whatever its type; `otherwise` where there is none.
template <class A, int K>
__device__ __forceinline__ void read_values(const Vector& vector, int64_t channel, bool here, A otherwise,
                                            A (&out)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) out[k] = otherwise;
  if (vector.data == nullptr || !here) return;
  switch (vector.type) {
    case Type::kDouble:
      return read_values<double>(vector.data, channel, out);
    case Type::kFloat:
      return read_values<float>(vector.data, channel, out);
    case Type::kHalf:
      return read_values<half>(vector.data, channel, out);
    default:
      return read_values<bfloat16>(vector.data, channel, out);
  }
}

template <class A>
__device__ __forceinline__ A value_of(const Vector& vector, int64_t channel, A otherwise) {
  A out[1];
  read_values(vector, channel, true, otherwise, out);
  return out[0];
}

template <class A>
__device__ __forceinline__ void set_value(const MutableVector& vector, int64_t channel, A value) {
  switch (vector.type) {
    case Type::kDouble:
      static_cast<double*>(vector.data)[channel] = static_cast<double>(value);
      break;
    case Type::kFloat:
      static_cast<float*>(vector.data)[channel] = static_cast<float>(value);
      break;
    case Type::kHalf:
      static_cast<half*>(vector.data)[channel] = narrow<half>(static_cast<float>(value));
      break;
    default:
      static_cast<bfloat16*>(vector.data)[channel] = narrow<bfloat16>(static_cast<float>(value));
  }
}

__device__ __forceinline__ float exponential(float v) {
  return expf(v);
}
__device__ __forceinline__ double exponential(double v) {
  return exp(v);
}
__device__ __forceinline__ float square_root(float v) {
  return sqrtf(v);
}
__device__ __forceinline__ double square_root(double v) {
  return sqrt(v);
}

// Comparisons are written so that NaN takes the branch that keeps it.
template <Act ACT, class A>
__device__ __forceinline__ A activate(A slope, A u) {
  if constexpr (ACT == Act::kRelu) {
    return u < A(0) ? A(0) : u;
  } else if constexpr (ACT == Act::kLeakyRelu) {
    return u > A(0) ? u : u * slope;
  } else if constexpr (ACT == Act::kSilu) {
    return u / (A(1) + exponential(-u));
  } else if constexpr (ACT == Act::kHardswish) {
    const A t = u + A(3);
    const A low = t < A(0) ? A(0) : t;
    return u * (low > A(6) ? A(6) : low) / A(6);
  } else {
    return u;
  }
}

template <Act ACT, class A>
__device__ __forceinline__ A activate_backward(A slope, A u, A dy) {
  if constexpr (ACT == Act::kRelu) {
    return u <= A(0) ? A(0) : dy;
  } else if constexpr (ACT == Act::kLeakyRelu) {
    return u > A(0) ? dy : dy * slope;
  } else if constexpr (ACT == Act::kSilu) {
    const A s = A(1) / (A(1) + exponential(-u));
    return dy * (s * (A(1) + u * (A(1) - s)));
  } else if constexpr (ACT == Act::kHardswish) {
    return u < A(-3) ? A(0) : u > A(3) ? dy : dy * (u / A(3) + A(0.5));
  } else {
    return dy;
  }
}

template <Act ACT>
struct OfAct {
  static constexpr Act value = ACT;
};

// Calls f(OfAct<act>): on the host to choose a kernel, in a kernel where that is not worth one for each.
template <class F>
__host__ __device__ __forceinline__ auto with_act(Act act, const F& f) {
  switch (act) {
    case Act::kRelu:
      return f(OfAct<Act::kRelu>{});
    case Act::kLeakyRelu:
      return f(OfAct<Act::kLeakyRelu>{});
    case Act::kSilu:
      return f(OfAct<Act::kSilu>{});
    case Act::kHardswish:
      return f(OfAct<Act::kHardswish>{});
    default:
      return f(OfAct<Act::kIdentity>{});
  }
}

template <bool WITH>
struct With {
  static constexpr bool value = WITH;
};

// Calls f(With<...>): a loop without the addend keeps more vectors of the others in the same registers.
template <class F>
__device__ __forceinline__ void with_or_without(const void* addend, const F& f) {
  if (addend != nullptr) return f(With<true>{});
  return f(With<false>{});
}

constexpr int kThreads = 256;

// What a kernel is compiled for, as launch.h's architecture(): the same code takes a few registers more for others than
// Hopper, which launch bounds then leave it.
#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__ / 10;
#else
constexpr int kArchitecture = 90;
#endif

// Adds up shared[k * kThreads + thread] for each k < K over threads `stride` apart: `slots` of them, a power of two, of
// which the caller is number `slot`. The sums are then where slot 0 has its values. In a fixed order; the values must
// be there for all to see, and all threads of the block must call it.
template <int K, class S>
__device__ __forceinline__ void add_over_slots(S& shared, int slot, int slots, int stride) {
  const int thread = threadIdx.x;
  for (int further = slots / 2; further > 0; further /= 2) {
    if (slot < further) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        shared[k * kThreads + thread] =
            shared[k * kThreads + thread] + shared[k * kThreads + thread + further * stride];
      }
    }
    __syncthreads();
  }
}

// Sums of K values over the threads of a block that share a lane: thread = slot * lanes + lane. Every thread gets its
// lane's sums.
template <int K>
__device__ __forceinline__ void sum_over_slots(double (&values)[K], int lanes) {
  DLA_SHARED(double, sums, kThreads* K);
  const int thread = threadIdx.x;
#pragma unroll
  for (int k = 0; k < K; ++k) sums[k * kThreads + thread] = values[k];
  __syncthreads();
  add_over_slots<K>(sums, thread / lanes, kThreads / lanes, lanes);
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = sums[k * kThreads + thread % lanes];
  __syncthreads();
}

}  // namespace dla_fast::cuda
