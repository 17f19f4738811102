// The 3x3 product of a node, block by block of the map: what Winograd's algorithm and the sum of products share.

#pragma once

#include "blocks.h"
#include "product.h"

namespace dla_fast::cpu {

// dx is a convolution of dz with the flipped weight, dW one of the inputs with it.
template <class T>
class Convolution : public Product<T> {
 public:
  using A = acc_t<T>;

  explicit Convolution(const Inputs<T>& in) : in_(in) {}
  int64_t groups() const override { return grid_of(in_).moment_groups(); }
  void forward(A* out, Epilogue<A> epilogue) const override;
  bool forms_dz() const override { return false; }
  void backward(const Gradient<T>& gradient) const override;

 protected:
  // adjoint: with the weight of the gradient's convolution, from its output channels to its input channels.
  virtual void convolve(const Inputs<T>& in, bool adjoint, std::vector<Panel> panels,
                        RowEpilogue<A> epilogue) const = 0;
  virtual void weight_gradient(const Gradient<T>& gradient) const = 0;

  const Inputs<T>& in_;

 private:
  void input_gradients(const Gradient<T>& gradient) const;
};

}  // namespace dla_fast::cpu
