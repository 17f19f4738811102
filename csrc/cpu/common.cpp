#include "common.h"

#include <algorithm>
#include <cmath>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dla_fast::cpu {

Act parse_act(std::string_view name) {
  if (name == "identity") return Act::identity;
  if (name == "relu") return Act::relu;
  if (name == "silu") return Act::silu;
  if (name == "leaky_relu") return Act::leaky_relu;
  if (name == "hardswish") return Act::hardswish;
  TORCH_CHECK_VALUE(false, "act: unknown activation '", std::string(name), "'");
}

void want_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // The whole huge pages inside alone: their neighbours belong to others, and memory in use must not grow.
  constexpr size_t huge = size_t{1} << 21, enough = 2 * huge;
  if (bytes >= enough) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
    const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
    // Refused where the system has none, and then nothing is lost.
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor out = at::empty(sizes, options);
  want_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

namespace {

template <class A>
std::vector<A> vector_of(const OptionalTensor& t, int64_t n, A otherwise) {
  if (!t.has_value()) return std::vector<A>(n, otherwise);
  const Tensor c = t->to(c10::CppTypeToScalarType<A>::value).contiguous();
  TORCH_CHECK_VALUE(c.numel() == n, "expected ", n, " channels, got ", c.numel());
  return std::vector<A>(c.const_data_ptr<A>(), c.const_data_ptr<A>() + n);
}

}  // namespace

template <class A>
NormVectors<A>::NormVectors(const Tensor& mean, const Tensor& var, const OptionalTensor& conv_bias,
                            const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                            std::string_view act_name, double slope_value)
    : act(parse_act(act_name)), slope(static_cast<A>(slope_value)) {
  const int64_t n = mean.numel();
  center = vector_of<A>(mean, n, A(0));
  if (conv_bias.has_value()) {
    const std::vector<A> b = vector_of<A>(conv_bias, n, A(0));
    for (int64_t i = 0; i < n; ++i) center[i] -= b[i];
  }
  rstd = vector_of<A>(var, n, A(0));
  for (A& v : rstd) v = static_cast<A>(1.0 / std::sqrt(static_cast<double>(v) + eps));
  scale = vector_of<A>(weight, n, A(1));
  for (int64_t i = 0; i < n; ++i) scale[i] *= rstd[i];
  shift = vector_of<A>(bias, n, A(0));
}

template <class T>
std::vector<T> repeated(const std::vector<T>& values, int64_t times) {
  std::vector<T> out;
  out.reserve(values.size() * times);
  for (int64_t i = 0; i < times; ++i) out.insert(out.end(), values.begin(), values.end());
  return out;
}

template std::vector<float> repeated(const std::vector<float>&, int64_t);
template std::vector<double> repeated(const std::vector<double>&, int64_t);

template <class A>
void NormVectors<A>::repeat(int64_t times) {
  for (std::vector<A>* v : {&center, &rstd, &scale, &shift}) *v = repeated(*v, times);
}

template struct NormVectors<float>;
template struct NormVectors<double>;

Tiling::Tiling(const Tensor& t, bool channels_last, int64_t target)
    : channels_last(channels_last), images(t.size(0)), channels(t.size(1)), pixels(t.size(2) * t.size(3)) {
  if (channels_last) {
    while (channels > 0 && 2 * channels <= kChunk && images * pixels % 2 == 0 && images * pixels > 0) {
      fold *= 2;
      channels *= 2;
      pixels = images * pixels / 2;
      images = 1;
    }
    const int64_t total = images * pixels;
    block_rows = std::clamp<int64_t>(target / std::max<int64_t>(channels, 1), 16, 1024);
    block_cols = channels;
    groups = divide_up(total, block_rows);
    per_group = channels > 0 ? 1 : 0;
  } else {
    block_cols = std::min<int64_t>(std::max<int64_t>(pixels, 1), target);
    block_rows = std::clamp<int64_t>(target / block_cols, 1, std::max<int64_t>(channels, 1));
    groups = images * divide_up(pixels, block_cols);
    per_group = divide_up(channels, block_rows);
  }
}

Tile Tiling::operator[](int64_t i) const {
  const int64_t group = i / per_group;
  if (channels_last) {
    const int64_t first = group * block_rows;
    return {first * channels, group, 0, {std::min(block_rows, images * pixels - first), channels, false}};
  }
  const int64_t blocks = divide_up(pixels, block_cols);
  const int64_t image = group / blocks, col = group % blocks * block_cols, channel = i % per_group * block_rows;
  return {(image * channels + channel) * pixels + col,
          group,
          channel,
          {std::min(block_rows, channels - channel), std::min(block_cols, pixels - col), true}};
}

int64_t Tiling::group_size(int64_t group) const {
  if (channels_last) return std::min(block_rows, images * pixels - group * block_rows);
  return std::min(block_cols, pixels - group % divide_up(pixels, block_cols) * block_cols);
}

template <class A>
void MomentPartials<A>::finalise(Tensor& mean_out, Tensor& var_out) const {
  double total = 0;
  for (const int64_t n : count) total += static_cast<double>(n);
  A* mean_data = mean_out.mutable_data_ptr<A>();
  A* var_data = var_out.mutable_data_ptr<A>();
  if (total == 0) {
    std::fill_n(mean_data, channels, A(0));
    std::fill_n(var_data, channels, A(0));
    return;
  }
  parallel(channels, 8 * groups, [&](int64_t c0, int64_t c1) {
    std::vector<double> m(c1 - c0, 0.0), s(c1 - c0, 0.0);
    for (int64_t g = 0; g < groups; ++g) {
      const double n = static_cast<double>(count[g]);
      for (int64_t c = c0; c < c1; ++c) m[c - c0] += n * mean[g * channels + c] + delta[g * channels + c];
    }
    for (double& v : m) v /= total;
    for (int64_t g = 0; g < groups; ++g) {
      const double n = static_cast<double>(count[g]), inverse = 1 / n;
      for (int64_t c = c0; c < c1; ++c) {
        const double rest = delta[g * channels + c];
        const double off = mean[g * channels + c] + rest * inverse - m[c - c0];
        s[c - c0] += m2[g * channels + c] - rest * rest * inverse + n * off * off;
      }
    }
    for (int64_t c = c0; c < c1; ++c) {
      mean_data[c] = static_cast<A>(m[c - c0]);
      // A maximum that lets NaN through.
      const double v = s[c - c0] / total;
      var_data[c] = static_cast<A>(v < 0 ? 0 : v);
    }
  });
}

template struct MomentPartials<float>;
template struct MomentPartials<double>;

void update_running(const OptionalTensor& running_mean, const OptionalTensor& running_var, const Tensor& mean,
                    const Tensor& var, const OptionalTensor& conv_bias, double momentum, int64_t count) {
  if (!running_mean.has_value() || count == 0) return;
  const int64_t n = mean.numel();
  const std::vector<double> m = vector_of<double>(mean, n, 0), v = vector_of<double>(var, n, 0),
                            b = vector_of<double>(conv_bias, n, 0);
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  DLA_DISPATCH_FLOATING(running_mean->scalar_type(), "update_running", [&] {
    auto out = running_mean->accessor<scalar_t, 1>();
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<scalar_t>((1 - momentum) * static_cast<double>(out[i]) + momentum * (m[i] + b[i]));
    }
  });
  DLA_DISPATCH_FLOATING(running_var->scalar_type(), "update_running", [&] {
    auto out = running_var->accessor<scalar_t, 1>();
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<scalar_t>((1 - momentum) * static_cast<double>(out[i]) + momentum * v[i] * unbiased);
    }
  });
}

}  // namespace dla_fast::cpu
