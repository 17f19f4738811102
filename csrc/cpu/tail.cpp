// The normalisation tail y = act((z - mean) * gamma * rstd + beta + residual) and its backward, CPU.
//
// Traffic in elements of z (N of them): moments N; tail 2N, backward reduce 2N, backward apply 3N, and N more each for
// a residual. About 10 flops an element, so every pass is bound by memory.

#include "tail.h"

#include <algorithm>

namespace dla_fast::cpu {
namespace {

template <class T>
Strided<const T> part(const OptionalTensor& t, int64_t offset, int64_t ld) {
  return {t.has_value() ? t->const_data_ptr<T>() + offset : nullptr, ld};
}

OptionalTensor in_format(const OptionalTensor& t, bool channels_last) {
  return t.has_value() ? OptionalTensor(t->contiguous(format_of(channels_last))) : std::nullopt;
}

}  // namespace

template <class A>
std::vector<A> batch_term(const OptionalTensor& sum, double count, int64_t channels) {
  std::vector<A> out(channels, A(0));
  if (sum.has_value() && count > 0) {
    const Tensor s = sum->to(c10::CppTypeToScalarType<A>::value).contiguous();
    const A* p = s.const_data_ptr<A>();
    for (int64_t i = 0; i < channels; ++i) out[i] = static_cast<A>(p[i] / count);
  }
  return out;
}

template std::vector<float> batch_term<float>(const OptionalTensor&, double, int64_t);
template std::vector<double> batch_term<double>(const OptionalTensor&, double, int64_t);

std::tuple<Tensor, Tensor> moments(const Tensor& z_in, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, double momentum) {
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = z_in.contiguous(format_of(channels_last));
  const auto options = z.options().dtype(accumulation_type(z.scalar_type()));
  Tensor mean = at::empty({z.size(1)}, options), var = at::empty({z.size(1)}, options);
  DLA_DISPATCH_FLOATING(z.scalar_type(), "moments", [&] {
    using A = acc_t<scalar_t>;
    const Tiling tiling = Tiling::for_sums(z, channels_last);
    MomentPartials<A> partials(tiling.groups * tiling.fold, z.size(1));
    const scalar_t* data = z.const_data_ptr<scalar_t>();
    parallel_queue(tiling.count(), tiling.block_rows * tiling.block_cols, [&](const auto& take) {
      for (int64_t i = take(); i >= 0; i = take()) {
        const Tile t = tiling[i];
        const int64_t at = t.group * tiling.channels + t.channel;
        kernels<scalar_t>().moments(t.shape, {data + t.offset, tiling.ld()}, &partials.mean[at], &partials.m2[at],
                                    &partials.delta[at]);
        if (t.channel == 0)
          std::fill_n(&partials.count[t.group * tiling.fold], tiling.fold, tiling.group_size(t.group));
      }
    });
    partials.finalise(mean, var);
  });
  update_running(running_mean, running_var, mean, var, std::nullopt, momentum, z.size(0) * z.size(2) * z.size(3));
  return {mean, var};
}

Tensor tail(const Tensor& z_in, const Tensor& mean, const Tensor& var, const OptionalTensor& bn_weight,
            const OptionalTensor& bn_bias, const OptionalTensor& residual_in, double eps, std::string_view act,
            double slope) {
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = z_in.contiguous(format_of(channels_last));
  const OptionalTensor residual = in_format(residual_in, channels_last);
  Tensor y = empty_output(z.sizes(), z.options().memory_format(format_of(channels_last)));
  DLA_DISPATCH_FLOATING(z.scalar_type(), "tail", [&] {
    NormVectors<acc_t<scalar_t>> norm(mean, var, std::nullopt, bn_weight, bn_bias, eps, act, slope);
    const Tiling tiling(z, channels_last);
    norm.repeat(tiling.fold);
    const scalar_t* zp = z.const_data_ptr<scalar_t>();
    scalar_t* yp = y.mutable_data_ptr<scalar_t>();
    backwards_queue(tiling.count(), tiling.block_rows * tiling.block_cols, [&](const auto& take) {
      for (int64_t i = take(); i >= 0; i = take()) {
        const Tile t = tiling[i];
        kernels<scalar_t>().tail(t.shape, norm.from(t.channel), {zp + t.offset, tiling.ld()},
                                 part<scalar_t>(residual, t.offset, tiling.ld()), {yp + t.offset, tiling.ld()});
      }
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> tail_backward_reduce(const Tensor& dy_in, const Tensor& z_in, const Tensor& mean,
                                                const Tensor& var, const OptionalTensor& bn_weight,
                                                const OptionalTensor& bn_bias, const OptionalTensor& residual_in,
                                                double eps, std::string_view act, double slope) {
  const bool channels_last = is_channels_last(z_in);
  const Tensor z = z_in.contiguous(format_of(channels_last)), dy = dy_in.contiguous(format_of(channels_last));
  const OptionalTensor residual = in_format(residual_in, channels_last);
  const auto options = z.options().dtype(accumulation_type(z.scalar_type()));
  Tensor sum_dy = at::empty({z.size(1)}, options), sum_dy_xhat = at::empty({z.size(1)}, options);
  DLA_DISPATCH_FLOATING(z.scalar_type(), "tail_backward_reduce", [&] {
    using A = acc_t<scalar_t>;
    NormVectors<A> norm(mean, var, std::nullopt, bn_weight, bn_bias, eps, act, slope);
    const Tiling tiling = Tiling::for_sums(z, channels_last);
    norm.repeat(tiling.fold);
    const int64_t channels = tiling.channels;
    std::vector<double> partial(2 * tiling.groups * channels, 0.0);
    double* first = partial.data();
    double* second = first + tiling.groups * channels;
    const scalar_t* zp = z.const_data_ptr<scalar_t>();
    const scalar_t* dp = dy.const_data_ptr<scalar_t>();
    parallel_queue(tiling.count(), tiling.block_rows * tiling.block_cols, [&](const auto& take) {
      for (int64_t i = take(); i >= 0; i = take()) {
        const Tile t = tiling[i];
        const int64_t at = t.group * channels + t.channel;
        kernels<scalar_t>().reduce(t.shape, norm.from(t.channel), {dp + t.offset, tiling.ld()},
                                   {zp + t.offset, tiling.ld()}, part<scalar_t>(residual, t.offset, tiling.ld()),
                                   first + at, second + at);
      }
    });
    A* out[2] = {sum_dy.mutable_data_ptr<A>(), sum_dy_xhat.mutable_data_ptr<A>()};
    for (int which = 0; which < 2; ++which) {
      const double* from = which == 0 ? first : second;
      const int64_t own = z.size(1);
      std::vector<double> sum(own, 0.0);
      for (int64_t g = 0; g < tiling.groups * tiling.fold; ++g) {
        for (int64_t c = 0; c < own; ++c) sum[c] += from[g * own + c];
      }
      for (int64_t c = 0; c < own; ++c) out[which][c] = static_cast<A>(sum[c]);
    }
  });
  return {sum_dy, sum_dy_xhat};
}

std::tuple<Tensor, Tensor> tail_backward_apply(const Tensor& dy_in, const Tensor& z_in, const Tensor& mean,
                                               const Tensor& var, const OptionalTensor& bn_weight,
                                               const OptionalTensor& bn_bias, const OptionalTensor& residual_in,
                                               const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat,
                                               double count, double eps, std::string_view act, double slope,
                                               bool residual_grad) {
  const bool channels_last = is_channels_last(z_in);
  const auto format = format_of(channels_last);
  const Tensor z = z_in.contiguous(format), dy = dy_in.contiguous(format);
  const OptionalTensor residual = in_format(residual_in, channels_last);
  Tensor dz = empty_output(z.sizes(), z.options().memory_format(format));
  Tensor du = residual_grad ? empty_output(z.sizes(), z.options().memory_format(format)) : at::empty({0}, z.options());
  DLA_DISPATCH_FLOATING(z.scalar_type(), "tail_backward_apply", [&] {
    using A = acc_t<scalar_t>;
    NormVectors<A> norm(mean, var, std::nullopt, bn_weight, bn_bias, eps, act, slope);
    const Tiling tiling(z, channels_last);
    norm.repeat(tiling.fold);
    const std::vector<A> m0 = repeated(batch_term<A>(sum_dy, count, z.size(1)), tiling.fold),
                         m1 = repeated(batch_term<A>(sum_dy_xhat, count, z.size(1)), tiling.fold);
    const scalar_t* zp = z.const_data_ptr<scalar_t>();
    const scalar_t* dp = dy.const_data_ptr<scalar_t>();
    scalar_t* out = dz.mutable_data_ptr<scalar_t>();
    scalar_t* dup = residual_grad ? du.mutable_data_ptr<scalar_t>() : nullptr;
    const auto& k = kernels<scalar_t>();
    backwards_queue(tiling.count(), tiling.block_rows * tiling.block_cols, [&](const auto& take) {
      constexpr bool in_place = std::is_same_v<scalar_t, A>;
      const int64_t size = in_place ? 0 : tiling.block_rows * tiling.block_cols;
      const Scratch<A> dz_tile(size), du_tile(residual_grad ? size : 0);
      for (int64_t i = take(); i >= 0; i = take()) {
        const Tile t = tiling[i];
        const int64_t ld = tiling.ld(), cols = t.shape.cols;
        const auto apply = [&](Strided<A> to_dz, Strided<A> to_du) {
          k.apply(t.shape, norm.from(t.channel), m0.data() + t.channel, m1.data() + t.channel, {dp + t.offset, ld},
                  {zp + t.offset, ld}, part<scalar_t>(residual, t.offset, ld), to_dz, to_du);
        };
        if constexpr (in_place) {
          apply({out + t.offset, ld}, {residual_grad ? dup + t.offset : nullptr, ld});
        } else {
          apply({dz_tile.get(), cols}, {residual_grad ? du_tile.get() : nullptr, cols});
          k.store({dz_tile.get(), cols}, {out + t.offset, ld}, t.shape.rows, cols);
          if (residual_grad) k.store({du_tile.get(), cols}, {dup + t.offset, ld}, t.shape.rows, cols);
        }
      }
    });
  });
  return {dz, du};
}

}  // namespace dla_fast::cpu
