// Backward of the node, CPU. K = sum of the inputs' channels, N = output channels.
//
// Per output pixel: 3N + 2K values with a 1x1 kernel, whose dz is formed in cache; 6N + 2K with a 3x3 kernel, where it
// is formed once, or 4N + 2K where it is formed whenever it is read. A gradient that goes on through the norm of the
// unit before reads K more. An upsampled input is upsampled again rather than kept, and no gradient of a concatenation
// exists.

#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "conv_norm_act.h"
#include "exact.h"
#include "library.h"
#include "prologue.h"
#include "upsample.h"

namespace dla_fast::cpu {
namespace {

// A weight's gradient with the strides that the weight asks for.
Tensor like(const Tensor& t, const Tensor& weight) {
  if (t.strides() == weight.strides() && weight.is_non_overlapping_and_dense()) return t;
  const Tensor out = at::empty_like(weight);
  return out.strides() == t.strides() ? t : out.copy_(t);
}

// What is needed, and where it goes.
struct Needs {
  std::vector<bool> full;  // of each input at the size of the convolution's: for dx, or for that of an up-weight
  bool weight, residual;
  int64_t residual_input;
  bool through;            // the gradient of the input with a prologue goes on through that
  OptionalTensor carried;  // what is added to the gradient of the first input
};

struct Results {
  std::vector<Tensor> dxs;  // of the inputs, upsampled; undefined where not needed
  Tensor dw, dresidual;
  std::vector<Tensor> through_sums;  // where the product has taken them
  bool carried = false;              // it has added that
};

// The gradient that is added to that of the residual's input, or asked for by itself.
template <class T>
Tensor form(const Node& node, const TailGradient<T>& tail, const Needs& needs, Results& out) {
  const Tensor dz = node.map(node.out_channels);
  const int64_t r = needs.residual_input;
  Tensor du = out.dresidual;
  if (r >= 0 && needs.full[r]) du = node.map(node.out_channels);
  apply_pass(node.size(), tail, dz.mutable_data_ptr<T>(), du.defined() ? du.mutable_data_ptr<T>() : nullptr);
  if (!needs.residual) out.dresidual = du;
  return dz;
}

template <class T>
void by_library(const Node& node, const TailGradient<T>& tail, const Needs& needs, Results& out) {
  const Tensor dz = form(node, tail, needs, out);
  const LibraryGradients found = library_gradients(node, dz, needs.full, needs.weight);
  for (int64_t i = 0; i < node.count(); ++i) {
    if (!needs.full[i]) continue;
    out.dxs[i] = empty_map(dz, found.full[i].sizes(), node.channels_last).copy_(found.full[i]);
    if (i == needs.residual_input) out.dxs[i].add_(out.dresidual);
  }
  if (needs.weight) out.dw = like(found.weight, node.weight);
}

// Where the pixels lie that the stride of a 1x1 kernel takes.
Tensor scattered(const Tensor& dx, const Node& node) {
  if (node.kernel > 1 || node.stride == 1) return dx;
  const Tensor out =
      empty_map(dx, {node.images, dx.size(1), node.in_height, node.in_width}, node.channels_last).zero_();
  out.slice(2, 0, std::nullopt, node.stride).slice(3, 0, std::nullopt, node.stride).copy_(dx);
  return out;
}

template <class T>
void natively(const Node& node, const TailGradient<T>& tail, const Needs& needs, Results& out) {
  const NativeNode<T> product(node);
  Gradient<T> g = {tail, needs.residual_input, {}, nullptr, nullptr};
  for (int64_t i = 0; i < node.count(); ++i) {
    if (needs.full[i]) {
      const int64_t channels = node.xs[i].size(1);
      out.dxs[i] = node.kernel == 1 ? node.map(channels)
                                    : empty_map(node.weight, {node.images, channels, node.in_height, node.in_width},
                                                node.channels_last);
    }
    g.dx.push_back(needs.full[i] ? out.dxs[i].template mutable_data_ptr<T>() : nullptr);
  }
  Tensor dw, dz;
  if (needs.weight) dw = product.weight_gradient();
  g.dw = needs.weight ? dw.mutable_data_ptr<T>() : nullptr;
  std::vector<Tensor> full;
  if (product->forms_dz()) {
    g.dresidual = needs.residual ? out.dresidual.mutable_data_ptr<T>() : nullptr;
  } else {
    const int64_t r = needs.residual_input;
    const bool wants_du = needs.residual || (r >= 0 && needs.full[r]);
    // The others cost more than a map.
    const bool cheap = tail.norm.act != Act::silu && tail.norm.act != Act::hardswish;
    if (wants_du || !cheap || !product.forms_dz_on_load()) {
      dz = form(node, tail, needs, out);
      g.dz = dz.const_data_ptr<T>();
      if (out.dresidual.defined()) g.du = out.dresidual.const_data_ptr<T>();
    }
    for (int64_t i = 0; needs.weight && i < node.count(); ++i) {
      const bool up = node.upsamples_on_the_way() && node.factors[i] > 1;
      full.push_back(up ? node.full(i) : product.maps()[i]);
      g.full.push_back(full.back().const_data_ptr<T>());
    }
  }
  // A map of the first input's size, where that is the one the product reads.
  if (needs.carried.has_value() && node.factors[0] == 1 && (node.kernel > 1 || node.stride == 1)) {
    const T* const carried = needs.carried->const_data_ptr<T>();
    out.carried = !product->forms_dz() || product->adds_carried();
    if (product->forms_dz()) {
      g.carried = product->adds_carried() ? carried : nullptr;
    } else {
      g.residual_input = 0;
      g.du = carried;
    }
  }
  std::optional<Through<T>> through;
  if (needs.through && product.ending() != nullptr) {
    const int64_t i = node.prologue->input, channels = node.xs[i].size(1);
    out.through_sums = {empty_statistics(node.weight, channels), empty_statistics(node.weight, channels)};
    through.emplace(Through<T>{i, *product.ending(), out.through_sums[0].template mutable_data_ptr<acc_t<T>>(),
                               out.through_sums[1].template mutable_data_ptr<acc_t<T>>()});
    g.through = &*through;
  }
  product->backward(g);
  if (needs.weight) out.dw = like(dw, node.weight);
  for (Tensor& dx : out.dxs) {
    if (dx.defined()) dx = scattered(dx, node);
  }
  // Of a batch's statistics all but a few gradients are NaN then.
  if (!tail.frozen() || product->plain() || !needs.weight || all_finite(dw)) return;
  Results plain;
  plain.dxs.resize(out.dxs.size());
  if (needs.residual) plain.dresidual = node.map(node.out_channels);
  natively(plainly(node), tail, needs, plain);
  repair(out.dw, plain.dw);
  for (size_t i = 0; i < out.dxs.size(); ++i) {
    if (out.dxs[i].defined() && out.carried == plain.carried) repair(out.dxs[i], plain.dxs[i]);
  }
}

}  // namespace

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, std::vector<Tensor>> conv_norm_act_backward(
    const Tensor& dy_in, at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
    const OptionalTensor& residual_given, const Tensor& z_in, const Tensor& mean, const Tensor& var,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const OptionalTensor& sum_dy,
    const OptionalTensor& sum_dy_xhat, at::IntArrayRef factors, int64_t stride, int64_t dilation, int64_t groups,
    int64_t residual_input, int64_t count, double eps, std::string_view act, double slope,
    const c10::List<bool>& need_dx, const c10::List<bool>& need_dup, bool need_dw, bool need_dresidual,
    int64_t pre_input, const OptionalTensor& pre_residual, const OptionalTensor& pre_mean,
    const OptionalTensor& pre_var, const OptionalTensor& pre_weight, const OptionalTensor& pre_bias, double pre_eps,
    std::string_view pre_act, double pre_slope, bool through_norm, const OptionalTensor& carried) {
  const Prologue prologue = {pre_input, pre_residual, pre_mean, pre_var,  pre_weight,
                             pre_bias,  pre_eps,      pre_act,  pre_slope};
  prologue.check(xs);
  Node node(xs, up_weights, weight, factors, stride, dilation, groups);
  node.take(prologue, residual_input);
  const NormArgs norm = {mean, var, bn_weight, bn_bias, eps, act, slope};
  const BatchSums sums = {sum_dy, sum_dy_xhat, count};
  const OptionalTensor residual = node.residual(residual_given, residual_input);
  const Tensor dy = arranged(dy_in, node.channels_last), z = arranged(z_in, node.channels_last);
  const std::vector<int64_t> sizes = {node.images, node.out_channels, node.height, node.width};
  TORCH_CHECK_VALUE(dy.sizes().equals(sizes) && z.sizes().equals(sizes), "dy, z: expected the output's shape");
  TORCH_CHECK_VALUE(!carried.has_value() || (need_dx.get(0) && residual_input < 0 && carried->sizes() == xs[0].sizes()),
                    "carried: expected the shape of xs[0], whose gradient is needed, and no residual_input");
  Needs needs = {{},
                 need_dw,
                 need_dresidual,
                 residual_input,
                 prologue.there() && through_norm,
                 arranged(carried, node.channels_last)};
  TORCH_CHECK_VALUE(!needs.through || need_dx.get(pre_input), "through: needs the gradient of input ", pre_input);
  std::vector<bool> need_up;
  for (int64_t i = 0, up = 0; i < node.count(); ++i) {
    need_up.push_back(node.factors[i] > 1 && need_dup.get(up++));
    needs.full.push_back(need_dx.get(i) || need_up[i]);
  }
  Results out;
  out.dxs.resize(node.count());
  if (need_dresidual) out.dresidual = node.map(node.out_channels);
  if (node.empty()) {
    for (int64_t i = 0; i < node.count(); ++i) {
      if (needs.full[i]) {
        out.dxs[i] = empty_map(weight, {node.images, xs[i].size(1), node.in_height, node.in_width}, node.channels_last);
        out.dxs[i].zero_();
      }
    }
    if (need_dw) out.dw = at::empty_like(weight).zero_();
  } else {
    dispatch(weight.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const TailGradient<T> tail = tail_gradient<T>(norm, sums, dy, z, residual);
      node.way() == Way::library ? by_library(node, tail, needs, out) : natively(node, tail, needs, out);
    });
  }
  std::vector<Tensor> dups;
  for (int64_t i = 0; i < node.count(); ++i) {
    if (node.factors[i] > 1) {
      Tensor dup = nothing(weight);
      if (needs.full[i]) {
        std::tie(out.dxs[i], dup) = upsample_backward_in(node.channels_last, out.dxs[i], node.xs[i], node.ups[i],
                                                         node.factors[i], need_dx.get(i), need_up[i]);
      }
      dups.push_back(dup);
    }
    if (!need_dx.get(i)) out.dxs[i] = nothing(weight);
  }
  if (needs.carried.has_value() && !out.carried) out.dxs[0].add_(*needs.carried);
  if (needs.through && out.through_sums.empty()) {
    out.through_sums = through(out.dxs[pre_input], node.channels_last, xs[pre_input], prologue);
  }
  return {std::move(out.dxs), std::move(dups), need_dw ? out.dw : nothing(weight),
          need_dresidual ? out.dresidual : nothing(weight), std::move(out.through_sums)};
}

}  // namespace dla_fast::cpu
