// Working memory of the kernels.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <utility>

#include "reused.h"

namespace dla_fast::cpu {

// Asks for huge pages where the memory is large: a fault for every 4 KB of a fresh block costs more than a pass over
// it.
void want_huge_pages(void* data, size_t bytes);

// 64-byte aligned working memory; zeroed where it has padding that is read, so that this never holds slow denormals.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n, bool zero = false)
      : reused_(kReuses && n * sizeof(A) >= kReused), data_(make(std::max<int64_t>(n, 1) * sizeof(A))) {
    if (zero) {
      std::fill_n(data_, n, A(0));
    } else {
#if defined(__SANITIZE_ADDRESS__)
      std::fill_n(data_, n, std::numeric_limits<A>::quiet_NaN());  // reading it uninitialised then shows
#endif
    }
  }
  Scratch(Scratch&& other) noexcept : reused_(other.reused_), data_(std::exchange(other.data_, nullptr)) {}
  ~Scratch() {
    if (!reused_) {
      ::operator delete[](data_, std::align_val_t(64));
    } else if (data_ != nullptr) {
      put_reused(data_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kReuses = false;  // it knows only what is freed and made anew
#else
  static constexpr bool kReuses = true;
#endif

  A* make(size_t bytes) const {
    return static_cast<A*>(reused_ ? take_reused(bytes) : ::operator new[](bytes, std::align_val_t(64)));
  }

  bool reused_;
  A* data_;
};

}  // namespace dla_fast::cpu
