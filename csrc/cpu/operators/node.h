// A node's tensors: its inputs in the layout it computes in, how each is upsampled, the convolution's geometry, and as
// what they are multiplied.

#pragma once

#include <vector>

#include "../passes/map_passes.h"
#include "../products/product.h"
#include "prologue.h"

namespace dla_fast::cpu {

// How a node's convolution is computed.
enum class Way {
  pointwise,    // by our 1x1 products, of the pixels that the stride takes
  convolution,  // by our products of larger kernels
  library,      // by the library's convolution of the concatenation
};

struct Node {
  bool channels_last;
  int64_t images, height, width;  // of the output
  int64_t in_height, in_width;    // of the inputs, upsampled
  int64_t in_channels, out_channels, kernel, stride, dilation, groups;
  std::vector<Tensor> xs, ups;  // an undefined up-weight where the input is taken as it is
  std::vector<int64_t> factors, offsets;
  Tensor weight;                       // as it was given
  const Prologue* prologue = nullptr;  // where an input is still z, for products that form it on load
  bool plainly = false;                // by products that are plain sums alone

  // up_weights: of those inputs whose factor is not 1, in order.
  Node(at::TensorList xs, at::TensorList up_weights, const Tensor& weight, at::IntArrayRef factors, int64_t stride,
       int64_t dilation, int64_t groups);

  // Takes the prologue, or forms the input. residual_input: see residual().
  void take(const Prologue& prologue, int64_t residual_input);
  Way way() const;
  // Whether our products upsample what they gather; else upsampled maps are made for them.
  bool upsamples_on_the_way() const;
  bool empty() const { return images * height * width * out_channels == 0; }
  MapSize size() const { return {channels_last, images, out_channels, height * width}; }
  int64_t count() const { return static_cast<int64_t>(xs.size()); }
  Tensor map(int64_t channels) const;  // a new one of the output's size
  Tensor full(int64_t i) const;        // input i, upsampled
  std::vector<Tensor> all_full() const;

  // What is added before the activation: input `input`, or `given`, or nothing.
  OptionalTensor residual(const OptionalTensor& given, int64_t input) const;
};

// A node as our products take it.
template <class T>
class NativeNode {
 public:
  // packed: the weight as the product of that arithmetic packed it before, where it did.
  explicit NativeNode(const Node& node, const void* packed = nullptr,
                      std::optional<Arithmetic> arithmetic = std::nullopt);
  NativeNode(const NativeNode&) = delete;

  const Product<T>* operator->() const { return product_.get(); }
  // The maps that it multiplies: inputs upsampled, unless it does that on the way, and those pixels that a stride
  // takes; z of one that is formed on load.
  const std::vector<Tensor>& maps() const { return maps_; }
  // Whether it needs no map of dz, where du is not needed either.
  bool forms_dz_on_load() const { return forms_dz_; }
  // How the input with a prologue is formed, where gradients may go on through that; else null.
  const Ending<T>* ending() const { return goes_through_ ? &*ending_ : nullptr; }
  // The best one where the weight is packed once for many calls.
  Arithmetic arithmetic_kept() const;
  // A new tensor for the gradient of the weight, laid out as the products write it.
  Tensor weight_gradient() const;

 private:
  void take_prologue(const Node& node, Arithmetic arithmetic);

  std::vector<Tensor> maps_;
  Tensor weight_, z_;
  OptionalTensor added_;
  std::optional<Ending<T>> ending_;
  bool goes_through_ = false, forms_dz_ = false;
  Inputs<T> in_;
  ProductOf<T> product_;
};

}  // namespace dla_fast::cpu
