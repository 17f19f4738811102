#include "prologue.h"

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

std::vector<Tensor> formed(at::TensorList xs, const Prologue& prologue) {
  std::vector<Tensor> out = xs.vec();
  if (!prologue.there()) return out;
  const auto& [i, residual, mean, var, weight, bias, eps, act, slope] = prologue;
  out[i] = tail(xs[i], *mean, *var, weight, bias, residual, eps, act, slope);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> through(const Tensor& dy, const Tensor& z, const Prologue& prologue) {
  const auto& [i, residual, mean, var, weight, bias, eps, act, slope] = prologue;
  const auto [sum_dy, sum_dy_xhat] = tail_backward_reduce(dy, z, *mean, *var, weight, bias, residual, eps, act, slope);
  const Tensor du = std::get<1>(tail_backward_apply(dy, z, *mean, *var, weight, bias, residual, std::nullopt,
                                                    std::nullopt, 0, eps, act, slope, true));
  return {du, sum_dy, sum_dy_xhat};
}

}  // namespace dla_fast::cpu
