// What is done to an input before it is multiplied: y = act(norm(z) + residual) of the unit before, whose z is given.

#pragma once

#include <vector>

#include "tensors.h"

namespace dla_fast::cpu {

// The input that is given as z; none where its number is negative.
struct Prologue {
  int64_t input;
  const OptionalTensor &residual, &mean, &var, &weight, &bias;
  double eps;
  std::string_view act;
  double slope;

  bool there() const { return input >= 0; }
  NormArgs norm() const { return {*mean, *var, weight, bias, eps, act, slope}; }
  void check(at::TensorList xs) const;
  // y of z, in that layout.
  Tensor form(const Tensor& z, bool channels_last) const;
};

// Makes of the gradient of y, a map in that layout, dy', that of what is activated; and its sums alone and times x_hat,
// a value a channel.
std::vector<Tensor> through(const Tensor& dy, bool channels_last, const Tensor& z, const Prologue& prologue);

}  // namespace dla_fast::cpu
