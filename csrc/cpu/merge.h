// The IDA node: z = sum_i W_i * x_i with a k x k kernel, inputs upsampled on the way, then the normalisation tail.

#pragma once

#include <ATen/core/List.h>

#include <string_view>
#include <tuple>

#include "common.h"

namespace dla_fast::cpu {

// up_weights: of those inputs whose factor is not 1, in order.
Tensor merge_inference(at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
                       const OptionalTensor& conv_bias, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                       const Tensor& running_mean, const Tensor& running_var, at::IntArrayRef factors, double eps,
                       std::string_view act, double slope);

std::tuple<Tensor, Tensor, Tensor> merge_stage(at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
                                               const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                                               const OptionalTensor& running_var, at::IntArrayRef factors,
                                               double momentum, bool moments);

// need_dx and need_dup (of the up-weights) say what is computed; dz needs sum_dy and sum_dy_xhat in training.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> merge_backward(
    const Tensor& dy, at::TensorList xs, at::TensorList up_weights, const Tensor& weight, const Tensor& z,
    const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
    const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat, at::IntArrayRef factors, double count, double eps,
    std::string_view act, double slope, const c10::List<bool>& need_dx, const c10::List<bool>& need_dup, bool need_dw);

// The inputs of a node in the layout it computes in, and how each is upsampled.
struct MergeInputs {
  bool channels_last;
  int64_t images, height, width, in_channels, out_channels;
  std::vector<Tensor> xs, ups;  // an undefined up-weight where the input is taken as it is
  std::vector<int64_t> factors, offsets;

  MergeInputs(at::TensorList xs, at::TensorList up_weights, at::IntArrayRef factors, const Tensor& weight);
  bool empty() const { return images * height * width * out_channels == 0; }
  Tensor full(size_t i) const;  // input i at the output's size
  std::vector<Tensor> all_full() const;
  Tensor output(const Tensor& weight) const;
};

}  // namespace dla_fast::cpu
