// The IDA node, CPU. K = sum of the inputs' channels, N = output channels.
//
// Per output pixel: inference reads K (an input that is upsampled on the way counts C / f^2) and writes N; the training
// stage the same, and the tail moves 2N more. A 3x3 kernel takes 8KN flops by Winograd's algorithm (winograd.h), a sum
// of products 18KN. The tail or the moments follow while z is in cache, so neither the concat nor the upsampled map
// exists.

#include "merge.h"

#include <algorithm>

#include "aggregate.h"
#include "convolution.h"

namespace dla_fast::cpu {

MergeInputs::MergeInputs(at::TensorList inputs, at::TensorList up_weights, at::IntArrayRef factors_in,
                         const Tensor& weight)
    : channels_last(is_channels_last(weight)), out_channels(weight.size(0)), factors(factors_in.vec()) {
  TORCH_CHECK_VALUE(!inputs.empty() && inputs.size() == factors.size(), "xs: expected one factor per input");
  bool all = true;
  for (const Tensor& x : inputs) all = all && is_channels_last(x);
  channels_last = channels_last || all;
  images = inputs[0].size(0);
  height = factors[0] > 1 ? upsampled(inputs[0].size(2), factors[0]) : inputs[0].size(2);
  width = factors[0] > 1 ? upsampled(inputs[0].size(3), factors[0]) : inputs[0].size(3);
  in_channels = 0;
  size_t up = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    xs.push_back(inputs[i].contiguous(format_of(channels_last)));
    offsets.push_back(in_channels);
    in_channels += inputs[i].size(1);
    TORCH_CHECK_VALUE(factors[i] == 1 || up < up_weights.size(), "up_weights: expected one per upsampled input");
    ups.push_back(factors[i] > 1 ? up_weights[up++] : Tensor());
  }
  TORCH_CHECK_VALUE(in_channels == weight.size(1), "weight: expected ", in_channels, " input channels, got ",
                    weight.size(1));
}

Tensor MergeInputs::full(size_t i) const {
  return factors[i] > 1 ? upsample(xs[i], ups[i], factors[i]) : xs[i];
}

std::vector<Tensor> MergeInputs::all_full() const {
  std::vector<Tensor> out;
  for (size_t i = 0; i < xs.size(); ++i) out.push_back(full(i));
  return out;
}

Tensor MergeInputs::output(const Tensor& weight) const {
  return empty_output({images, out_channels, height, width}, weight.options().memory_format(format_of(channels_last)));
}

namespace {

std::vector<Panel> all_panels(const MergeInputs& in) {
  std::vector<Panel> panels;
  Panel::add(panels, 0, in.out_channels);
  return panels;
}

// The part of an output that a row of pixels covers.
template <class T>
Strided<T> row_at(T* data, const MergeInputs& in, int64_t image, int64_t h, int64_t w, int64_t channel) {
  const int64_t pixel = h * in.width + w, pixels = in.height * in.width;
  if (in.channels_last) return {data + (image * pixels + pixel) * in.out_channels + channel, in.out_channels};
  return {data + (image * in.out_channels + channel) * pixels + pixel, pixels};
}

}  // namespace

Tensor merge_inference(at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
                       const OptionalTensor& conv_bias, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                       const Tensor& running_mean, const Tensor& running_var, at::IntArrayRef factors, double eps,
                       std::string_view act, double slope) {
  const MergeInputs in(xs, up_weights, factors, weight);
  if (weight.size(2) == 1) {
    return aggregate_inference(in.all_full(), weight, conv_bias, bn_weight, bn_bias, running_mean, running_var, eps,
                               false, act, slope);
  }
  Tensor y = in.output(weight);
  if (in.empty()) return y;
  DLA_DISPATCH_FLOATING(weight.scalar_type(), "merge_inference", [&] {
    using A = acc_t<scalar_t>;
    const NormVectors<A> norm(running_mean, running_var, conv_bias, bn_weight, bn_bias, eps, act, slope);
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    convolve<scalar_t>(in, weight, false, all_panels(in),
                       [&](const Shape& shape, const PixelRow& row, int64_t channel, Strided<const A> z) {
                         kernels<scalar_t>().tail_accumulated(shape, norm.from(channel), z, {nullptr, 0},
                                                              row_at(out, in, row.image, row.h, row.w, channel));
                       });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> merge_stage(at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
                                               const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                                               const OptionalTensor& running_var, at::IntArrayRef factors,
                                               double momentum, bool moments) {
  const MergeInputs in(xs, up_weights, factors, weight);
  if (weight.size(2) == 1) {
    return aggregate_stage(in.all_full(), weight, conv_bias, running_mean, running_var, momentum, moments);
  }
  Tensor z = in.output(weight);
  const auto options = weight.options().memory_format(std::nullopt).dtype(accumulation_type(weight.scalar_type()));
  const int64_t channels = moments ? in.out_channels : 0;
  Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  DLA_DISPATCH_FLOATING(weight.scalar_type(), "merge_stage", [&] {
    using A = acc_t<scalar_t>;
    const auto& k = kernels<scalar_t>();
    if (in.empty()) {
      if (moments) MomentPartials<A>(0, channels).finalise(mean, var);
      return;
    }
    MomentPartials<A> partials(moments ? grid_of(in).moment_groups() : 0, channels);
    scalar_t* out = z.mutable_data_ptr<scalar_t>();
    const auto keep = [&](const Shape& shape, const PixelRow& row, int64_t channel, Strided<const A> acc) {
      const Strided<scalar_t> to = row_at(out, in, row.image, row.h, row.w, channel);
      k.store(acc, to, shape.rows, shape.cols);
      if (!moments) return;
      const int64_t at = row.group * channels + channel;
      k.moments(shape, {to.data, to.ld}, &partials.mean[at], &partials.m2[at], &partials.delta[at]);
      if (channel == 0) partials.count[row.group] = shape.channels_are_rows ? shape.cols : shape.rows;
    };
    convolve<scalar_t>(in, weight, false, all_panels(in), keep);
    if (moments) partials.finalise(mean, var);
  });
  if (moments) {
    update_running(running_mean, running_var, mean, var, conv_bias, momentum, in.images * in.height * in.width);
  }
  return {z, mean, var};
}

}  // namespace dla_fast::cpu
