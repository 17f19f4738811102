// CUDA's language on the host, as far as the kernels use it: their bodies run here, thread by thread, with no GPU.
//
// A block's threads are fibers that take turns: each runs until it ends or waits for others, at __syncthreads or in
// what a warp does together. Device memory is host memory, so AddressSanitizer sees every access outside a tensor.
// Shared memory is an array of cells that know who wrote and read them since the last barrier: two threads at one cell,
// one of them writing, is a race; so is reading what nobody wrote. What is found wrong is thrown when the launch ends.

#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "numbers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
#include <csetjmp>
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __is_same(A, B) std::is_same_v<A, B>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaDevAttrComputeCapabilityMajor = 0, cudaDevAttrComputeCapabilityMinor = 1,
              cudaDevAttrMultiProcessorCount = 2;
inline const char* cudaGetErrorString(int) {
  return "";
}
inline int cudaGetLastError() {
  return cudaSuccess;
}
inline int cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
namespace cuda_host {
// How many multiprocessors the host says it has.
inline int processors = 2;
}  // namespace cuda_host
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const int values[] = {9, 0, cuda_host::processors};
  *value = values[attribute];
  return cudaSuccess;
}

namespace cuda_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

enum class Waits { kNothing, kWarp, kBlock, kEnded };

struct Fiber {
  ucontext_t context;
#if !defined(__SANITIZE_ADDRESS__)
  // Jumps once the fiber has begun: swapcontext asks the kernel each time.
  jmp_buf place;
#endif
  bool begun = false;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  Waits waits = Waits::kNothing;
  void* fake_stack = nullptr;
};

// One block at a time: who runs, which barrier they are past, and what a warp's lanes hand each other.
struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
#if !defined(__SANITIZE_ADDRESS__)
  jmp_buf scheduler_place;
#endif
  const std::function<void()>* body = nullptr;
  int threads = 0, running = 0;
  int64_t number = 0;  // of the block over all launches: shared memory of another is not this one's
  int64_t barriers = 0;
  size_t dynamic_bytes = 0;
  std::vector<std::array<std::array<uint64_t, 8>, kWarp>> lanes;
  std::string error;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;

  void fail(const std::string& what) {
    if (error.empty()) {
      error = what + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + " thread " +
              std::to_string(running) + ")";
    }
  }
};
inline thread_local Block block;

inline void switch_to_scheduler(bool ended) {
  Fiber& self = block.fibers[block.running];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ended ? nullptr : &self.fake_stack, block.scheduler_stack, block.scheduler_stack_size);
  swapcontext(&self.context, &block.scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#else
  if (ended || _setjmp(self.place) == 0) _longjmp(block.scheduler_place, 1);
#endif
}

inline void wait(Waits what) {
  block.fibers[block.running].waits = what;
  switch_to_scheduler(false);
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
  (*block.body)();
  block.fibers[block.running].waits = Waits::kEnded;
  switch_to_scheduler(true);
}

inline void resume(int thread) {
  block.running = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  Fiber& fiber = block.fibers[thread];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.get(), kStack);
  swapcontext(&block.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#else
  if (_setjmp(block.scheduler_place) == 0) {
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }
#endif
}

// Whether all of [from, to) wait for `what`; those are let go on.
inline bool release(int from, int to, Waits what) {
  for (int t = from; t < to; ++t) {
    if (block.fibers[t].waits != what) return false;
  }
  for (int t = from; t < to; ++t) block.fibers[t].waits = Waits::kNothing;
  return true;
}

inline void run_block(const std::function<void()>& body, int threads) {
  if (static_cast<int>(block.fibers.size()) < threads) block.fibers = std::vector<Fiber>(threads);
  block.body = &body;
  block.threads = threads;
  ++block.number;
  block.lanes.resize((threads + kWarp - 1) / kWarp);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &block.scheduler;
    fiber.waits = Waits::kNothing;
    fiber.begun = false;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&enter), 0);
  }
  for (;;) {
    bool any = false, moved = false;
    for (int t = 0; t < threads; ++t) {
      if (block.fibers[t].waits == Waits::kNothing) {
        resume(t);
        moved = true;
      }
      any |= block.fibers[t].waits != Waits::kEnded;
    }
    if (!any) return;
    for (int t = 0; t < threads; t += kWarp) moved |= release(t, std::min(t + kWarp, threads), Waits::kWarp);
    if (release(0, threads, Waits::kBlock)) {
      ++block.barriers;
      moved = true;
    }
    if (!moved) {
      block.fail("threads of a block wait at different places, or some ended before a barrier");
      return;
    }
  }
}

template <class F>
void launch(dim3 grid, int threads, size_t shared, const F& kernel) {
  if (threads <= 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.x > 0x7fffffff || grid.y > 65535) {
    throw std::runtime_error("invalid configuration of a launch");
  }
  if (shared > 48 * 1024) throw std::runtime_error("more dynamic shared memory than a launch gets unasked");
  const std::function<void()> body = kernel;
  block.error.clear();
  block.dynamic_bytes = shared;
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(body, threads);
      if (!block.error.empty()) throw std::runtime_error("on the host: " + block.error);
    }
  }
}

// Shared memory. The cells of a block start unwritten.
template <class T>
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_(bytes) {}

  struct Cell {
    T value;
    int64_t written_at = -1, read_at = -1;
    int writer = -1, reader = -1;
  };

  class Reference {
   public:
    Reference(Cell& cell) : cell_(cell) {}
    operator T() const {
      if (cell_.written_at < 0) block.fail("shared memory is read that nobody wrote");
      if (cell_.written_at == block.barriers && cell_.writer != block.running) {
        block.fail("race: shared memory is read that thread " + std::to_string(cell_.writer) +
                   " wrote since the last barrier");
      }
      const bool another = cell_.read_at == block.barriers && cell_.reader != block.running;
      cell_.reader = another ? -2 : block.running;
      cell_.read_at = block.barriers;
      return cell_.value;
    }
    Reference& operator=(T value) {
      if (cell_.written_at == block.barriers && cell_.writer != block.running) {
        block.fail("race: two threads write shared memory between barriers");
      }
      if (cell_.read_at == block.barriers && cell_.reader != block.running) {
        block.fail("race: shared memory is written that another thread read since the last barrier");
      }
      cell_.value = value;
      cell_.writer = block.running;
      cell_.written_at = block.barriers;
      return *this;
    }
    Reference& operator=(const Reference& other) { return *this = static_cast<T>(other); }

   private:
    Cell& cell_;
  };

  Reference operator[](int64_t i) {
    const size_t size = (bytes_ == 0 ? block.dynamic_bytes : bytes_) / sizeof(T);
    if (block_ != block.number) {
      block_ = block.number;
      cells_.assign(size, Cell{});
    }
    if (i < 0 || static_cast<size_t>(i) >= size) {
      block.fail("shared memory is reached at " + std::to_string(i) + " of " + std::to_string(size));
      return Reference(outside_);
    }
    return Reference(cells_[i]);
  }

 private:
  size_t bytes_;
  int64_t block_ = -1;
  std::vector<Cell> cells_;
  Cell outside_;
};

template <int V, template <class, int> class Pack, class T>
Pack<T, V> load(Shared<T>& shared, int64_t index) {
  if (index % V != 0) block.fail("a vector of shared memory is not aligned");
  Pack<T, V> out;
  for (int v = 0; v < V; ++v) out.v[v] = shared[index + v];
  return out;
}

inline std::array<std::array<uint64_t, 8>, kWarp>& warp() {
  return block.lanes[block.running / kWarp];
}

// Gives a lane's words to its warp, lets `read` look at all lanes' words, and returns what it makes of them.
template <class Words, class F>
auto exchange(const Words& words, const F& read) {
  auto& mine = warp()[block.running % kWarp];
  std::memcpy(mine.data(), words.data(), sizeof(words));
  wait(Waits::kWarp);
  const auto result = read(warp());
  wait(Waits::kWarp);
  return result;
}

}  // namespace cuda_host

#define DLA_SHARED(T, name, n) static thread_local ::cuda_host::Shared<T> name(sizeof(T) * (n))
#define DLA_DYNAMIC_SHARED(T, name) static thread_local ::cuda_host::Shared<T> name(0)
#define DLA_UNPACK(...) __VA_ARGS__
#define DLA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), ::cuda_host::launch(grid, block, shared, [&] { (DLA_UNPACK kernel)(__VA_ARGS__); }))

inline void __syncthreads() {
  cuda_host::wait(cuda_host::Waits::kBlock);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  std::array<T, 1> words{value};
  const int lane = cuda_host::block.running % cuda_host::kWarp;
  return cuda_host::exchange(words, [&](auto& lanes) {
    T other;
    std::memcpy(&other, lanes[lane ^ mask].data(), sizeof(T));
    return other;
  });
}

namespace cuda_host {

// What the matrix unit does with a word: two halves, or a float of which it reads the upper 19 bits.
template <class T>
float part(uint32_t word, int i) {
  if constexpr (sizeof(T) == 4) {
    word &= ~0x1fffu;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  } else {
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
    T value;
    std::memcpy(&value, &bits, 2);
    return value.value;
  }
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int parts = 4 / sizeof(T);
  const int lane = block.running % kWarp, g = lane / 4, t = lane % 4;
  const std::array<uint32_t, 6> words{a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto sum = exchange(words, [&](auto& lanes) {
    std::array<float, 4> out{d[0], d[1], d[2], d[3]};
    const auto word = [&](int from, int i) {
      uint32_t w;
      std::memcpy(&w, reinterpret_cast<const char*>(lanes[from].data()) + 4 * i, 4);
      return w;
    };
    for (int i = 0; i < 4; ++i) {
      for (int at = 0; at < 8; ++at) {
        const int depth_half = at / 4, of = at % 4;
        const uint32_t left = word(4 * g + of, i / 2 + 2 * depth_half);
        const uint32_t right = word(4 * (2 * t + i % 2) + of, 4 + depth_half);
        for (int p = 0; p < parts; ++p) out[i] += part<T>(left, p) * part<T>(right, p);
      }
    }
    return out;
  });
  for (int i = 0; i < 4; ++i) d[i] = sum[i];
}

inline uint32_t tf32_word(float v) {
  uint32_t word;
  std::memcpy(&word, &v, 4);
  return std::isfinite(v) ? (word + 0x1000u) & ~0x1fffu : word;
}

}  // namespace cuda_host
