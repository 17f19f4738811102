// y = act(BN(sum_i W_i * up_i(x_i)) + residual): a convolution of several inputs without their concatenation, with the
// normalisation tail behind it. dla_fast/ops/conv_norm_act.py has the schemas.
//
// Every tensor may have any strides. Outputs and gradients are channels_last if the weight or every input is.

#pragma once

#include <tuple>
#include <vector>

#include "tensors.h"

namespace c10 {
template <class T>
class List;
}

namespace dla_fast::cpu {

Tensor conv_norm_act_inference(at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
                               const OptionalTensor& conv_bias, const OptionalTensor& residual,
                               const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                               const Tensor& running_mean, const Tensor& running_var, at::IntArrayRef factors,
                               int64_t stride, int64_t dilation, int64_t groups, int64_t residual_input, double eps,
                               std::string_view act, double slope);

// z without the bias, and its moments, empty when they are not asked for. pre_*: see prologue.h.
std::tuple<Tensor, Tensor, Tensor> conv_norm_act_stage(
    at::TensorList xs, at::TensorList up_weights, const Tensor& weight, const OptionalTensor& conv_bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, at::IntArrayRef factors, int64_t stride,
    int64_t dilation, int64_t groups, double momentum, bool moments, int64_t pre_input,
    const OptionalTensor& pre_residual, const OptionalTensor& pre_mean, const OptionalTensor& pre_var,
    const OptionalTensor& pre_weight, const OptionalTensor& pre_bias, double pre_eps, std::string_view pre_act,
    double pre_slope);

// Gradients of xs, up_weights, weight and residual, each where it is needed. Where `through` is said that of the input
// with a prologue is dy', the gradient of what the prologue activates, and the last list has its sums, of dy' and of
// dy' * x_hat; else it is the gradient of y, and there are none. carried: is added to the gradient of the first input.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, std::vector<Tensor>> conv_norm_act_backward(
    const Tensor& dy, at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
    const OptionalTensor& residual, const Tensor& z, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& sum_dy,
    const OptionalTensor& sum_dy_xhat, at::IntArrayRef factors, int64_t stride, int64_t dilation, int64_t groups,
    int64_t residual_input, int64_t count, double eps, std::string_view act, double slope,
    const c10::List<bool>& need_dx, const c10::List<bool>& need_dup, bool need_dw, bool need_dresidual,
    int64_t pre_input, const OptionalTensor& pre_residual, const OptionalTensor& pre_mean,
    const OptionalTensor& pre_var, const OptionalTensor& pre_weight, const OptionalTensor& pre_bias, double pre_eps,
    std::string_view pre_act, double pre_slope, bool through, const OptionalTensor& carried);

}  // namespace dla_fast::cpu
