// Forward of the node, CPU. K = sum of the inputs' channels, N = output channels.
//
// Per output pixel: inference reads K (an input that is upsampled on the way of a 3x3 kernel
// counts C / f^2) and writes N values; the training stage reads K and writes N, and the tail moves 2N more. The tail
// (inference) or the moments (training) follow while z is in cache, so neither the concatenation nor, with a 3x3
// kernel, the upsampled map exists.

#include "conv_norm_act.h"

#include <type_traits>

#include "exact.h"
#include "inference.h"

namespace dla_fast::cpu {
namespace {

// z; and its moments where mean is not null.
template <class T>
Tensor stage(const Node& node, acc_t<T>* mean, acc_t<T>* var) {
  using A = acc_t<T>;
  if (node.way() == Way::library) {
    const Tensor z = library_convolution(node);
    if (mean != nullptr) moments_pass(node.size(), z.const_data_ptr<T>(), mean, var);
    return z;
  }
  const NativeNode<T> product(node);
  Tensor z = node.map(node.out_channels);
  // Moments tell as well.
  Watch watch(!product->plain() && mean == nullptr);
  T* out = z.mutable_data_ptr<T>();
  A* in_place = nullptr;
  if constexpr (std::is_same_v<T, A>) in_place = out;
  MomentPartials<A> partials(mean == nullptr ? 0 : product->groups(), node.out_channels);
  const int64_t ld = node.channels_last ? node.out_channels : node.height * node.width;
  product->forward(in_place, [&](const Piece& piece, Strided<const A> values) {
    const auto& k = kernels<T>();
    const auto& [shape, group, channel, first] = piece;
    watch.see(values, shape);
    const Strided<T> to = {out + first, ld};
    if (static_cast<const void*>(values.data) != to.data) k.store(values, to, shape.rows, shape.cols);
    if (mean == nullptr) return;
    const int64_t at = group * node.out_channels + channel;
    k.moments(shape, {to.data, to.ld}, &partials.mean[at], &partials.m2[at], &partials.delta[at]);
    if (channel == 0) partials.count[group] = shape.channels_are_rows ? shape.cols : shape.rows;
  });
  bool again = watch.found();
  if (mean != nullptr) {
    partials.finalise(mean, var);
    for (int64_t c = 0; c < node.out_channels && !product->plain(); ++c) again = again || !std::isfinite(var[c]);
  }
  if (again) {
    repair(z, stage<T>(plainly(node), nullptr, nullptr));
    if (mean != nullptr) moments_pass(node.size(), z.template const_data_ptr<T>(), mean, var);
  }
  return z;
}

}  // namespace

Tensor conv_norm_act_inference(at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
                               const OptionalTensor& conv_bias, const OptionalTensor& residual_given,
                               const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                               const Tensor& running_mean, const Tensor& running_var, at::IntArrayRef factors,
                               int64_t stride, int64_t dilation, int64_t groups, int64_t residual_input, double eps,
                               std::string_view act, double slope) {
  const Node node(xs, up_weights, weight, factors, stride, dilation, groups);
  const NormArgs norm = {running_mean, running_var, bn_weight, bn_bias, eps, act, slope};
  const OptionalTensor residual = node.residual(residual_given, residual_input);
  Tensor y = node.map(node.out_channels);
  if (node.empty()) return y;
  dispatch(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const NormVectors<acc_t<T>> vectors = norm.vectors<acc_t<T>>(conv_bias);
    if (node.way() == Way::library) return infer_by_library<T>(node, vectors, residual, y);
    infer<T>(node, NativeNode<T>(node), vectors, residual, y);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv_norm_act_stage(
    at::TensorList xs, at::TensorList up_weights, const Tensor& weight, const OptionalTensor& conv_bias,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, at::IntArrayRef factors, int64_t stride,
    int64_t dilation, int64_t groups, double momentum, bool moments, int64_t pre_input,
    const OptionalTensor& pre_residual, const OptionalTensor& pre_mean, const OptionalTensor& pre_var,
    const OptionalTensor& pre_weight, const OptionalTensor& pre_bias, double pre_eps, std::string_view pre_act,
    double pre_slope) {
  const Prologue prologue = {pre_input, pre_residual, pre_mean, pre_var,  pre_weight,
                             pre_bias,  pre_eps,      pre_act,  pre_slope};
  prologue.check(xs);
  Node node(xs, up_weights, weight, factors, stride, dilation, groups);
  node.take(prologue, -1);
  const int64_t channels = moments ? node.out_channels : 0;
  Tensor mean = empty_statistics(weight, channels), var = empty_statistics(weight, channels), z;
  if (node.empty()) return {node.map(node.out_channels), mean.zero_(), var.zero_()};
  dispatch(weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    z = stage<T>(node, moments ? mean.mutable_data_ptr<A>() : nullptr, var.mutable_data_ptr<A>());
  });
  if (moments) {
    update_running(running_mean, running_var, mean, var, conv_bias, momentum, node.images * node.height * node.width);
  }
  return {z, mean, var};
}

}  // namespace dla_fast::cpu
