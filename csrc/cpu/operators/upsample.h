// IDA's learned upsampling: depthwise transposed convolution, kernel 2f, stride f, padding f / 2.

#pragma once

#include <tuple>

#include "tensors.h"

namespace dla_fast::cpu {

Tensor upsample(const Tensor& x, const Tensor& weight, int64_t factor);

Tensor upsample_add(const Tensor& x, const Tensor& skip, const Tensor& weight, int64_t factor);

std::tuple<Tensor, Tensor> upsample_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t factor,
                                             bool need_dx, bool need_dw);

// The same in a layout that the caller decides.
Tensor upsample_in(bool channels_last, const Tensor& x, const OptionalTensor& skip, const Tensor& weight,
                   int64_t factor);
std::tuple<Tensor, Tensor> upsample_backward_in(bool channels_last, const Tensor& dy, const Tensor& x,
                                                const Tensor& weight, int64_t factor, bool need_dx, bool need_dw);

}  // namespace dla_fast::cpu
