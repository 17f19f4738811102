// The shared normalisation tail: moments, tail and its backward as operators of their own.

#pragma once

#include <tuple>

#include "tensors.h"

namespace dla_fast::cpu {

std::tuple<Tensor, Tensor> moments(const Tensor& z, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, double momentum);

Tensor tail(const Tensor& z, const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight,
            const OptionalTensor& bn_bias, const OptionalTensor& residual, double eps, std::string_view act,
            double slope);

std::tuple<Tensor, Tensor> tail_backward_reduce(const Tensor& dy, const Tensor& z, const Tensor& mean,
                                                const Tensor& var, const OptionalTensor& bn_weight,
                                                const OptionalTensor& bn_bias, const OptionalTensor& residual,
                                                double eps, std::string_view act, double slope);

std::tuple<Tensor, Tensor> tail_backward_apply(const Tensor& dy, const Tensor& z, const Tensor& mean, const Tensor& var,
                                               const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                                               const OptionalTensor& residual, const OptionalTensor& sum_dy,
                                               const OptionalTensor& sum_dy_xhat, int64_t count, double eps,
                                               std::string_view act, double slope, bool residual_grad);

}  // namespace dla_fast::cpu
