// The operators of dla_fast_cuda: tensors to pointers, memory for the results, the device and its stream.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "launch.h"

#if defined(DLA_FAST_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define DLA_KEY CUDA
#else
// The tests' build, which runs the kernels on the host.
#define DLA_KEY CPU
#endif

namespace dla_fast::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes a tensor's device the current one for as long as it lives, and knows the stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t)
#if defined(DLA_FAST_WITH_CUDA)
      : guard_(t.device()), stream{c10::cuda::getCurrentCUDAStream().stream(), processors()} {
  }

 private:
  c10::cuda::CUDAGuard guard_;

 public:
#else
      : stream{nullptr, processors()} {
    (void)t;
  }
#endif
  const Stream stream;
};

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Type::kDouble;
    case at::kFloat:
      return Type::kFloat;
    case at::kHalf:
      return Type::kHalf;
    case at::kBFloat16:
      return Type::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected a floating tensor, got ", t.scalar_type());
  }
}

Act act_of(std::string_view name) {
  if (name == "identity") return Act::kIdentity;
  if (name == "relu") return Act::kRelu;
  if (name == "silu") return Act::kSilu;
  if (name == "leaky_relu") return Act::kLeakyRelu;
  if (name == "hardswish") return Act::kHardswish;
  TORCH_CHECK_VALUE(false, "act: unknown activation '", std::string(name), "'");
}

bool is_channels_last(const Tensor& t) {
  return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

at::MemoryFormat format_of(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Tensor arranged(const Tensor& t, bool channels_last) {
  return t.contiguous(format_of(channels_last));
}

OptionalTensor arranged(const OptionalTensor& t, bool channels_last) {
  return t.has_value() ? OptionalTensor(arranged(*t, channels_last)) : std::nullopt;
}

Tensor like(const Tensor& t, at::IntArrayRef sizes, bool channels_last) {
  return at::empty(sizes, t.options().memory_format(format_of(channels_last)));
}

Tensor statistics(const Tensor& t, int64_t channels) {
  return at::empty(
      {channels},
      t.options().memory_format(std::nullopt).dtype(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat));
}

Tensor partial_sums(const Tensor& t, const Groups& groups, int64_t channels) {
  return at::empty({2, groups.count, channels}, t.options().memory_format(std::nullopt).dtype(at::kDouble));
}

const void* data(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

template <class... Tensors>
bool aligned(const Tensors&... tensors) {
  uintptr_t address = 0;
  const auto add = [&](const OptionalTensor& t) { address |= reinterpret_cast<uintptr_t>(data(t)); };
  (add(tensors), ...);
  return address % 16 == 0;
}

Map map_of(const Tensor& z, bool channels_last) {
  return {type_of(z), channels_last, z.size(0), z.size(1), z.size(2) * z.size(3)};
}

// The vectors of a norm, side by side in memory for as long as this lives.
class NormVectors {
 public:
  NormVectors(const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
              double eps, std::string_view act, double slope)
      : norm{keep(mean), keep(var), keep(weight), keep(bias), eps, act_of(act), slope} {}

  Vector keep(const OptionalTensor& t) {
    if (!t.has_value()) return {};
    kept_.push_back(t->contiguous());
    return {kept_.back().const_data_ptr(), type_of(kept_.back())};
  }

 private:
  std::vector<Tensor> kept_;

 public:
  const Norm norm;
};

// A vector that a kernel writes in place, whatever its stride.
class Updated {
 public:
  explicit Updated(const OptionalTensor& t) : given_(t) {
    if (t.has_value()) side_by_side_ = t->contiguous();
  }
  MutableVector vector() const {
    if (!given_.has_value()) return {};
    return {side_by_side_.mutable_data_ptr(), type_of(side_by_side_)};
  }
  void write_back() const {
    if (given_.has_value() && !side_by_side_.is_same(*given_)) given_->copy_(side_by_side_);
  }

 private:
  OptionalTensor given_;
  Tensor side_by_side_;
};

std::tuple<Tensor, Tensor> moments_op(const Tensor& z_in, const OptionalTensor& running_mean,
                                      const OptionalTensor& running_var, double momentum) {
  const OnDevice device(z_in);
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = arranged(z_in, channels_last);
  const Map map = map_of(z, channels_last);
  Tensor mean = statistics(z, map.channels), var = statistics(z, map.channels);
  if (map.values() == 0) {
    mean.zero_();
    var.zero_();
    return {mean, var};
  }
  const Groups groups = groups_of(map, device.stream, aligned(z));
  const Tensor partial = partial_sums(z, groups, map.channels);
  const Updated of_mean(running_mean), of_var(running_var);
  moments(device.stream, map, groups, z.const_data_ptr(), partial.mutable_data_ptr<double>(), mean.mutable_data_ptr(),
          var.mutable_data_ptr(), of_mean.vector(), of_var.vector(), momentum);
  of_mean.write_back();
  of_var.write_back();
  return {mean, var};
}

Tensor tail_op(const Tensor& z_in, const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight,
               const OptionalTensor& bn_bias, const OptionalTensor& residual_in, double eps, std::string_view act,
               double slope) {
  const OnDevice device(z_in);
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = arranged(z_in, channels_last);
  const OptionalTensor residual = arranged(residual_in, channels_last);
  Tensor y = like(z, z.sizes(), channels_last);
  const NormVectors vectors(mean, var, bn_weight, bn_bias, eps, act, slope);
  const Map map = map_of(z, channels_last);
  tail(device.stream, map, groups_of(map, device.stream, aligned(z, residual, y), vectors.norm.act), vectors.norm,
       z.const_data_ptr(), data(residual), y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor> tail_backward_reduce_op(const Tensor& dy_in, const Tensor& z_in, const Tensor& mean,
                                                   const Tensor& var, const OptionalTensor& bn_weight,
                                                   const OptionalTensor& bn_bias, const OptionalTensor& residual_in,
                                                   double eps, std::string_view act, double slope) {
  const OnDevice device(z_in);
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = arranged(z_in, channels_last), dy = arranged(dy_in, channels_last);
  const OptionalTensor residual = arranged(residual_in, channels_last);
  const NormVectors vectors(mean, var, bn_weight, bn_bias, eps, act, slope);
  const Map map = map_of(z, channels_last);
  Tensor sum_dy = statistics(z, map.channels), sum_dy_xhat = statistics(z, map.channels);
  const Groups groups = groups_of(map, device.stream, aligned(z, dy, residual), vectors.norm.act);
  const Tensor partial = partial_sums(z, groups, map.channels);
  tail_backward_reduce(device.stream, map, groups, vectors.norm, dy.const_data_ptr(), z.const_data_ptr(),
                       data(residual), partial.mutable_data_ptr<double>(), sum_dy.mutable_data_ptr(),
                       sum_dy_xhat.mutable_data_ptr());
  return {sum_dy, sum_dy_xhat};
}

std::tuple<Tensor, Tensor> tail_backward_apply_op(const Tensor& dy_in, const Tensor& z_in, const Tensor& mean,
                                                  const Tensor& var, const OptionalTensor& bn_weight,
                                                  const OptionalTensor& bn_bias, const OptionalTensor& residual_in,
                                                  const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat,
                                                  int64_t count, double eps, std::string_view act, double slope,
                                                  bool residual_grad) {
  const OnDevice device(z_in);
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = arranged(z_in, channels_last), dy = arranged(dy_in, channels_last);
  const OptionalTensor residual = arranged(residual_in, channels_last);
  Tensor dz = like(z, z.sizes(), channels_last);
  Tensor du = residual_grad ? like(z, z.sizes(), channels_last) : at::empty({0}, z.options());
  NormVectors vectors(mean, var, bn_weight, bn_bias, eps, act, slope);
  const Map map = map_of(z, channels_last);
  tail_backward_apply(device.stream, map,
                      groups_of(map, device.stream, aligned(z, dy, residual, dz, du), vectors.norm.act), vectors.norm,
                      dy.const_data_ptr(), z.const_data_ptr(), data(residual), vectors.keep(sum_dy),
                      vectors.keep(sum_dy_xhat), count > 0 ? 1.0 / count : 0.0, dz.mutable_data_ptr(),
                      residual_grad ? du.mutable_data_ptr() : nullptr);
  return {dz, du};
}

Upsampling upsampling_of(const Tensor& x, int64_t factor, bool channels_last, bool is_aligned) {
  return {type_of(x), channels_last, is_aligned, x.size(0), x.size(1), x.size(2), x.size(3), factor};
}

Tensor upsampled(const Tensor& x_in, const OptionalTensor& skip_in, const Tensor& weight_in, int64_t factor) {
  const OnDevice device(x_in);
  const bool channels_last = is_channels_last(x_in);
  const Tensor x = arranged(x_in, channels_last), weight = weight_in.contiguous();
  const OptionalTensor skip = arranged(skip_in, channels_last);
  const Upsampling sizes = upsampling_of(x, factor, channels_last, true);
  Tensor y =
      like(x, {sizes.images, sizes.channels, sizes.large(sizes.height), sizes.large(sizes.width)}, channels_last);
  upsample(device.stream, upsampling_of(x, factor, channels_last, aligned(x, skip, weight, y)), x.const_data_ptr(),
           weight.const_data_ptr(), data(skip), y.mutable_data_ptr());
  return y;
}

Tensor upsample_op(const Tensor& x, const Tensor& weight, int64_t factor) {
  return upsampled(x, std::nullopt, weight, factor);
}

Tensor upsample_add_op(const Tensor& x, const Tensor& skip, const Tensor& weight, int64_t factor) {
  return upsampled(x, skip, weight, factor);
}

std::tuple<Tensor, Tensor> upsample_backward_op(const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in,
                                                int64_t factor, bool need_dx, bool need_dw) {
  const OnDevice device(x_in);
  const bool channels_last = is_channels_last(x_in);
  const Tensor x = arranged(x_in, channels_last), dy = arranged(dy_in, channels_last), weight = weight_in.contiguous();
  Tensor dx = need_dx ? like(x, x.sizes(), channels_last) : at::empty({0}, x.options());
  Tensor dweight = at::empty(need_dw ? weight.sizes() : at::IntArrayRef{0}, weight.options());
  if (x.numel() == 0) {
    dweight.zero_();
    return {dx, dweight};
  }
  const Upsampling up = upsampling_of(x, factor, channels_last, aligned(x, dy, weight, dx));
  const int64_t blocks = need_dw ? upsample_backward_blocks(device.stream, up) : 0;
  const Tensor partial = statistics(x, blocks * up.channels * up.taps());
  upsample_backward(device.stream, up, dy.const_data_ptr(), x.const_data_ptr(), weight.const_data_ptr(),
                    partial.mutable_data_ptr(), need_dx ? dx.mutable_data_ptr() : nullptr,
                    need_dw ? dweight.mutable_data_ptr() : nullptr);
  return {dx, dweight};
}

// Of what the schema says, the aggregation node: a 1x1 kernel, stride 1, nothing upsampled, residual input 0 or none.
Tensor conv_norm_act_inference_op(at::TensorList xs_in, at::TensorList up_weights, const Tensor& weight_in,
                                  const OptionalTensor& conv_bias, const OptionalTensor& residual,
                                  const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                                  const Tensor& running_mean, const Tensor& running_var, at::IntArrayRef factors,
                                  int64_t stride, int64_t dilation, int64_t groups, int64_t residual_input, double eps,
                                  std::string_view act, double slope) {
  TORCH_CHECK_VALUE(weight_in.size(2) == 1 && weight_in.size(3) == 1, "weight: expected a 1x1 kernel, got ",
                    weight_in.size(2), "x", weight_in.size(3));
  TORCH_CHECK_VALUE(stride == 1, "stride: expected 1, got ", stride);
  TORCH_CHECK_VALUE(dilation == 1, "dilation: expected 1, got ", dilation);
  TORCH_CHECK_VALUE(groups == 1, "groups: expected 1, got ", groups);
  TORCH_CHECK_VALUE(up_weights.empty(), "up_weights: expected none, got ", up_weights.size());
  for (const int64_t factor : factors) TORCH_CHECK_VALUE(factor == 1, "factors: expected 1 each, got ", factor);
  TORCH_CHECK_VALUE(!residual.has_value(), "residual: expected none, or the first input");
  TORCH_CHECK_VALUE(residual_input == 0 || residual_input == -1, "residual_input: expected 0 or -1, got ",
                    residual_input);
  TORCH_CHECK_VALUE(!xs_in.empty() && xs_in.size() <= kMaxInputs, "xs: expected 1 to ", kMaxInputs, " inputs, got ",
                    xs_in.size());
  const OnDevice device(weight_in);
  bool channels_last = true;
  for (const Tensor& x : xs_in) channels_last = channels_last && is_channels_last(x);
  channels_last = channels_last || is_channels_last(weight_in);
  std::vector<Tensor> kept;
  Inputs xs{};
  bool is_aligned = true;
  for (const Tensor& x : xs_in) {
    kept.push_back(arranged(x, channels_last));
    xs.data[xs.count] = kept.back().const_data_ptr();
    xs.channels[xs.count++] = static_cast<int>(x.size(1));
    is_aligned = is_aligned && aligned(kept.back());
  }
  const Tensor weight = weight_in.contiguous();
  const auto x = kept[0].sizes();
  Tensor y = like(weight, {x[0], weight.size(0), x[2], x[3]}, channels_last);
  NormVectors vectors(running_mean, running_var, bn_weight, bn_bias, eps, act, slope);
  aggregate_inference(device.stream, map_of(y, channels_last), vectors.norm, xs, weight.const_data_ptr(),
                      vectors.keep(conv_bias), residual_input == 0, is_aligned && aligned(weight),
                      y.mutable_data_ptr());
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(dla_fast_cuda, DLA_KEY, m) {
  m.impl("moments", &moments_op);
  m.impl("tail", &tail_op);
  m.impl("tail_backward_reduce", &tail_backward_reduce_op);
  m.impl("tail_backward_apply", &tail_backward_apply_op);
  m.impl("upsample", &upsample_op);
  m.impl("upsample_add", &upsample_add_op);
  m.impl("upsample_backward", &upsample_backward_op);
  m.impl("conv_norm_act_inference", &conv_norm_act_inference_op);
}

}  // namespace dla_fast::cuda
