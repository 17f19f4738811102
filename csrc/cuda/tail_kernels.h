// The normalisation tail y = act((z - mean) * gamma / sigma + beta + residual): moments, tail, its backward in two.
//
// Traffic in values of z, R = 1 with a residual and else 0: moments 1; tail 2 + R; reduce 2 + R; apply 3 + 2R. About
// ten flops a value, so each pass is bound by memory: every value is read and written once, 16 bytes at a time where
// the map allows it, several loads in flight per thread.

#pragma once

#include "partial_sums.h"
#include "walk.h"

namespace dla_fast::cuda {

// Kernels know the activation where it is ReLU or none, as mostly; the others ask, once a vector.

template <Act ACT, class F>
__device__ __forceinline__ void with_act_as(Act act, const F& f) {
  if constexpr (ACT == Act::kAsk) {
    with_act(act, f);
  } else {
    f(OfAct<ACT>{});
  }
}

template <class A>
__device__ __forceinline__ A inverse_sigma(const Norm& norm, A var) {
  return A(1) / square_root(var + static_cast<A>(norm.eps));
}

// The norm of K channels in registers.
template <class A, int K>
struct NormOf {
  A mean[K], rstd[K], scale[K], beta[K], slope;

  __device__ __forceinline__ NormOf(const Norm& norm, int64_t channel, bool here) : slope(static_cast<A>(norm.slope)) {
    A var[K];
    read_values(norm.mean, channel, here, A(0), mean);
    read_values(norm.var, channel, here, A(1), var);
    read_values(norm.gamma, channel, here, A(1), scale);
    read_values(norm.beta, channel, here, A(0), beta);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      rstd[k] = inverse_sigma(norm, var[k]);
      scale[k] *= rstd[k];
    }
  }
};

// What sums are taken around has to be finite: what an infinity adds up to is infinite, less itself it is NaN.
template <class A>
__device__ __forceinline__ A finite_or_zero(A v) {
  return v - v == A(0) ? v : A(0);
}

template <class T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, resident(Act::kIdentity))
    moments_kernel(Walk walk, const T* z, double* partial) {
  using A = acc_t<T>;
  constexpr int U = 4;
  Position<T, V, CL> here(walk);
  constexpr int K = Position<T, V, CL>::K, SUMS = Position<T, V, CL>::SUMS;
  DLA_SHARED(A, origins, 32 * K);
  // Sums are taken around the thread's first value: any near the others would do.
  A shift[K] = {}, rest[SUMS] = {}, squares[SUMS] = {};
  const double n = here.left * (CL ? 1.0 : V);
  if (here.left > 0) {
    const auto first = load<V>(z + here.offset);
#pragma unroll
    for (int k = 0; k < K; ++k) shift[k] = finite_or_zero(widen(first.v[k]));
  }
  Pack<T, V> in[U];
  here.template each<U>([&](int u, int64_t at) { in[u] = load<V>(z + at); },
                        [&](int u, int64_t) {
                          A value[V];
                          widen_all(in[u], value);
#pragma unroll
                          for (int v = 0; v < V; ++v) {
                            const A off = value[v] - shift[CL ? v : 0];
                            rest[v % SUMS] += off;
                            squares[v % SUMS] += off * off;
                          }
                        });
  // Of the block they are sums around the first value of the first thread.
  const int lane = threadIdx.x % walk.lanes;
  if (static_cast<int>(threadIdx.x) < walk.lanes) {
#pragma unroll
    for (int k = 0; k < K; ++k) origins[lane * K + k] = shift[k];
  }
  __syncthreads();
  double first[K], second[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    double sum = 0.0, square = 0.0;
#pragma unroll
    for (int v = k; v < SUMS; v += K) {
      sum += rest[v];
      square += squares[v];
    }
    const double apart = static_cast<double>(shift[k]) - static_cast<double>(origins[lane * K + k]);
    first[k] = sum + n * apart;
    second[k] = square + apart * (2.0 * sum + n * apart);
  }
  sum_over_slots(first, walk.lanes);
  sum_over_slots(second, walk.lanes);
  if (here.here && static_cast<int>(threadIdx.x) < walk.lanes) {
    const int64_t begin = blockIdx.y * walk.size;
    const int64_t vectors = begin + walk.size < walk.count ? walk.size : walk.count - begin;
    const double inverse = 1.0 / static_cast<double>(vectors * (CL ? 1 : V));
    double* to = partial + blockIdx.y * walk.channels + here.channel;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      to[k] = shift[k] + first[k] * inverse;
      to[gridDim.y * walk.channels + k] = second[k] - first[k] * first[k] * inverse;
    }
  }
}

// Merges the groups' moments by the formula of Chan, Golub and LeVeque (1979), in double, around the first one's mean.
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    finalise_kernel(const double* partial, int64_t channels, int64_t groups, int64_t size, int64_t total, A* mean,
                    A* var, MutableVector running_mean, MutableVector running_var, double momentum) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  const int slot = threadIdx.x / kLanes;
  double sums[2] = {0.0, 0.0}, origin = 0.0;
  if (c < channels && groups > 0) {
    origin = finite_or_zero(partial[c]);
    const double whole = static_cast<double>(size), last = static_cast<double>(total - (groups - 1) * size);
    const auto add = [&](int64_t g, const double (&of)[2]) {
      const double n = g + 1 < groups ? whole : g < groups ? last : 0.0, off = of[0] - origin;
      sums[0] += n * off;
      sums[1] += of[1] + n * off * off;
    };
    each_group<2>(partial + c, channels, groups * channels, groups, slot, kThreads / kLanes, add);
  }
  sum_over_slots(sums, kLanes);
  if (slot != 0 || c >= channels) return;
  const double off = sums[0] / static_cast<double>(total), mu = origin + off;
  double sigma2 = sums[1] / static_cast<double>(total) - off * off;
  sigma2 = sigma2 < 0 ? 0.0 : sigma2;
  // What the caller sees is what the running statistics move towards, rounding included.
  mean[c] = static_cast<A>(mu);
  var[c] = static_cast<A>(sigma2);
  if (running_mean.data != nullptr) {
    const double before = value_of<double>({running_mean.data, running_mean.type}, c, 0.0);
    set_value(running_mean, c, (1 - momentum) * before + momentum * static_cast<double>(mean[c]));
  }
  if (running_var.data != nullptr) {
    const double before = value_of<double>({running_var.data, running_var.type}, c, 0.0);
    const double unbiased = static_cast<double>(var[c]) * (static_cast<double>(total) / static_cast<double>(total - 1));
    set_value(running_var, c, (1 - momentum) * before + momentum * unbiased);
  }
}

template <class T, int V, bool CL, Act ACT>
__global__ void __launch_bounds__(kThreads, resident(ACT))
    tail_kernel(Walk walk, Norm norm, const T* z, const T* residual, T* y) {
  using A = acc_t<T>;
  Position<T, V, CL> here(walk);
  const NormOf<A, Position<T, V, CL>::K> of(norm, here.channel, here.here);
  with_or_without(residual, [&](auto with) {
    constexpr int U = with.value ? 2 : 4;
    Pack<T, V> in[U], skip[U];
    here.template each<U>(
        [&](int u, int64_t at) {
          in[u] = load<V>(z + at);
          if constexpr (with.value) skip[u] = load<V>(residual + at);
        },
        [&](int u, int64_t at) {
          A value[V], add[V] = {};
          widen_all(in[u], value);
          if constexpr (with.value) widen_all(skip[u], add);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const int k = CL ? v : 0;
            value[v] = (value[v] - of.mean[k]) * of.scale[k] + of.beta[k];
            if constexpr (with.value) value[v] += add[v];
          }
          with_act_as<ACT>(norm.act, [&](auto act) {
#pragma unroll
            for (int v = 0; v < V; ++v) value[v] = activate<act.value>(of.slope, value[v]);
          });
          store<V>(y + at, narrow_all<T>(value));
        });
  });
}

// What both passes of the backward do with each of this thread's vectors: `use(offset, off, g)` with off = z - mean and
// g, the gradient before the activation.
template <Act ACT, class T, int V, bool CL, class A, int K, class Use>
__device__ __forceinline__ void each_gradient(Position<T, V, CL>& here, const Norm& norm, const NormOf<A, K>& of,
                                              const T* dy, const T* z, const T* residual, const Use& use) {
  with_or_without(residual, [&](auto with) {
    constexpr int U = with.value ? 1 : 2;
    Pack<T, V> in[U], skip[U], grad[U];
    here.template each<U>(
        [&](int u, int64_t at) {
          in[u] = load<V>(z + at);
          grad[u] = load<V>(dy + at);
          if constexpr (with.value) skip[u] = load<V>(residual + at);
        },
        [&](int u, int64_t at) {
          A off[V], g[V], before[V], add[V] = {};
          widen_all(in[u], off);
          widen_all(grad[u], g);
          if constexpr (with.value) widen_all(skip[u], add);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const int k = CL ? v : 0;
            off[v] -= of.mean[k];
            before[v] = off[v] * of.scale[k] + of.beta[k];
            if constexpr (with.value) before[v] += add[v];
          }
          with_act_as<ACT>(norm.act, [&](auto act) {
#pragma unroll
            for (int v = 0; v < V; ++v) g[v] = activate_backward<act.value>(of.slope, before[v], g[v]);
          });
          use(at, off, g);
        });
  });
}

template <class T, int V, bool CL, Act ACT>
__global__ void __launch_bounds__(kThreads, resident(ACT))
    reduce_kernel(Walk walk, Norm norm, const T* dy, const T* z, const T* residual, double* partial) {
  using A = acc_t<T>;
  constexpr int K = Position<T, V, CL>::K, SUMS = Position<T, V, CL>::SUMS;
  Position<T, V, CL> here(walk);
  // Of g and of g * (z - mean): what makes that g * x_hat is a factor of the sum.
  A first[SUMS] = {}, second[SUMS] = {};
  each_gradient<ACT>(here, norm, NormOf<A, K>(norm, here.channel, here.here), dy, z, residual,
                     [&](int64_t, const A(&off)[V], const A(&g)[V]) {
#pragma unroll
                       for (int v = 0; v < V; ++v) {
                         first[v % SUMS] += g[v];
                         second[v % SUMS] += g[v] * off[v];
                       }
                     });
  double sums[2][K] = {};
#pragma unroll
  for (int v = 0; v < SUMS; ++v) {
    sums[0][v % K] += first[v];
    sums[1][v % K] += second[v];
  }
  sum_over_slots(sums[0], walk.lanes);
  sum_over_slots(sums[1], walk.lanes);
  if (here.here && static_cast<int>(threadIdx.x) < walk.lanes) {
    double* to = partial + blockIdx.y * walk.channels + here.channel;
    A var[K];
    read_values(norm.var, here.channel, true, A(1), var);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      to[k] = sums[0][k];
      to[gridDim.y * walk.channels + k] = sums[1][k] * inverse_sigma(norm, var[k]);
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_sum_kernel(const double* partial, int64_t channels, int64_t groups, A* sum_dy, A* sum_dy_xhat) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  const int slot = threadIdx.x / kLanes;
  double sums[2] = {0.0, 0.0};
  if (c < channels) {
    const auto add = [&](int64_t, const double (&of)[2]) {
      sums[0] += of[0];
      sums[1] += of[1];
    };
    each_group<2>(partial + c, channels, groups * channels, groups, slot, kThreads / kLanes, add);
  }
  sum_over_slots(sums, kLanes);
  if (slot != 0 || c >= channels) return;
  sum_dy[c] = static_cast<A>(sums[0]);
  sum_dy_xhat[c] = static_cast<A>(sums[1]);
}

template <class T, int V, bool CL, Act ACT, bool BATCH>
__global__ void __launch_bounds__(kThreads, kArchitecture < 90 && CL && sizeof(T) == 2 ? 2 : resident(ACT))
    apply_kernel(Walk walk, Norm norm, const T* dy, const T* z, const T* residual, Vector sum_dy, Vector sum_dy_xhat,
                 double inverse_count, T* dz, T* du) {
  using A = acc_t<T>;
  constexpr int K = Position<T, V, CL>::K;
  Position<T, V, CL> here(walk);
  const NormOf<A, K> of(norm, here.channel, here.here);
  // dz = (g - m0 - x_hat * m1) * scale with the batch's means m0 of g and m1 of g * x_hat, as
  // scale * g - drop - tilt * (z - mean); scale * g where statistics are frozen: times a z that is not finite a zero is
  // NaN.
  A drop[K], tilt[K];
  read_values(sum_dy, here.channel, here.here, A(0), drop);
  read_values(sum_dy_xhat, here.channel, here.here, A(0), tilt);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    drop[k] = static_cast<A>(drop[k] * inverse_count) * of.scale[k];
    tilt[k] = static_cast<A>(tilt[k] * inverse_count) * of.rstd[k] * of.scale[k];
  }
  each_gradient<ACT>(here, norm, of, dy, z, residual, [&](int64_t at, const A(&off)[V], A(&g)[V]) {
    if (du != nullptr) store<V>(du + at, narrow_all<T>(g));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int k = CL ? v : 0;
      g[v] = BATCH ? g[v] * of.scale[k] - (off[v] * tilt[k] + drop[k]) : g[v] * of.scale[k];
    }
    store<V>(dz + at, narrow_all<T>(g));
  });
}

}  // namespace dla_fast::cuda
