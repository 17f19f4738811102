// What is not finite, where a product that is no plain sum of its values (Product::plain) has made it of others.
//
// Such a product turns infinity into NaN, and is the faster one as long as there is none. Where its results are not all
// finite, which is seen while they are in cache, a plain sum computes them once more, and those take their place.

#pragma once

#include <ATen/ops/isfinite.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

#include <atomic>
#include <cmath>

#include "node.h"

namespace dla_fast::cpu {

// Watches what a product gives, piece by piece, on any thread.
class Watch {
 public:
  explicit Watch(bool needed) : needed_(needed) {}

  template <class A>
  void see(Strided<const A> values, const Shape& shape) {
    if (needed_ && !kernels<A>().finite(values, shape.rows, shape.cols)) found_.store(true, std::memory_order_relaxed);
  }
  // Whether something was not finite.
  bool found() const { return found_.load(std::memory_order_relaxed); }

 private:
  const bool needed_;
  std::atomic<bool> found_{false};
};

inline Node plainly(Node node) {
  node.plainly = true;
  return node;
}

// Whether all values are finite, by one pass; of values whose sum is not it may deny that.
inline bool all_finite(const Tensor& t) {
  return std::isfinite(at::sum(t, at::kDouble).item<double>());
}

// `values`, of which those that are not finite are replaced by what a plain sum gives.
inline void repair(Tensor& values, const Tensor& plain) {
  values.copy_(at::where(at::isfinite(values), values, plain));
}

}  // namespace dla_fast::cpu
