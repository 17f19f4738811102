// Inference of a node: the tail follows while z is in cache, or where the library convolves, in a pass of its own.

#pragma once

#include <type_traits>

#include "exact.h"
#include "library.h"
#include "node.h"

namespace dla_fast::cpu {

template <class T>
void infer_by_library(const Node& node, const NormVectors<acc_t<T>>& norm, const OptionalTensor& residual, Tensor& y) {
  const Tensor z = library_convolution(node);
  tail_pass(node.size(), norm, z.const_data_ptr<T>(), data_or_null<T>(residual), y.mutable_data_ptr<T>());
}

template <class T>
void infer(const Node& node, const NativeNode<T>& product, const NormVectors<acc_t<T>>& norm,
           const OptionalTensor& residual, Tensor& y) {
  using A = acc_t<T>;
  const T* skip = data_or_null<T>(residual);
  T* out = y.mutable_data_ptr<T>();
  if (product->infer(norm.from(0), skip, out)) return;
  const int64_t ld = node.channels_last ? node.out_channels : node.height * node.width;
  A* in_place = nullptr;
  if constexpr (std::is_same_v<T, A>) in_place = product->in_place() ? out : nullptr;
  Watch watch(!product->plain());
  product->forward(in_place, [&](const Piece& piece, Strided<const A> z) {
    watch.see(z, piece.shape);
    kernels<T>().tail_accumulated(piece.shape, norm.from(piece.channel), z,
                                  {skip == nullptr ? nullptr : skip + piece.at, ld}, {out + piece.at, ld});
  });
  if (watch.found()) {
    const Node plain = plainly(node);
    Tensor again = plain.map(plain.out_channels);
    infer<T>(plain, NativeNode<T>(plain), norm, residual, again);
    repair(y, again);
  }
}

}  // namespace dla_fast::cpu
