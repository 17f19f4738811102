// Backward of the IDA node, CPU. K = sum of the inputs' channels, N = output channels.
//
// Per output pixel: 6N + 2K values and, for a 3x3 kernel, 16KN flops by Winograd's algorithm (a sum of products takes
// 36KN). dz is formed once; dx is a convolution of it with the flipped weight, dW one of the inputs with it. An
// upsampled input is upsampled again rather than kept, and no gradient of a concat exists.

#include "aggregate.h"
#include "convolution.h"
#include "merge.h"
#include "tail.h"
#include "upsample.h"

namespace dla_fast::cpu {
namespace {

// A gradient as the fakes promise it, whatever strides the library chose.
Tensor in_layout(const Tensor& t, at::MemoryFormat format) {
  Tensor out = empty_output(t.sizes(), t.options().memory_format(format));
  return out.strides() == t.strides() ? t : out.copy_(t);
}

// The same of a weight's gradient, which may be in the accumulation type.
Tensor like(const Tensor& t, const Tensor& weight) {
  const Tensor out = at::empty_like(weight);
  return out.strides() == t.strides() && out.scalar_type() == t.scalar_type() ? t : out.copy_(t);
}

// The gradients of the inputs that need one, at the size of dz; the others stay empty.
template <class T>
std::vector<Tensor> input_gradients(const Tensor& dz, const MergeInputs& in, const Tensor& weight,
                                    const c10::List<bool>& needed) {
  using A = acc_t<T>;
  std::vector<Tensor> dxs;
  std::vector<T*> out;
  std::vector<Panel> panels;
  for (size_t i = 0; i < in.xs.size(); ++i) {
    const int64_t channels = in.xs[i].size(1);
    dxs.push_back(needed.get(i) ? empty_output({in.images, channels, in.height, in.width},
                                               dz.options().memory_format(format_of(in.channels_last)))
                                : at::empty({0}, dz.options().memory_format(std::nullopt)));
    out.push_back(dxs.back().template mutable_data_ptr<T>());
    if (needed.get(i)) Panel::add(panels, in.offsets[i], channels);
  }
  if (panels.empty() || in.empty()) return dxs;
  MergeInputs gradient({dz}, {}, {1}, weight.transpose(0, 1));
  gradient.channels_last = in.channels_last;
  const int64_t pixels = in.height * in.width;
  convolve<T>(gradient, weight, true, std::move(panels),
              [&](const Shape& shape, const PixelRow& row, int64_t channel, Strided<const A> z) {
                size_t i = in.offsets.size() - 1;
                while (in.offsets[i] > channel) --i;
                const int64_t channels = in.xs[i].size(1), c = channel - in.offsets[i],
                              pixel = row.h * in.width + row.w;
                const Strided<T> to = in.channels_last
                                          ? Strided<T>{out[i] + (row.image * pixels + pixel) * channels + c, channels}
                                          : Strided<T>{out[i] + (row.image * channels + c) * pixels + pixel, pixels};
                kernels<T>().store(z, to, shape.rows, shape.cols);
              });
  return dxs;
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
    dw = at::empty({0}, options);
    const Tensor dz = std::get<0>(tail_backward_apply(dy, z, mean, var, bn_weight, bn_bias, std::nullopt, sum_dy,
                                                      sum_dy_xhat, count, eps, act, slope, false))
                          .contiguous(format);
    DLA_DISPATCH_FLOATING(weight.scalar_type(), "merge_backward", [&] {
      dxs = input_gradients<scalar_t>(dz, in, weight, need_full);
      if (need_dw) dw = like(convolution_weight_gradient<scalar_t>(dz, in, in.all_full(), weight), weight);
    });
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
