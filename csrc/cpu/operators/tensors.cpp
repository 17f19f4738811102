#include "tensors.h"

#include <ATen/ops/empty.h>

#include <cmath>
#include <string>
#include <vector>

#include "../shared/reused.h"
#include "../shared/scratch.h"
#include "reused_maps.h"

namespace dla_fast::cpu {
namespace {

at::ScalarType accumulation_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Value by value, of any dtype and stride: an operator of the library's would take longer than all of them.
template <class A>
std::vector<A> vector_of(const OptionalTensor& t, int64_t n, A otherwise) {
  std::vector<A> out(n, otherwise);
  if (!t.has_value()) return out;
  TORCH_CHECK_VALUE(t->dim() == 1 && t->numel() == n, "expected (", n, ") channels, got ", t->sizes());
  dispatch(t->scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* data = t->const_data_ptr<T>();
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(data[i * t->stride(0)]);
  });
  return out;
}

// sum / count per channel; nothing where there is no sum.
template <class A>
std::vector<A> batch_term(const OptionalTensor& sum, int64_t count, int64_t channels) {
  if (!sum.has_value()) return {};
  if (!(count > 0)) return std::vector<A>(channels, A(0));
  std::vector<A> out = vector_of<A>(sum, channels, A(0));
  for (A& v : out) v = static_cast<A>(v / static_cast<double>(count));
  return out;
}

}  // namespace

Act act_of(std::string_view name) {
  if (name == "identity") return Act::identity;
  if (name == "relu") return Act::relu;
  if (name == "silu") return Act::silu;
  if (name == "leaky_relu") return Act::leaky_relu;
  if (name == "hardswish") return Act::hardswish;
  TORCH_CHECK_VALUE(false, "act: unknown activation '", std::string(name), "'");
}

Tensor empty_map(const Tensor& like, at::IntArrayRef sizes, bool channels_last) {
#if !defined(__SANITIZE_ADDRESS__)
  // The sanitizer knows only what is freed and made anew.
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * like.element_size();
  if (bytes >= kReused) return reused_map(like, sizes, channels_last);
#endif
  Tensor out = at::empty(sizes, like.options().memory_format(format_of(channels_last)));
  want_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

Tensor nothing(const Tensor& like) {
  return at::empty({0}, like.options());
}

Tensor empty_statistics(const Tensor& like, int64_t channels) {
  return at::empty({channels}, like.options().dtype(accumulation_type(like)));
}

template <class A>
NormVectors<A> NormArgs::vectors(const OptionalTensor& conv_bias) const {
  const int64_t n = mean.numel();
  NormVectors<A> out;
  out.act = act_of(act);
  out.slope = static_cast<A>(slope);
  out.center = vector_of<A>(mean, n, A(0));
  if (conv_bias.has_value()) {
    const std::vector<A> b = vector_of<A>(conv_bias, n, A(0));
    for (int64_t i = 0; i < n; ++i) out.center[i] -= b[i];
  }
  out.rstd = vector_of<A>(var, n, A(0));
  for (A& v : out.rstd) v = static_cast<A>(1.0 / std::sqrt(static_cast<double>(v) + eps));
  out.scale = vector_of<A>(weight, n, A(1));
  for (int64_t i = 0; i < n; ++i) out.scale[i] *= out.rstd[i];
  out.shift = vector_of<A>(bias, n, A(0));
  return out;
}

template NormVectors<float> NormArgs::vectors(const OptionalTensor&) const;
template NormVectors<double> NormArgs::vectors(const OptionalTensor&) const;

template <class T>
TailGradient<T> tail_gradient(const NormArgs& norm, const BatchSums& sums, const Tensor& dy, const Tensor& z,
                              const OptionalTensor& residual) {
  using A = acc_t<T>;
  const int64_t n = norm.mean.numel();
  return {norm.vectors<A>(),
          batch_term<A>(sums.dy, sums.count, n),
          batch_term<A>(sums.dy_xhat, sums.count, n),
          dy.const_data_ptr<T>(),
          z.const_data_ptr<T>(),
          data_or_null<T>(residual)};
}

#define DLA_INSTANTIATE(T)                                                                                \
  template TailGradient<T> tail_gradient(const NormArgs&, const BatchSums&, const Tensor&, const Tensor&, \
                                         const OptionalTensor&);

DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(c10::BFloat16)
DLA_INSTANTIATE(c10::Half)

void update_running(const OptionalTensor& running_mean, const OptionalTensor& running_var, const Tensor& mean,
                    const Tensor& var, const OptionalTensor& conv_bias, double momentum, int64_t count) {
  if (!running_mean.has_value() || count == 0) return;
  const int64_t n = mean.numel();
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  const std::vector<double> b = vector_of<double>(conv_bias, n, 0);
  std::vector<double> m = vector_of<double>(mean, n, 0), v = vector_of<double>(var, n, 0);
  for (int64_t i = 0; i < n; ++i) {
    m[i] += b[i];
    v[i] *= unbiased;
  }
  const auto move = [&](const Tensor& running, const std::vector<double>& to) {
    dispatch(running.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      T* data = running.mutable_data_ptr<T>();
      for (int64_t i = 0; i < n; ++i) {
        T& value = data[i * running.stride(0)];
        value = static_cast<T>((1 - momentum) * static_cast<double>(value) + momentum * to[i]);
      }
    });
  };
  move(*running_mean, m);
  move(*running_var, v);
}

}  // namespace dla_fast::cpu
