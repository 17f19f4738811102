// How the work of a call is shared out among threads.

#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

namespace dla_fast::cpu {

inline int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}
inline int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

int64_t thread_count();

// f(begin, end) over parts of [0, n), of at least `grain` each.
void parallel_ranges(int64_t n, int64_t grain, c10::function_ref<void(int64_t, int64_t)> f);

// The same over tasks, in parallel when each thread gets enough to pay for waking it, about ten microseconds. `values`
// is what a task costs, in values that a norm pass touches; a product costs a value per 32 flops.
void parallel(int64_t tasks, int64_t values, c10::function_ref<void(int64_t, int64_t)> f);

// One task after another, then -1.
using Take = c10::function_ref<int64_t()>;

// Runs f(take) on every thread. For tasks whose results do not depend on who computes them. Who is through with its own
// range of the tasks helps the others, so threads that the machine holds up do less; else a thread meets the same
// memory in one pass as in the next, and finds it in its own cache.
void parallel_queue(int64_t tasks, int64_t values, c10::function_ref<void(const Take&)> f);

// The same from the end of each thread's range, for a second pass: what the first touched last is still in the cache.
void backwards_queue(int64_t tasks, int64_t values, c10::function_ref<void(const Take&)> f);

}  // namespace dla_fast::cpu
