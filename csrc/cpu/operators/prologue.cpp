#include "prologue.h"

#include "../passes/map_passes.h"
#include "tail.h"

namespace dla_fast::cpu {

void Prologue::check(at::TensorList xs) const {
  if (!there()) return;
  TORCH_CHECK_VALUE(input < static_cast<int64_t>(xs.size()), "pre_input: there is no input ", input);
  TORCH_CHECK_VALUE(mean.has_value() && var.has_value(), "pre_mean, pre_var: expected those of input ", input);
  const Tensor& z = xs[input];
  TORCH_CHECK_VALUE(mean->numel() == z.size(1) && var->numel() == z.size(1),
                    "pre_mean, pre_var: expected one value a channel of input ", input);
  TORCH_CHECK_VALUE(!residual.has_value() || residual->sizes() == z.sizes(),
                    "pre_residual: expected the shape of input ", input);
}

Tensor Prologue::form(const Tensor& z, bool channels_last) const {
  return arranged(tail(z, *mean, *var, weight, bias, residual, eps, act, slope), channels_last);
}

std::vector<Tensor> through(const Tensor& dy, bool channels_last, const Tensor& z_in, const Prologue& prologue) {
  const Tensor z = arranged(z_in, channels_last);
  const OptionalTensor residual = arranged(prologue.residual, channels_last);
  std::vector<Tensor> sums = {empty_statistics(z, z.size(1)), empty_statistics(z, z.size(1))};
  dispatch(z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const BatchSums none = {std::nullopt, std::nullopt, 0};
    through_pass({channels_last, z.size(0), z.size(1), z.size(2) * z.size(3)},
                 tail_gradient<T>(prologue.norm(), none, dy, z, residual), dy.mutable_data_ptr<T>(),
                 sums[0].mutable_data_ptr<acc_t<T>>(), sums[1].mutable_data_ptr<acc_t<T>>());
  });
  return sums;
}

}  // namespace dla_fast::cpu
