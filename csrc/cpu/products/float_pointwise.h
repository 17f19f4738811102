// The 1x1 product of a node in vector instructions of float or double; half precision is widened.

#pragma once

#include "float_gemm.h"
#include "product.h"
#include "tasks.h"

namespace dla_fast::cpu {

template <class T>
class FloatPointwise : public Product<T> {
  using A = acc_t<T>;

 public:
  explicit FloatPointwise(const Inputs<T>& in) : in_(in) {}

  int64_t packed_bytes() const override;
  void pack(void* to) const override;
  int64_t groups() const override {
    return in_.channels_last ? divide_up(in_.total(), rows()) : in_.images * divide_up(in_.pixels(), kPanel);
  }
  void forward(A* out, Epilogue<A> epilogue) const override;
  bool infer(const Norm<A>& norm, const T* residual, T* y) const override;
  bool forms_dz() const override { return true; }
  bool adds_carried() const override { return true; }
  void backward(const Gradient<T>& gradient) const override;

 private:
  int64_t weights() const { return in_.in_channels * in_.out_channels; }
  // Of a tile, at most.
  int64_t rows() const { return tile_rows(in_.total(), weights(), divide_up(in_.out_channels, kPanel)); }
  // A tile of an input as A, whose first value lies that far in the map: formed, where it is.
  void load(const Input<T>& x, const Shape& shape, int64_t at, Strided<A> to) const;
  // With what the sums become, or an epilogue that is given them.
  void forward_channels_last(A* out, const Finish<A>* finish, Epilogue<A> epilogue) const;
  void forward_contiguous(A* out, Epilogue<A> epilogue) const;

  const Inputs<T>& in_;
};

}  // namespace dla_fast::cpu
