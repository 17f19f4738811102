// Gradients of an input on their way through the ending of the unit before, tile by tile while they are in cache.

#pragma once

#include <algorithm>
#include <type_traits>

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
    if (shape.channels_are_rows && shape.cols < kShort) {
      for (int64_t c = 0; c < shape.rows; c += kDeep) {
        turned(std::min(kDeep, shape.rows - c), shape.cols, group, channel + c, part(dy, c), part(z, c),
               part(residual, c), part(dx, c));
      }
      return;
    }
    const int64_t sums = group * sums_.channels + channel;
    kernels<T>().reduce_accumulated(shape, through_->ending.norm.from(channel), dy, z, residual, dx, &sums_.dy[sums],
                                    &sums_.dy_xhat[sums]);
  }

  // Writes the sums, when every tile is put.
  void finish() const {
    if (through_ != nullptr) sums_.finalise(through_->sum_dy, through_->sum_dy_xhat);
  }

 private:
  static constexpr int64_t kShort = 64, kDeep = 32;

  template <class V>
  static Strided<V> part(Strided<V> rows, int64_t from) {
    return {rows.data == nullptr ? nullptr : rows.data + from * rows.ld, rows.ld};
  }

  // Short rows of pixels: those of a vector's lanes would have to be added for every channel. As columns they are not.
  void turned(int64_t count, int64_t pixels, int64_t group, int64_t channel, Strided<const A> dy, Strided<const T> z,
              Strided<const T> residual, Strided<T> dx) {
    A tiles[3][kShort * kDeep];
    const auto turn = [&](auto from, A* to) {
      kernels<std::remove_const_t<std::remove_pointer_t<decltype(from.data)>>>().load_transposed(from, {to, count},
                                                                                                 count, pixels);
      return Strided<const A>{to, count};
    };
    const Strided<const A> d = turn(dy, tiles[0]), v = turn(z, tiles[1]),
                           r = residual.data == nullptr ? Strided<const A>{nullptr, 0} : turn(residual, tiles[2]);
    const int64_t sums = group * sums_.channels + channel;
    kernels<A>().reduce({pixels, count, false}, through_->ending.norm.from(channel), d, v, r, {tiles[0], count},
                        &sums_.dy[sums], &sums_.dy_xhat[sums]);
    if constexpr (std::is_same_v<T, A>) {
      kernels<A>().load_transposed(d, dx, pixels, count);
    } else {
      kernels<A>().load_transposed(d, {tiles[1], pixels}, pixels, count);
      kernels<T>().store({tiles[1], pixels}, dx, count, pixels);
    }
  }

  const Through<T>* through_;
  GradientSums sums_;
};

}  // namespace dla_fast::cpu
