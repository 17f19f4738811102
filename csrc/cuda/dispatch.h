// From the types that are known at a call to those that kernels are compiled for; checks of a launch.

#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "device.h"

namespace dla_fast::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("dla_fast: ") + what + ": " + cudaGetErrorString(status));
  }
}

inline void check_launch(const char* kernel) {
  check(cudaGetLastError(), kernel);
}

template <class T>
struct Of {
  using type = T;
};

template <class F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::kDouble:
      return f(Of<double>{});
    case Type::kFloat:
      return f(Of<float>{});
    case Type::kHalf:
      return f(Of<half>{});
    default:
      return f(Of<bfloat16>{});
  }
}

template <bool B>
struct Bool {
  static constexpr bool value = B;
};

template <class F>
void with_bool(bool b, const F& f) {
  if (b) return f(Bool<true>{});
  return f(Bool<false>{});
}

template <int N>
struct Int {
  static constexpr int value = N;
};

// Blocks along x; along y a grid takes 65535.
constexpr int64_t kMostAlongY = 65535;

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  if (x > 0x7fffffff || y > kMostAlongY) {
    throw std::runtime_error("dla_fast: " + std::to_string(x) + " x " + std::to_string(y) +
                             " blocks are more than a launch takes");
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), 1);
}

// Smallest power of two from n on.
inline int power_of_two(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// Into how many to cut what `along_x` blocks do, where `resident` blocks run at once: into one wave, or into so
// many that the last one leaves little idle.
inline int64_t full_waves(int64_t along_x, int64_t resident) {
  int64_t best = 1;
  double most = 0;
  for (int64_t count = std::max<int64_t>(resident / along_x, 1); count * along_x <= 6 * resident; ++count) {
    const int64_t blocks = count * along_x, waves = divide_up(blocks, resident);
    const double busy = static_cast<double>(blocks) / static_cast<double>(waves * resident);
    // Another wave costs the blocks' beginnings and ends again.
    if (busy - 0.02 * static_cast<double>(waves) > most) {
      most = busy - 0.02 * static_cast<double>(waves);
      best = count;
    }
  }
  return best;
}

}  // namespace dla_fast::cuda
