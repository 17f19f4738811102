// Launches of the normalisation tail's kernels.

#include <algorithm>
#include <type_traits>

#include "dispatch.h"
#include "tail_kernels.h"

namespace dla_fast::cuda {
namespace {

// How many vectors side by side a block takes of a channels_last map: a warp's worth at most.
int lanes_of(const Map& map, int width) {
  return map.channels_last ? power_of_two(std::min<int64_t>(divide_up(map.channels, width), 32)) : 1;
}

int64_t blocks_along_x(const Map& map, int width) {
  return map.channels_last ? divide_up(map.channels, width * lanes_of(map, width)) : map.channels;
}

int64_t vectors_of(const Map& map, int width) {
  return map.channels_last ? map.per_channel() : map.per_channel() / width;
}

// Calls f(T, V, CL, ACT, walk, grid).
template <class F>
void with_walk(const Map& map, const Groups& groups, const char* kernel, Act act, const F& f) {
  const Walk walk{map.channels, map.pixels, vectors_of(map, groups.width), groups.size, lanes_of(map, groups.width)};
  const int64_t along_x = blocks_along_x(map, groups.width);
  if (groups.count == 0 || along_x == 0) return;
  const dim3 grid = grid_of(along_x, groups.count);
  with_type(map.type, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = 16 / sizeof(T);
    with_bool(map.channels_last, [&](auto cl) {
      if (groups.width == 1) {
        // For odd sizes: not worth a kernel for each activation.
        f(type, Int<1>{}, cl, OfAct<Act::kAsk>{}, walk, grid);
      } else if (act == Act::kRelu) {
        f(type, Int<kWide>{}, cl, OfAct<Act::kRelu>{}, walk, grid);
      } else if (act == Act::kIdentity) {
        f(type, Int<kWide>{}, cl, OfAct<Act::kIdentity>{}, walk, grid);
      } else {
        f(type, Int<kWide>{}, cl, OfAct<Act::kAsk>{}, walk, grid);
      }
    });
  });
  check_launch(kernel);
}

template <class F>
void with_accumulator(Type type, const F& f) {
  if (type == Type::kDouble) return f(Of<double>{});
  return f(Of<float>{});
}

}  // namespace

int architecture() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return 10 * major + minor;
}

int processors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

Groups groups_of(const Map& map, const Stream& stream, bool aligned, Act act) {
  const int wide = static_cast<int>(16 / size_of(map.type));
  const int64_t run = map.channels_last ? map.channels : map.pixels;
  const int width = aligned && run % wide == 0 ? wide : 1;
  const int64_t vectors = vectors_of(map, width);
  const int64_t slots = kThreads / lanes_of(map, width);
  const int64_t along_x = std::max<int64_t>(blocks_along_x(map, width), 1);
  // A thread that takes fewer than four vectors is not worth its sums.
  const int64_t most = divide_up(vectors, 4 * slots);
  const int64_t count = std::min(full_waves(along_x, static_cast<int64_t>(resident(act)) * stream.processors), most);
  if (count == 0) return {width, 0, 1};
  const int64_t size = divide_up(vectors, count);
  return {width, divide_up(vectors, size), size};
}

void moments(const Stream& stream, const Map& map, const Groups& groups, const void* z, double* partial, void* mean,
             void* var, MutableVector running_mean, MutableVector running_var, double momentum) {
  with_walk(map, groups, "moments_kernel", Act::kIdentity, [&](auto type, auto v, auto cl, auto, auto walk, auto grid) {
    using T = typename decltype(type)::type;
    DLA_LAUNCH((moments_kernel<T, v.value, cl.value>), grid, kThreads, 0, stream, walk, static_cast<const T*>(z),
               partial);
  });
  if (map.channels == 0) return;
  with_accumulator(map.type, [&](auto type) {
    using A = typename decltype(type)::type;
    const int64_t size = groups.size * (map.channels_last ? 1 : groups.width);
    DLA_LAUNCH((finalise_kernel<A>), grid_of(divide_up(map.channels, kLanes)), kThreads, 0, stream, partial,
               map.channels, groups.count, size, map.per_channel(), static_cast<A*>(mean), static_cast<A*>(var),
               running_mean, running_var, momentum);
  });
  check_launch("finalise_kernel");
}

void tail(const Stream& stream, const Map& map, const Groups& groups, const Norm& norm, const void* z,
          const void* residual, void* y) {
  with_walk(map, groups, "tail_kernel", norm.act, [&](auto type, auto v, auto cl, auto of_act, auto walk, auto grid) {
    using T = typename decltype(type)::type;
    DLA_LAUNCH((tail_kernel<T, v.value, cl.value, of_act.value>), grid, kThreads, 0, stream, walk, norm,
               static_cast<const T*>(z), static_cast<const T*>(residual), static_cast<T*>(y));
  });
}

void tail_backward_reduce(const Stream& stream, const Map& map, const Groups& groups, const Norm& norm, const void* dy,
                          const void* z, const void* residual, double* partial, void* sum_dy, void* sum_dy_xhat) {
  with_walk(map, groups, "reduce_kernel", norm.act, [&](auto type, auto v, auto cl, auto of_act, auto walk, auto grid) {
    using T = typename decltype(type)::type;
    DLA_LAUNCH((reduce_kernel<T, v.value, cl.value, of_act.value>), grid, kThreads, 0, stream, walk, norm,
               static_cast<const T*>(dy), static_cast<const T*>(z), static_cast<const T*>(residual), partial);
  });
  if (map.channels == 0) return;
  with_accumulator(map.type, [&](auto type) {
    using A = typename decltype(type)::type;
    DLA_LAUNCH((reduce_sum_kernel<A>), grid_of(divide_up(map.channels, kLanes)), kThreads, 0, stream, partial,
               map.channels, groups.count, static_cast<A*>(sum_dy), static_cast<A*>(sum_dy_xhat));
  });
  check_launch("reduce_sum_kernel");
}

void tail_backward_apply(const Stream& stream, const Map& map, const Groups& groups, const Norm& norm, const void* dy,
                         const void* z, const void* residual, Vector sum_dy, Vector sum_dy_xhat, double inverse_count,
                         void* dz, void* du) {
  with_walk(map, groups, "apply_kernel", norm.act, [&](auto type, auto v, auto cl, auto of_act, auto walk, auto grid) {
    using T = typename decltype(type)::type;
    const auto launch = [&](auto batch) {
      DLA_LAUNCH((apply_kernel<T, v.value, cl.value, of_act.value, batch.value>), grid, kThreads, 0, stream, walk, norm,
                 static_cast<const T*>(dy), static_cast<const T*>(z), static_cast<const T*>(residual), sum_dy,
                 sum_dy_xhat, inverse_count, static_cast<T*>(dz), static_cast<T*>(du));
    };
    if (sum_dy.data != nullptr) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
  });
}

}  // namespace dla_fast::cuda
