// The aggregation node: z = sum_i W_i x_i without the concat, then the normalisation tail.

#pragma once

#include <ATen/core/List.h>

#include <string_view>
#include <tuple>

#include "common.h"

namespace dla_fast::cpu {

Tensor aggregate_inference(at::TensorList xs, const Tensor& weight, const OptionalTensor& conv_bias,
                           const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const Tensor& running_mean,
                           const Tensor& running_var, double eps, bool residual, std::string_view act, double slope);

std::tuple<Tensor, Tensor, Tensor> aggregate_stage(at::TensorList xs, const Tensor& weight,
                                                   const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var, double momentum, bool moments);

std::tuple<std::vector<Tensor>, Tensor> aggregate_backward(const Tensor& dy, at::TensorList xs, const Tensor& weight,
                                                           const Tensor& z, const Tensor& mean, const Tensor& var,
                                                           const OptionalTensor& bn_weight,
                                                           const OptionalTensor& bn_bias, const OptionalTensor& sum_dy,
                                                           const OptionalTensor& sum_dy_xhat, double count, double eps,
                                                           bool residual, std::string_view act, double slope,
                                                           const c10::List<bool>& need_dx, bool need_dw);

// The inputs of a node in the layout it computes in: copied once where they have another.
struct AggregateInputs {
  bool channels_last;
  int64_t images, pixels, in_channels, out_channels;
  std::vector<Tensor> xs;
  std::vector<int64_t> offsets;  // of each input's channels in the weight

  AggregateInputs(at::TensorList xs, const Tensor& weight);
  int64_t total() const { return images * pixels; }
  std::vector<int64_t> output_sizes() const;
};

// Rows of a channels_last tile: a multiple of the register tile; small enough that the last tiles of a call keep every
// thread busy.
int64_t tile_rows(int64_t total, int64_t weights);

// Tiles times groups of panels: as many tasks as keep the threads busy when there are few pixels.
struct Tasks {
  int64_t panels, groups, count;
  Tasks(int64_t tiles, int64_t panels);
  // The panels of a task.
  int64_t begin(int64_t task) const { return panels * (task % groups) / groups; }
  int64_t end(int64_t task) const { return panels * (task % groups + 1) / groups; }
};

}  // namespace dla_fast::cpu
