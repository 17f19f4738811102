// Gradients of an input on their way through the ending of the unit before, tile by tile while they are in cache.

#pragma once

#include "product.h"

namespace dla_fast::cpu {

template <class T>
class ThroughTiles {
  using A = acc_t<T>;

 public:
  // Tiles of a group are put one after the other.
  ThroughTiles(const Gradient<T>& gradient, int64_t groups)
      : through_(gradient.through),
        sums_(groups, through_ == nullptr ? 0 : static_cast<int64_t>(through_->ending.norm.center.size())) {}

  bool takes(int64_t input) const { return through_ != nullptr && through_->input == input; }

  // A tile of dx that begins with so many values before it and a channel, rows `ld` apart, from what the product gave.
  void put(const Shape& shape, int64_t group, int64_t channel, int64_t at, int64_t ld, Strided<const A> dy, T* dx) {
    const Ending<T>& e = through_->ending;
    put(shape, group, channel, dy, {e.z + at, ld}, {e.residual == nullptr ? nullptr : e.residual + at, ld},
        {dx + at, ld});
  }
  // The same with the tile's z, residual and dx wherever they are.
  void put(const Shape& shape, int64_t group, int64_t channel, Strided<const A> dy, Strided<const T> z,
           Strided<const T> residual, Strided<T> dx) {
    const int64_t sums = group * sums_.channels + channel;
    kernels<T>().reduce_accumulated(shape, through_->ending.norm.from(channel), dy, z, residual, dx, &sums_.dy[sums],
                                    &sums_.dy_xhat[sums]);
  }
  const Ending<T>& ending() const { return through_->ending; }

  // Writes the sums, when every tile is put.
  void finish() const {
    if (through_ != nullptr) sums_.finalise(through_->sum_dy, through_->sum_dy_xhat);
  }

 private:
  const Through<T>* through_;
  GradientSums sums_;
};

}  // namespace dla_fast::cpu
