// Inference of a node whose norm was folded and whose weight was packed before, for models that serve the same weights
// call after call. dla_fast/ops/packed.py calls them.

#pragma once

#include <string>
#include <vector>

#include "tensors.h"

namespace dla_fast::cpu {

// By what a call is served: the arithmetic of its product and the layout, for one of which a weight is packed; -1: by
// the library's convolution. -2: by the library's with the norm folded into it, which the caller makes, where it says
// that it can (foldable). Measured on Zen 4 (docs/benchmarks.md): that has the better code for strides of floats.
int64_t conv_norm_act_way(const std::vector<Tensor>& xs, const std::vector<Tensor>& up_weights, const Tensor& weight,
                          const std::vector<int64_t>& factors, int64_t stride, int64_t dilation, int64_t groups,
                          bool foldable);

// The weight as that way reads it, opaque; empty where it takes the weight as it is. in_channels: of each input.
Tensor conv_norm_act_pack(const Tensor& weight, const std::vector<int64_t>& in_channels, int64_t way);

// How a kind of call (its shapes, layouts, options) that was checked once is served.
struct PackedCall {
  Tensor weight, packed;
  int64_t way;
  Tensor scale, shift;  // (N) in the dtype that sums are kept in
  std::vector<int64_t> factors;
  int64_t stride, dilation, groups;
  int64_t residual_input, added_input;  // which input is added as it is gathered, or as a residual that is given; or -1
  std::string act;
  double slope;
};

// y = act(scale * sum_i W_i * up_i(x_i) + shift + residual).
Tensor conv_norm_act_packed(const PackedCall& call, const std::vector<Tensor>& xs,
                            const std::vector<Tensor>& up_weights, const OptionalTensor& residual);

}  // namespace dla_fast::cpu
