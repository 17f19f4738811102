// The normalisation tail y = act((z - mean) * gamma / sigma + beta + residual): moments, tail, its backward in two.
//
// Traffic in values of z, R = 1 with a residual and else 0: moments 1; tail 2 + R; reduce 2 + R; apply 3 + 2R. About
// ten flops a value, so each pass is bound by memory: every value is read and written once, 16 bytes at a time where
// the map allows it, several loads in flight per thread.
//
// All walk a map in the same way. A vector is V values in a row in memory. channels_last: V channels of one pixel; a
// block takes `lanes` vectors side by side, and the pixels of a group with the rest of its threads, so that a thread
// meets the same V channels all along. Contiguous: V pixels of a channel; a block takes one channel.

#pragma once

#include "device.h"

namespace dla_fast::cuda {

// The map and its cut into blocks. `count` vectors per channel (V of them at a time if channels_last).
struct Walk {
  int64_t channels, pixels, count, size;
  int lanes;
};

template <class T, int V, bool CL>
struct Position {
  // How many channels a vector belongs to.
  static constexpr int K = CL ? V : 1;
  int64_t channel, first, last;
  int step;
  bool here;
  const Walk& walk;

  __device__ __forceinline__ explicit Position(const Walk& w) : walk(w) {
    const int lane = threadIdx.x % w.lanes, slot = threadIdx.x / w.lanes;
    step = kThreads / w.lanes;
    channel = CL ? (static_cast<int64_t>(blockIdx.x) * w.lanes + lane) * V : blockIdx.x;
    here = channel < w.channels;
    first = blockIdx.y * w.size + slot;
    last = static_cast<int64_t>(blockIdx.y + 1) * w.size;
    last = !here ? first : last < w.count ? last : w.count;
  }

  __device__ __forceinline__ int64_t offset(int64_t i) const {
    if constexpr (CL) return i * walk.channels + channel;
    const int64_t vectors = walk.pixels / V;
    int64_t image, at;
    // A division of 64 bits costs more than a load.
    if (walk.count < (int64_t(1) << 31)) {
      image = static_cast<uint32_t>(i) / static_cast<uint32_t>(vectors);
      at = static_cast<uint32_t>(i) - static_cast<uint32_t>(image) * static_cast<uint32_t>(vectors);
    } else {
      image = static_cast<int64_t>(static_cast<double>(i) / static_cast<double>(vectors));
      at = i - image * vectors;
      // The quotient is rounded: one too many or too few at most.
      const int64_t off = at < 0 ? -1 : at >= vectors ? 1 : 0;
      image += off;
      at -= off * vectors;
    }
    return (image * walk.channels + channel) * walk.pixels + at * V;
  }

  // Calls f(vector number) for every vector of this thread, U at a time so that their loads overlap: `fetch(u, offset)`
  // for each, then `use(u, offset)` for each.
  template <int U, class Fetch, class Use>
  __device__ __forceinline__ void each(const Fetch& fetch, const Use& use) const {
    int64_t i = first;
    for (; i + (U - 1) * step < last; i += U * step) {
      int64_t at[U];
#pragma unroll
      for (int u = 0; u < U; ++u) fetch(u, at[u] = offset(i + u * step));
#pragma unroll
      for (int u = 0; u < U; ++u) use(u, at[u]);
    }
    for (; i < last; i += step) {
      const int64_t at = offset(i);
      fetch(0, at);
      use(0, at);
    }
  }
};

// Kernels know the activation where it is ReLU or none, as mostly; the others ask.

template <Act ACT, class A>
__device__ __forceinline__ A activate_as(Act act, A slope, A u) {
  if constexpr (ACT != Act::kAsk) return activate<ACT>(slope, u);
  return with_act(act, [&](auto of) { return activate<of.value>(slope, u); });
}

template <Act ACT, class A>
__device__ __forceinline__ A activate_backward_as(Act act, A slope, A u, A dy) {
  if constexpr (ACT != Act::kAsk) return activate_backward<ACT>(slope, u, dy);
  return with_act(act, [&](auto of) { return activate_backward<of.value>(slope, u, dy); });
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
      rstd[k] = A(1) / square_root(var[k] + static_cast<A>(norm.eps));
      scale[k] *= rstd[k];
    }
  }
};

template <class T, int V, bool CL>
__global__ void __launch_bounds__(kThreads, 2) moments_kernel(Walk walk, const T* z, double* partial) {
  using A = acc_t<T>;
  constexpr int U = 4;
  const Position<T, V, CL> here(walk);
  constexpr int K = Position<T, V, CL>::K;
  // Sums are taken around the thread's first value: any near the others would do.
  A shift[K] = {}, rest[K] = {}, squares[K] = {};
  if (here.first < here.last) {
    const auto first = load<V>(z + here.offset(here.first));
#pragma unroll
    for (int k = 0; k < K; ++k) shift[k] = widen(first.v[k]);
  }
  Pack<T, V> in[U];
  here.template each<U>([&](int u, int64_t at) { in[u] = load<V>(z + at); },
                        [&](int u, int64_t) {
#pragma unroll
                          for (int v = 0; v < V; ++v) {
                            const int k = CL ? v : 0;
                            const A off = widen(in[u].v[v]) - shift[k];
                            rest[k] += off;
                            squares[k] += off * off;
                          }
                        });
  const int64_t taken = here.first < here.last ? (here.last - here.first - 1) / here.step + 1 : 0;
  const double n = static_cast<double>(taken * (CL ? 1 : V));
  double mean[K], sums[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    mean[k] = n > 0 ? shift[k] + static_cast<double>(rest[k]) / n : 0.0;
    sums[k] = n * mean[k];
  }
  sum_over_slots(sums, walk.lanes);
  const int64_t begin = blockIdx.y * walk.size;
  const int64_t vectors = begin + walk.size < walk.count ? walk.size : walk.count - begin;
  const double group = static_cast<double>(vectors * (CL ? 1 : V));
  double m2[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[k] /= group;
    const double off = mean[k] - sums[k];
    m2[k] = n > 0 ? squares[k] - static_cast<double>(rest[k]) * rest[k] / n + n * off * off : 0.0;
  }
  sum_over_slots(m2, walk.lanes);
  if (here.here && static_cast<int>(threadIdx.x) < walk.lanes) {
    double* to = partial + blockIdx.y * walk.channels + here.channel;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      to[k] = sums[k];
      to[gridDim.y * walk.channels + k] = m2[k];
    }
  }
}

// Channels that a block of the finalising kernels takes; its other threads share the groups.
constexpr int kLanes = 32;

// Merges the groups' moments by the formula of Chan, Golub and LeVeque (1979), in double.
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    finalise_kernel(const double* partial, int64_t channels, int64_t groups, int64_t size, int64_t total, A* mean,
                    A* var, MutableVector running_mean, MutableVector running_var, double momentum) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  const int slot = threadIdx.x / kLanes;
  const int64_t plane = groups * channels;
  double sum[1] = {0.0};
  for (int64_t g = slot; c < channels && g < groups; g += kThreads / kLanes) {
    const double n = static_cast<double>(g + 1 < groups ? size : total - g * size);
    sum[0] += n * partial[g * channels + c];
  }
  sum_over_slots(sum, kLanes);
  const double mu = sum[0] / static_cast<double>(total);
  sum[0] = 0.0;
  for (int64_t g = slot; c < channels && g < groups; g += kThreads / kLanes) {
    const double n = static_cast<double>(g + 1 < groups ? size : total - g * size);
    const double off = partial[g * channels + c] - mu;
    sum[0] += partial[plane + g * channels + c] + n * off * off;
  }
  sum_over_slots(sum, kLanes);
  if (slot != 0 || c >= channels) return;
  double sigma2 = sum[0] / static_cast<double>(total);
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
__global__ void __launch_bounds__(kThreads, 2) tail_kernel(Walk walk, Norm norm, const T* z, const T* residual, T* y) {
  using A = acc_t<T>;
  constexpr int U = 2;
  const Position<T, V, CL> here(walk);
  const NormOf<A, Position<T, V, CL>::K> of(norm, here.channel, here.here);
  Pack<T, V> in[U], skip[U];
  here.template each<U>(
      [&](int u, int64_t at) {
        in[u] = load<V>(z + at);
        if (residual != nullptr) skip[u] = load<V>(residual + at);
      },
      [&](int u, int64_t at) {
        Pack<T, V> out;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int k = CL ? v : 0;
          A value = (widen(in[u].v[v]) - of.mean[k]) * of.scale[k] + of.beta[k];
          if (residual != nullptr) value += widen(skip[u].v[v]);
          out.v[v] = narrow<T>(activate_as<ACT>(norm.act, of.slope, value));
        }
        store<V>(y + at, out);
      });
}

// g and x_hat of one value.
template <Act ACT, class A, int K>
__device__ __forceinline__ void pre_activation_gradient(const Norm& norm, const NormOf<A, K>& of, int k, A z, A skip,
                                                        A dy, A& g, A& x_hat) {
  const A off = z - of.mean[k];
  x_hat = off * of.rstd[k];
  const A u = off * of.scale[k] + of.beta[k] + skip;
  g = activate_backward_as<ACT>(norm.act, of.slope, u, dy);
}

template <class T, int V, bool CL, Act ACT>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(Walk walk, Norm norm, const T* dy, const T* z, const T* residual, double* partial) {
  using A = acc_t<T>;
  constexpr int U = 2, K = Position<T, V, CL>::K;
  const Position<T, V, CL> here(walk);
  const NormOf<A, K> of(norm, here.channel, here.here);
  A first[K] = {}, second[K] = {};
  Pack<T, V> in[U], skip[U], grad[U];
  here.template each<U>(
      [&](int u, int64_t at) {
        in[u] = load<V>(z + at);
        grad[u] = load<V>(dy + at);
        if (residual != nullptr) skip[u] = load<V>(residual + at);
      },
      [&](int u, int64_t) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int k = CL ? v : 0;
          A g, x_hat;
          pre_activation_gradient<ACT>(norm, of, k, A(widen(in[u].v[v])),
                                       residual != nullptr ? A(widen(skip[u].v[v])) : A(0), A(widen(grad[u].v[v])), g,
                                       x_hat);
          first[k] += g;
          second[k] += g * x_hat;
        }
      });
  double sums[2][K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[0][k] = first[k];
    sums[1][k] = second[k];
  }
  sum_over_slots(sums[0], walk.lanes);
  sum_over_slots(sums[1], walk.lanes);
  if (here.here && static_cast<int>(threadIdx.x) < walk.lanes) {
    double* to = partial + blockIdx.y * walk.channels + here.channel;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      to[k] = sums[0][k];
      to[gridDim.y * walk.channels + k] = sums[1][k];
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_sum_kernel(const double* partial, int64_t channels, int64_t groups, A* sum_dy, A* sum_dy_xhat) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  const int slot = threadIdx.x / kLanes;
  double sums[2] = {0.0, 0.0};
  for (int64_t g = slot; c < channels && g < groups; g += kThreads / kLanes) {
    sums[0] += partial[g * channels + c];
    sums[1] += partial[(groups + g) * channels + c];
  }
  sum_over_slots(sums, kLanes);
  if (slot != 0 || c >= channels) return;
  sum_dy[c] = static_cast<A>(sums[0]);
  sum_dy_xhat[c] = static_cast<A>(sums[1]);
}

template <class T, int V, bool CL, Act ACT>
__global__ void __launch_bounds__(kThreads, 2)
    apply_kernel(Walk walk, Norm norm, const T* dy, const T* z, const T* residual, Vector sum_dy, Vector sum_dy_xhat,
                 double inverse_count, T* dz, T* du) {
  using A = acc_t<T>;
  constexpr int U = 2, K = Position<T, V, CL>::K;
  const Position<T, V, CL> here(walk);
  const NormOf<A, K> of(norm, here.channel, here.here);
  // The batch's means of g and g * x_hat; none with frozen statistics.
  A m0[K], m1[K];
  read_values(sum_dy, here.channel, here.here, A(0), m0);
  read_values(sum_dy_xhat, here.channel, here.here, A(0), m1);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    m0[k] = static_cast<A>(m0[k] * inverse_count);
    m1[k] = static_cast<A>(m1[k] * inverse_count);
  }
  Pack<T, V> in[U], skip[U], grad[U];
  here.template each<U>(
      [&](int u, int64_t at) {
        in[u] = load<V>(z + at);
        grad[u] = load<V>(dy + at);
        if (residual != nullptr) skip[u] = load<V>(residual + at);
      },
      [&](int u, int64_t at) {
        Pack<T, V> out, passed;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int k = CL ? v : 0;
          A g, x_hat;
          pre_activation_gradient<ACT>(norm, of, k, A(widen(in[u].v[v])),
                                       residual != nullptr ? A(widen(skip[u].v[v])) : A(0), A(widen(grad[u].v[v])), g,
                                       x_hat);
          out.v[v] = narrow<T>((g - m0[k] - x_hat * m1[k]) * of.scale[k]);
          passed.v[v] = narrow<T>(g);
        }
        store<V>(dz + at, out);
        if (du != nullptr) store<V>(du + at, passed);
      });
}

}  // namespace dla_fast::cuda
