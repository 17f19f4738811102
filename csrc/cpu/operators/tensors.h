// What the operators share: dtypes, memory layouts, the normalisation as it is given.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../shared/norm.h"

namespace dla_fast::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls f with a value of the C++ type.
template <class F>
void dispatch(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    case at::kBFloat16:
      return f(c10::BFloat16());
    case at::kHalf:
      return f(c10::Half());
    default:
      TORCH_CHECK_TYPE(false, "expected a floating dtype, got ", type);
  }
}

inline bool is_channels_last(const Tensor& t) {
  return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

inline at::MemoryFormat format_of(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Values in the order of a layout, whatever the strides were: kernels walk them as one block of memory.
inline Tensor arranged(const Tensor& t, bool channels_last) {
  return t.contiguous(format_of(channels_last));
}
inline OptionalTensor arranged(const OptionalTensor& t, bool channels_last) {
  return t.has_value() ? OptionalTensor(arranged(*t, channels_last)) : std::nullopt;
}

// A new map for what a kernel is about to write whole, with the dtype of `like`; a large one is a reused_map.
Tensor empty_map(const Tensor& like, at::IntArrayRef sizes, bool channels_last);

// What stands for a result that was not asked for.
Tensor nothing(const Tensor& like);

// One value a channel in the dtype that sums are kept in.
Tensor empty_statistics(const Tensor& like, int64_t channels);

template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

// The activation of a name.
Act act_of(std::string_view name);

// The normalisation of a call. Each vector may have any dtype and stride.
struct NormArgs {
  const Tensor &mean, &var;
  const OptionalTensor &weight, &bias;
  double eps;
  std::string_view act;
  double slope;

  template <class A>
  NormVectors<A> vectors(const OptionalTensor& conv_bias = std::nullopt) const;
};

// The sums over the batch that its statistics take from a gradient; none where they are frozen.
struct BatchSums {
  const OptionalTensor &dy, &dy_xhat;
  int64_t count;
};

template <class T>
TailGradient<T> tail_gradient(const NormArgs& norm, const BatchSums& sums, const Tensor& dy, const Tensor& z,
                              const OptionalTensor& residual);

// Moves the running statistics towards a batch's, as aten's batch norm does (unbiased variance); the mean of the
// convolution's output is that of z plus the bias that was left out of it. Nothing happens for an empty batch.
void update_running(const OptionalTensor& running_mean, const OptionalTensor& running_var, const Tensor& mean,
                    const Tensor& var, const OptionalTensor& conv_bias, double momentum, int64_t count);

}  // namespace dla_fast::cpu
