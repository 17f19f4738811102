// Backward of the IDA node, CPU. K = sum of the inputs' channels, N = output channels.
//
// Per output pixel: 6N + 2K values and 36KN flops for a 3x3 kernel. dz is formed once; dx and dW of each input come
// from the library's convolution, whose blocking of dW is better than a private dW per thread would be, one input at a
// time, so that no gradient of a concat exists. An upsampled input is upsampled again rather than kept.

#include <ATen/ops/convolution_backward.h>

#include "aggregate.h"
#include "merge.h"
#include "tail.h"
#include "upsample.h"

namespace dla_fast::cpu {
namespace {

// A gradient as the fakes promise it, whatever strides the library chose.
Tensor in_layout(const Tensor& t, at::MemoryFormat format) {
  Tensor out = at::empty(t.sizes(), t.options().memory_format(format));
  return out.strides() == t.strides() ? t : out.copy_(t);
}

}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> merge_backward(
    const Tensor& dy, at::TensorList xs, at::TensorList up_weights, const Tensor& weight, const Tensor& z,
    const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
    const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat, at::IntArrayRef factors, double count, double eps,
    std::string_view act, double slope, const c10::List<bool>& need_dx, const c10::List<bool>& need_dup, bool need_dw) {
  const MergeInputs in(xs, up_weights, factors, weight);
  const auto format = format_of(in.channels_last);
  const auto options = weight.options().memory_format(std::nullopt);
  // Of each input: whether its gradient is wanted at full resolution, and that of its up-weight.
  c10::List<bool> need_full;
  std::vector<bool> need_up;
  for (size_t i = 0, up = 0; i < in.xs.size(); ++i) {
    need_up.push_back(in.factors[i] > 1 && need_dup.get(up++));
    need_full.push_back(need_dx.get(i) || need_up[i]);
  }
  std::vector<Tensor> dxs, dups;
  Tensor dw;
  if (weight.size(2) == 1) {
    std::tie(dxs, dw) = aggregate_backward(dy, in.all_full(), weight, z, mean, var, bn_weight, bn_bias, sum_dy,
                                           sum_dy_xhat, count, eps, false, act, slope, need_full, need_dw);
  } else {
    dw = need_dw ? at::empty_like(weight) : at::empty({0}, options);
    const Tensor dz = std::get<0>(tail_backward_apply(dy, z, mean, var, bn_weight, bn_bias, std::nullopt, sum_dy,
                                                      sum_dy_xhat, count, eps, act, slope, false))
                          .contiguous(format);
    for (size_t i = 0; i < in.xs.size(); ++i) {
      Tensor dx = at::empty({0}, options);
      if (need_full.get(i) || need_dw) {
        const int64_t channels = in.xs[i].size(1);
        const Tensor part = weight.narrow(1, in.offsets[i], channels).contiguous(format);
        auto [dx_i, dw_i, unused] = at::convolution_backward(dz, in.full(i), part, std::nullopt, {1, 1}, {1, 1}, {1, 1},
                                                             false, {0, 0}, 1, {need_full.get(i), need_dw, false});
        if (need_full.get(i)) dx = in_layout(dx_i, format);
        if (need_dw) dw.narrow(1, in.offsets[i], channels).copy_(dw_i);
      }
      dxs.push_back(std::move(dx));
    }
  }
  for (size_t i = 0; i < in.xs.size(); ++i) {
    if (in.factors[i] == 1) continue;
    Tensor dx = at::empty({0}, options), dup = at::empty({0}, options);
    if (need_full.get(i)) {
      std::tie(dx, dup) = upsample_backward(dxs[i], in.xs[i], in.ups[i], in.factors[i], need_dx.get(i), need_up[i]);
    }
    dxs[i] = dx.dim() == 4 ? in_layout(dx, format) : std::move(dx);
    dups.push_back(std::move(dup));
  }
  return {std::move(dxs), std::move(dups), dw};
}

}  // namespace dla_fast::cpu
