// The operators of the normalisation tail. Maps are taken in the layout of z.

#include "tail.h"

#include "../passes/map_passes.h"

namespace dla_fast::cpu {
namespace {

MapSize size_of(const Tensor& z, bool channels_last) {
  return {channels_last, z.size(0), z.size(1), z.size(2) * z.size(3)};
}

}  // namespace

std::tuple<Tensor, Tensor> moments(const Tensor& z_in, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, double momentum) {
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = arranged(z_in, channels_last);
  const MapSize size = size_of(z, channels_last);
  Tensor mean = empty_statistics(z, size.channels), var = empty_statistics(z, size.channels);
  dispatch(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    moments_pass(size, z.const_data_ptr<T>(), mean.mutable_data_ptr<acc_t<T>>(), var.mutable_data_ptr<acc_t<T>>());
  });
  update_running(running_mean, running_var, mean, var, std::nullopt, momentum, size.images * size.pixels);
  return {mean, var};
}

Tensor tail(const Tensor& z_in, const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight,
            const OptionalTensor& bn_bias, const OptionalTensor& residual_in, double eps, std::string_view act,
            double slope) {
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = arranged(z_in, channels_last);
  const OptionalTensor residual = arranged(residual_in, channels_last);
  const NormArgs norm = {mean, var, bn_weight, bn_bias, eps, act, slope};
  Tensor y = empty_map(z, z.sizes(), channels_last);
  dispatch(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    tail_pass(size_of(z, channels_last), norm.vectors<acc_t<T>>(), z.const_data_ptr<T>(), data_or_null<T>(residual),
              y.mutable_data_ptr<T>());
  });
  return y;
}

std::tuple<Tensor, Tensor> tail_backward_reduce(const Tensor& dy_in, const Tensor& z_in, const Tensor& mean,
                                                const Tensor& var, const OptionalTensor& bn_weight,
                                                const OptionalTensor& bn_bias, const OptionalTensor& residual_in,
                                                double eps, std::string_view act, double slope) {
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = arranged(z_in, channels_last), dy = arranged(dy_in, channels_last);
  const OptionalTensor residual = arranged(residual_in, channels_last);
  const NormArgs norm = {mean, var, bn_weight, bn_bias, eps, act, slope};
  Tensor sum_dy = empty_statistics(z, z.size(1)), sum_dy_xhat = empty_statistics(z, z.size(1));
  dispatch(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    reduce_pass(size_of(z, channels_last), tail_gradient<T>(norm, {std::nullopt, std::nullopt, 0}, dy, z, residual),
                sum_dy.mutable_data_ptr<acc_t<T>>(), sum_dy_xhat.mutable_data_ptr<acc_t<T>>());
  });
  return {sum_dy, sum_dy_xhat};
}

std::tuple<Tensor, Tensor> tail_backward_apply(const Tensor& dy_in, const Tensor& z_in, const Tensor& mean,
                                               const Tensor& var, const OptionalTensor& bn_weight,
                                               const OptionalTensor& bn_bias, const OptionalTensor& residual_in,
                                               const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat,
                                               int64_t count, double eps, std::string_view act, double slope,
                                               bool residual_grad) {
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = arranged(z_in, channels_last), dy = arranged(dy_in, channels_last);
  const OptionalTensor residual = arranged(residual_in, channels_last);
  const NormArgs norm = {mean, var, bn_weight, bn_bias, eps, act, slope};
  Tensor dz = empty_map(z, z.sizes(), channels_last);
  Tensor du = residual_grad ? empty_map(z, z.sizes(), channels_last) : nothing(z);
  dispatch(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    apply_pass(size_of(z, channels_last), tail_gradient<T>(norm, {sum_dy, sum_dy_xhat, count}, dy, z, residual),
               dz.mutable_data_ptr<T>(), residual_grad ? du.mutable_data_ptr<T>() : nullptr);
  });
  return {dz, du};
}

}  // namespace dla_fast::cpu
