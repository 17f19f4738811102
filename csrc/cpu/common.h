// What the operators of the CPU backend share: memory layout, norm parameters, moments, scratch memory.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels.h"

namespace dla_fast::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define DLA_DISPATCH_FLOATING(TYPE, NAME, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, TYPE, NAME, __VA_ARGS__)

inline int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}
inline int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

inline bool is_channels_last(const Tensor& t) {
  return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

inline at::MemoryFormat format_of(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The dtype that sums are kept in, and per-channel statistics are returned in.
inline at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

Act parse_act(std::string_view name);

// Asks for huge pages where the memory is large: a fault for every 4 KB of a fresh block costs more than a pass over
// it.
void want_huge_pages(void* data, size_t bytes);

// at::empty for what a kernel is about to write whole. A large one asks for huge pages: memory fresh from the system is
// faulted in page by page, which takes several times as long as writing it.
Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

// Runs f(begin, end) over the tasks: in parallel when each thread gets enough to pay for waking it, about ten
// microseconds. `values` is what a task costs, in values that a norm pass touches; a product costs a value per 32
// flops.
template <class F>
void parallel(int64_t tasks, int64_t values, const F& f) {
  constexpr int64_t enough = 32768;
  at::parallel_for(0, tasks, std::max<int64_t>(1, enough / std::max<int64_t>(values, 1)), f);
}

// The tasks of one call, a range for each thread. Who is through with its own range helps the others, so threads that
// the machine holds up do less; else a thread meets the same memory in one pass as in the next, and finds it in its own
// cache.
class TaskQueue {
 public:
  TaskQueue(int64_t tasks, int64_t threads, bool reversed)
      : tasks_(tasks), reversed_(reversed), counters_(threads), end_(threads) {
    for (int64_t t = 0; t < threads; ++t) {
      counters_[t].next.store(tasks * t / threads, std::memory_order_relaxed);
      end_[t] = tasks * (t + 1) / threads;
    }
  }

  // The next task for a thread, or -1. `victim` is where it took the last one: its own number at first.
  int64_t take(int64_t& victim) {
    const int64_t threads = static_cast<int64_t>(end_.size());
    for (int64_t tries = 0; tries < threads; ++tries) {
      if (counters_[victim].next.load(std::memory_order_relaxed) < end_[victim]) {
        const int64_t task = counters_[victim].next.fetch_add(1, std::memory_order_relaxed);
        if (task < end_[victim]) return reversed_ ? mirrored(task, victim) : task;
      }
      victim = (victim + 1) % threads;
    }
    return -1;
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };

  int64_t mirrored(int64_t task, int64_t thread) const {
    const int64_t begin = tasks_ * thread / static_cast<int64_t>(end_.size());
    return begin + end_[thread] - 1 - task;
  }

  int64_t tasks_;
  bool reversed_;
  std::vector<Counter> counters_;
  std::vector<int64_t> end_;
};

// Runs f(take) on every thread, where take() gives one task after another, then -1. For tasks whose results do not
// depend on who computes them.
template <class F>
void parallel_queue(int64_t tasks, int64_t values, const F& f, bool reversed = false) {
  const int64_t enough = 32768 / std::max<int64_t>(values, 1);
  const int64_t threads = std::clamp<int64_t>(tasks / std::max<int64_t>(enough, 1), 1, at::get_num_threads());
  TaskQueue queue(tasks, threads, reversed);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    int64_t victim = begin;
    f([&]() -> int64_t { return queue.take(victim); });
  });
}

// The same from the end of each thread's range, for a second pass: what the first touched last is still in the cache.
template <class F>
void backwards_queue(int64_t tasks, int64_t values, const F& f) {
  parallel_queue(tasks, values, f, true);
}

// 64-byte aligned working memory; zeroed where it has padding that is read, so that this never holds slow denormals.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n, bool zero = false)
      : data_(static_cast<A*>(::operator new[](std::max<int64_t>(n, 1) * sizeof(A), std::align_val_t(64)))) {
    want_huge_pages(data_, n * sizeof(A));
    if (zero) {
      std::fill_n(data_, n, A(0));
    } else {
#if defined(__SANITIZE_ADDRESS__)
      std::fill_n(data_, n, std::numeric_limits<A>::quiet_NaN());  // reading it uninitialised then shows
#endif
    }
  }
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Scratch() { ::operator delete[](data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

// The norm of one call as vectors in the accumulation type; centre is the mean less the convolution's bias.
template <class A>
struct NormVectors {
  std::vector<A> center, rstd, scale, shift;
  Act act;
  A slope;

  NormVectors(const Tensor& mean, const Tensor& var, const OptionalTensor& conv_bias, const OptionalTensor& weight,
              const OptionalTensor& bias, double eps, std::string_view act, double slope);

  // The vectors so many times one after another: of as many pixels side by side, as Tiling folds them.
  void repeat(int64_t times);

  Norm<A> from(int64_t channel) const {
    return {center.data() + channel, rstd.data() + channel, scale.data() + channel, shift.data() + channel, act, slope};
  }
};

template <class T>
std::vector<T> repeated(const std::vector<T>& values, int64_t times);

// How a normalisation pass walks a (N, C, H, W) tensor: tiles of about `target` values.
struct Tile {
  int64_t offset, group, channel;
  Shape shape;
};

// Pixels of few channels lie side by side in a channels_last map: `fold` of them are taken for one with as many times
// the channels, since a row of 16 values costs about as much as one of 256.
struct Tiling {
  bool channels_last;
  int64_t fold = 1;
  int64_t images, channels, pixels, block_rows, block_cols, groups, per_group;

  static constexpr int64_t kTile = 8192;  // values that fit the first-level cache: 32 KB of floats

  Tiling(const Tensor& t, bool channels_last, int64_t target = kTile);
  // Passes that leave sums for every tile take larger ones, since somebody has to add those, but enough to share out.
  static Tiling for_sums(const Tensor& t, bool channels_last) {
    return {t, channels_last, std::clamp<int64_t>(t.numel() / 64, 2 * kTile, 8 * kTile)};
  }
  int64_t count() const { return groups * per_group; }
  int64_t ld() const { return channels_last ? channels : pixels; }
  Tile operator[](int64_t i) const;
  int64_t group_size(int64_t group) const;  // values per channel in a group
};

// Per group and channel: mean, m2, delta of the tile kernels' moments, and how many values they stand for.
template <class A>
struct MomentPartials {
  int64_t groups, channels;
  std::vector<A> mean, m2, delta;
  std::vector<int64_t> count;

  MomentPartials(int64_t groups, int64_t channels)
      : groups(groups),
        channels(channels),
        mean(groups * channels),
        m2(groups * channels),
        delta(groups * channels),
        count(groups) {}

  // Mean and biased variance by Chan, Golub and LeVeque's pairwise formula (1979), summed in double.
  void finalise(Tensor& mean_out, Tensor& var_out) const;
};

// Moves the running statistics towards a batch's, as aten's batch norm does (unbiased variance); the mean of the
// convolution's output is that of z plus the bias that was left out of it. Nothing happens for an empty batch.
void update_running(const OptionalTensor& running_mean, const OptionalTensor& running_var, const Tensor& mean,
                    const Tensor& var, const OptionalTensor& conv_bias, double momentum, int64_t count);

}  // namespace dla_fast::cpu
