// What is done to an input before it is multiplied: y = act(norm(z) + residual) of the unit before, whose z is given.

#pragma once

#include <tuple>
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
};

// The inputs, y in the place of z.
std::vector<Tensor> formed(at::TensorList xs, const Prologue& prologue);

// From the gradient of y: dy', that of what is activated, and its sums alone and times x_hat, a value a channel.
std::tuple<Tensor, Tensor, Tensor> through(const Tensor& dy, const Tensor& z, const Prologue& prologue);

}  // namespace dla_fast::cpu
