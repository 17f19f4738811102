// Launches of the upsampling kernels.

#include <algorithm>

#include "dispatch.h"
#include "upsample_backward_kernels.h"
#include "upsample_backward_phases.h"

namespace dla_fast::cuda {
namespace {

// What a block gets of shared memory without asking for more.
constexpr int64_t kShared = 48 * 1024;
constexpr int64_t kBlocksPerProcessor = 8;

UpShape shape_of(const Upsampling& up) {
  return {up.images,
          up.channels,
          static_cast<int>(up.height),
          static_cast<int>(up.width),
          static_cast<int>(up.large(up.height)),
          static_cast<int>(up.large(up.width)),
          static_cast<int>(up.factor)};
}

// Channels that are read and written at once, channels_last.
template <class T>
int vector_of(const Upsampling& up) {
  constexpr int wide = 16 / sizeof(T);
  return up.aligned && up.channels % wide == 0 ? wide : 1;
}

// Whether the kernels for rows of contiguous maps serve: f = F, and every row of y a whole number of vectors.
template <class T, int F>
bool has_rows(const Upsampling& up) {
  constexpr int V = 16 / sizeof(T), W = V > F ? V : F;
  return up.factor == F && up.aligned && up.large(up.width) % W == 0;
}

// Calls f(Int<F>) for the factor that kernels are compiled for, if it is one; gives whether it is.
template <class F>
bool with_factor(int64_t factor, const F& f) {
  switch (factor) {
    case 2:
      f(Int<2>{});
      return true;
    case 4:
      f(Int<4>{});
      return true;
    case 8:
      f(Int<8>{});
      return true;
    default:
      return false;
  }
}

// Vectors side by side that a block takes, as many as the weights' place in shared memory allows.
int lanes_of(const Upsampling& up, int width, int most, int64_t shared) {
  const int64_t bytes = up.taps() * width * size_of(up.type);
  int lanes = std::min(power_of_two(divide_up(up.channels, width)), most);
  while (lanes > 1 && lanes * bytes > shared) lanes /= 2;
  return lanes;
}

int64_t blocks_for(const Stream& stream, int64_t work, int64_t along_x) {
  const int64_t most = divide_up(kBlocksPerProcessor * stream.processors, std::max<int64_t>(along_x, 1));
  return std::clamp<int64_t>(work, 1, std::max<int64_t>(most, 1));
}

int64_t blocks_for(const Stream& stream, int64_t values) {
  return blocks_for(stream, divide_up(values, kThreads), 1);
}

template <class T, int V>
void upsample_channels_last(const Stream& stream, const Upsampling& up, const T* x, const T* weight, const T* skip,
                            T* y) {
  // Of 16 bytes, eight side by side fill a line of cache.
  const int lanes = std::min(power_of_two(divide_up(up.channels, V)), V == 1 ? 32 : 8);
  const int64_t all = up.factor * up.factor, phases = std::min<int64_t>(all, kThreads / lanes);
  const int64_t along_x = divide_up(up.channels, lanes * V) * divide_up(all, phases);
  const int64_t strips =
      up.images * divide_up(up.large(up.height), up.factor) * divide_up(divide_up(up.large(up.width), up.factor), 4);
  const int64_t blocks = std::min(full_waves(along_x, 2 * static_cast<int64_t>(stream.processors)),
                                  divide_up(strips, kThreads / lanes / phases));
  DLA_LAUNCH((upsample_kernel<T, V>), grid_of(along_x, blocks), kThreads, 0, stream, shape_of(up), lanes,
             static_cast<int>(phases), x, weight, skip, y);
}

template <class T>
void upsample_contiguous(const Stream& stream, const Upsampling& up, const T* x, const T* weight, const T* skip, T* y) {
  constexpr int V = 16 / sizeof(T);
  bool done = false;
  with_factor(up.factor, [&](auto factor) {
    constexpr int F = decltype(factor)::value, W = V > F ? V : F;
    if (!has_rows<T, F>(up)) return;
    const int64_t count = up.images * (up.height + 1) * (up.large(up.width) / W);
    const int64_t blocks = std::min(full_waves(up.channels, static_cast<int64_t>(kRowsResident<T>) * stream.processors),
                                    divide_up(count, kThreads));
    DLA_LAUNCH((upsample_rows_kernel<T, V, F>), grid_of(up.channels, blocks), kThreads, 0, stream, shape_of(up), x,
               weight, skip, y);
    done = true;
  });
  if (done) return;
  const int64_t count = up.images * up.channels * up.large(up.height) * up.large(up.width);
  DLA_LAUNCH((upsample_any_kernel<T>), grid_of(blocks_for(stream, count)), kThreads, 0, stream, shape_of(up), x, weight,
             skip, y);
}

// A pass over dy that makes dx and the sums for dw together: how many lanes and blocks it has. No blocks where there is
// no such kernel.
struct BackwardPlan {
  int lanes = 1;
  int64_t along_x = 0, blocks = 0;
};

// Whether the phases of a pixel fit a warp, channels_last.
template <int F>
constexpr bool kPhasesFit = F * F <= 32;

// Eight halves of eight-fold rows would not fit into registers.
template <class T, int F>
constexpr int backward_vector() {
  return F == 8 && sizeof(T) == 2 ? 4 : 16 / sizeof(T);
}

template <class T, int F>
BackwardPlan backward_plan(const Stream& stream, const Upsampling& up) {
  BackwardPlan plan;
  if (up.channels_last) {
    constexpr int V = backward_vector<T, F>();
    if (vector_of<T>(up) == 1) return plan;
    if constexpr (kPhasesFit<F>) {
      plan.lanes = std::min(power_of_two(divide_up(up.channels, V)), 32 / (F * F));
      plan.along_x = divide_up(up.channels, plan.lanes * V);
      // A thread that takes fewer than four strips is not worth its sums.
      const int64_t strips = up.images * up.height * divide_up(up.width, 2), slots = kThreads / (plan.lanes * F * F);
      plan.blocks =
          std::min(full_waves(plan.along_x, 2 * static_cast<int64_t>(stream.processors)), divide_up(strips, 4 * slots));
      return plan;
    }
    plan.lanes = lanes_of(up, V, kThreads / TapGroups<T, V, F>::count, kShared / 4);
    plan.along_x = divide_up(up.channels, plan.lanes * V);
    const int64_t strips = up.images * up.height * divide_up(up.width, 2);
    // Two blocks fill a multiprocessor's registers; a thread that takes fewer than four strips is not worth its sums.
    const int64_t slots = kThreads / (plan.lanes * TapGroups<T, V, F>::count);
    plan.blocks = blocks_for(stream, divide_up(strips, 4 * slots), 4 * plan.along_x);
  } else {
    constexpr int V = 16 / sizeof(T), W = V > F ? V : F;
    if (!has_rows<T, F>(up)) return plan;
    plan.along_x = up.channels;
    const int64_t strips = up.images * up.height * (up.large(up.width) / W);
    plan.blocks =
        std::min(full_waves(plan.along_x, static_cast<int64_t>(kRowsBackwardResident<T, F>) * stream.processors),
                 divide_up(strips, 4 * kThreads / TapGroups<T, 1, F>::count));
  }
  return plan;
}

Steps steps_of(const Upsampling& up, int64_t height, int64_t width) {
  if (up.channels_last) return {height * width * up.channels, 1, width * up.channels, up.channels};
  return {up.channels * height * width, height * width, width, 1};
}

template <class T>
void upsample_any_backward(const Stream& stream, const Upsampling& up, const T* dy, const T* x, const T* weight, T* dx,
                           T* dweight) {
  const Steps small = steps_of(up, up.height, up.width);
  const Steps large = steps_of(up, up.large(up.height), up.large(up.width));
  if (dx != nullptr) {
    const int64_t count = up.images * up.channels * up.height * up.width;
    DLA_LAUNCH((upsample_any_dx_kernel<T>), grid_of(blocks_for(stream, count)), kThreads, 0, stream, shape_of(up),
               small, large, dy, weight, dx);
    check_launch("upsample_any_dx_kernel");
  }
  if (dweight != nullptr) {
    DLA_LAUNCH((upsample_any_dw_kernel<T>), grid_of(up.channels * up.taps()), kThreads, 0, stream, shape_of(up), small,
               large, dy, x, dweight);
    check_launch("upsample_any_dw_kernel");
  }
}

}  // namespace

void upsample(const Stream& stream, const Upsampling& up, const void* x, const void* weight, const void* skip,
              void* y) {
  if (up.images * up.channels * up.height * up.width == 0) return;
  with_type(up.type, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](const auto& kernel) {
      kernel(stream, up, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(skip),
             static_cast<T*>(y));
    };
    if (!up.channels_last) {
      run(upsample_contiguous<T>);
    } else if (vector_of<T>(up) == 1) {
      run(upsample_channels_last<T, 1>);
    } else {
      run(upsample_channels_last<T, 16 / sizeof(T)>);
    }
  });
  check_launch("upsample_kernel");
}

int64_t upsample_backward_blocks(const Stream& stream, const Upsampling& up) {
  int64_t blocks = 0;
  with_type(up.type, [&](auto type) {
    using T = typename decltype(type)::type;
    with_factor(up.factor, [&](auto factor) { blocks = backward_plan<T, decltype(factor)::value>(stream, up).blocks; });
  });
  return blocks;
}

void upsample_backward(const Stream& stream, const Upsampling& up, const void* dy_in, const void* x_in,
                       const void* weight_in, void* partial_in, void* dx_out, void* dweight_out) {
  if (up.channels == 0) return;
  with_type(up.type, [&](auto type) {
    using T = typename decltype(type)::type;
    const T *dy = static_cast<const T*>(dy_in), *x = static_cast<const T*>(x_in);
    const T* weight = static_cast<const T*>(weight_in);
    T *dx = static_cast<T*>(dx_out), *dweight = static_cast<T*>(dweight_out);
    auto* partial = dweight == nullptr ? nullptr : static_cast<acc_t<T>*>(partial_in);
    bool done = false;
    with_factor(up.factor, [&](auto factor) {
      constexpr int F = decltype(factor)::value;
      const BackwardPlan plan = backward_plan<T, F>(stream, up);
      if (plan.blocks == 0) return;
      const dim3 grid = grid_of(plan.along_x, plan.blocks);
      if (up.channels_last) {
        constexpr int V = backward_vector<T, F>();
        if constexpr (kPhasesFit<F>) {
          DLA_LAUNCH((upsample_backward_kernel<T, V, F>), grid, kThreads, 0, stream, shape_of(up), plan.lanes, dy, x,
                     weight, partial, dx);
        } else {
          DLA_LAUNCH((upsample_backward_taps_kernel<T, V, F>), grid, kThreads, plan.lanes * V * up.taps() * sizeof(T),
                     stream, shape_of(up), plan.lanes, dy, x, weight, partial, dx);
        }
      } else {
        DLA_LAUNCH((upsample_rows_backward_kernel<T, 16 / sizeof(T), F>), grid, kThreads, 0, stream, shape_of(up), dy,
                   x, weight, partial, dx);
      }
      check_launch("upsample_backward_kernel");
      if (dweight != nullptr) {
        const int64_t count = up.channels * up.taps();
        DLA_LAUNCH((weight_sum_kernel<T>), grid_of(divide_up(count, kLanes)), kThreads, 0, stream, partial, count,
                   plan.blocks, dweight);
        check_launch("weight_sum_kernel");
      }
      done = true;
    });
    if (!done) upsample_any_backward<T>(stream, up, dy, x, weight, dx, dweight);
  });
}

}  // namespace dla_fast::cuda
