// Inference of a node whose norm was folded and whose weight was packed before, for models that serve the same weights
// call after call. dla_fast/ops/packed.py has the schemas.

#pragma once

#include <vector>

#include "tensors.h"

namespace dla_fast::cpu {

// By what a call is served: the arithmetic of its product and the layout. A weight is packed for one of them.
int64_t conv_norm_act_way(at::TensorList xs, at::TensorList up_weights, const Tensor& weight, at::IntArrayRef factors,
                          int64_t stride, int64_t dilation, int64_t groups);

// The weight as that way reads it, opaque; empty where it takes the weight as it is. in_channels: of each input.
Tensor conv_norm_act_pack(const Tensor& weight, at::IntArrayRef in_channels, int64_t way);

// y = act(scale * sum_i W_i * up_i(x_i) + shift + residual). scale, shift: (N) in the dtype that sums are kept in.
Tensor conv_norm_act_packed(at::TensorList xs, at::TensorList up_weights, const Tensor& weight, const Tensor& packed,
                            int64_t way, const Tensor& scale, const Tensor& shift, const OptionalTensor& residual,
                            at::IntArrayRef factors, int64_t stride, int64_t dilation, int64_t groups,
                            int64_t residual_input, std::string_view act, double slope);

// Gives the memory of maps that conv_norm_act_packed keeps for the next ones back to the system.
void release_maps();

}  // namespace dla_fast::cpu
