#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace dla_fast::cpu {
namespace {

constexpr int64_t kEnough = 32768;

// The tasks of one call, a range for each thread.
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

void run_queue(int64_t tasks, int64_t values, c10::function_ref<void(const Take&)> f, bool reversed) {
  const int64_t enough = kEnough / std::max<int64_t>(values, 1);
  const int64_t threads = std::clamp<int64_t>(tasks / std::max<int64_t>(enough, 1), 1, thread_count());
  TaskQueue queue(tasks, threads, reversed);
  parallel_ranges(threads, 1, [&](int64_t begin, int64_t) {
    int64_t victim = begin;
    const auto take = [&]() -> int64_t { return queue.take(victim); };
    f(take);
  });
}

}  // namespace

int64_t thread_count() {
  return at::get_num_threads();
}

void parallel_ranges(int64_t n, int64_t grain, c10::function_ref<void(int64_t, int64_t)> f) {
  at::parallel_for(0, n, grain, f);
}

void parallel(int64_t tasks, int64_t values, c10::function_ref<void(int64_t, int64_t)> f) {
  parallel_ranges(tasks, std::max<int64_t>(1, kEnough / std::max<int64_t>(values, 1)), f);
}

void parallel_queue(int64_t tasks, int64_t values, c10::function_ref<void(const Take&)> f) {
  run_queue(tasks, values, f, false);
}

void backwards_queue(int64_t tasks, int64_t values, c10::function_ref<void(const Take&)> f) {
  run_queue(tasks, values, f, true);
}

}  // namespace dla_fast::cpu
