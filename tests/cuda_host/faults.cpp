// Kernels with a fault each, and one without: what the host finds wrong, it must find in these.

#include <string>

#include "../../csrc/cuda/dispatch.h"

namespace {

using namespace dla_fast::cuda;

enum class Fault {
  kNone,
  kNoBarrier,
  kTwoWriters,
  kUnwritten,
  kOutside,
  kMisaligned,
  kDivergentBarrier,
  kEarlyEnd,
  kStale
};

void kernel(Fault fault, int* out) {
  DLA_SHARED(int, values, 64);
  const int thread = threadIdx.x;
  if (fault != Fault::kUnwritten || thread != 5) values[thread] = thread;
  if (fault == Fault::kTwoWriters) values[0] = thread;
  if (fault == Fault::kOutside && thread == 63) values[thread + 1] = 0;
  if (fault == Fault::kEarlyEnd && thread == 7) return;
  if (fault == Fault::kDivergentBarrier && thread < 32) __shfl_xor_sync(0xffffffff, thread, thread == 9 ? 0 : 1);
  if (fault == Fault::kDivergentBarrier && thread == 40) __shfl_xor_sync(0xffffffff, thread, 1);
  if (fault != Fault::kNoBarrier) __syncthreads();
  int sum = values[fault == Fault::kNoBarrier || fault == Fault::kStale ? 0 : 63 - thread];
  // What other threads read since the barrier is written.
  if (fault == Fault::kStale && thread == 63) values[0] = 0;
  if (fault == Fault::kMisaligned) sum += load_shared<4>(values, 2).v[0];
  out[thread] = sum + __shfl_xor_sync(0xffffffff, thread, 1);
}

}  // namespace

extern "C" void cuda_host_processors(int count) {
  cuda_host::processors = count;
}

// What is found in a kernel with the fault; empty for none. The sum of its output goes to *sum.
extern "C" const char* cuda_host_fault(int fault, int* sum) {
  static std::string found;
  int out[64] = {};
  found.clear();
  try {
    const Stream stream{nullptr, 1};
    DLA_LAUNCH((kernel), dim3(2), 64, 0, stream, static_cast<Fault>(fault), out);
  } catch (const std::exception& error) {
    found = error.what();
  }
  *sum = 0;
  for (int v : out) *sum += v;
  return found.c_str();
}
