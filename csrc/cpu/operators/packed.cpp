#include "packed.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "inference.h"
#include "packed_memory.h"
#include "reused_maps.h"

namespace dla_fast::cpu {
namespace {

constexpr int64_t kLibrary = -1, kFolded = -2;

// An arithmetic and a layout as one number.
int64_t way_from(Arithmetic arithmetic, bool channels_last) {
  return 2 * static_cast<int64_t>(arithmetic) + (channels_last ? 1 : 0);
}
Arithmetic arithmetic_of_way(int64_t way) {
  return static_cast<Arithmetic>(way / 2);
}
bool layout_of_way(int64_t way) {
  return way % 2 != 0;
}

// Upsampled inputs pass by the products that gather them. A weight is packed without knowing of a dilation, which would
// cut an odd number of channels into other pairs, and put the taps of a row before its inputs.
bool served_by_runs(const Node& node) {
  if (node.weight.scalar_type() != at::kBFloat16 || current_isa() != Isa::avx512_bf16) return false;
  if (!node.channels_last || node.groups != 1) return false;
  if (node.dilation > 1 && (node.count() > 1 || node.in_channels % 2 != 0)) return false;
  return std::all_of(node.factors.begin(), node.factors.end(), [](int64_t factor) { return factor == 1; });
}

template <class A>
std::vector<A> copied(const Tensor& vector) {
  const Tensor dense = vector.contiguous();
  const A* data = dense.const_data_ptr<A>();
  return {data, data + dense.numel()};
}

// y = act(scale * z + shift + residual): a norm whose mean was folded into its shift.
template <class A>
NormVectors<A> folded(const Tensor& scale, const Tensor& shift, std::string_view act, double slope) {
  NormVectors<A> norm;
  norm.scale = copied<A>(scale);
  norm.shift = copied<A>(shift);
  norm.center.assign(norm.scale.size(), A(0));
  norm.rstd = norm.center;
  norm.act = act_of(act);
  norm.slope = static_cast<A>(slope);
  return norm;
}

// The library's convolution with a weight that the scale is folded into. Its own activation makes zeros of NaN.
Tensor infer_folded(const PackedCall& call, const Tensor& x, const OptionalTensor& residual) {
  using Scalars = c10::List<std::optional<at::Scalar>>;
  using Convolution = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef,
                             at::IntArrayRef, int64_t, c10::string_view, Scalars, std::optional<c10::string_view>);
  using Sum = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef,
                     at::IntArrayRef, at::IntArrayRef, int64_t, c10::string_view, std::optional<at::Scalar>,
                     std::optional<c10::string_view>, Scalars, std::optional<c10::string_view>);
  constexpr const char* name = "mkldnn::_convolution_pointwise";
  static const auto convolution = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Convolution>();
  static const auto sum = c10::Dispatcher::singleton().findSchemaOrThrow(name, "binary").typed<Sum>();
  const int64_t side = call.dilation * (call.weight.size(2) / 2);
  const std::array<int64_t, 2> padding = {side, side}, stride = {call.stride, call.stride},
                               dilation = {call.dilation, call.dilation};
  const bool adds = residual.has_value();
  // A sum takes a bias of the inputs' dtype alone.
  Tensor y = adds ? sum.call(x, arranged(*residual, true), call.packed, call.shift.to(x.scalar_type()), padding, stride,
                             dilation, call.groups, "add", 1.0, std::nullopt, Scalars(), "")
                  : convolution.call(x, call.packed, call.shift, padding, stride, dilation, call.groups, "none",
                                     Scalars(), "");
  return act_of(call.act) == Act::relu ? y.relu_() : y;
}

template <class T>
void pack(const Tensor& weight, const std::vector<int64_t>& in_channels, int64_t way, Tensor& packed) {
  const bool taps_first = weight.size(2) > 1 && is_channels_last(weight);
  const Tensor dense = arranged(weight, taps_first);
  Inputs<T> in = {layout_of_way(way),        1,         1, 1, weight.size(1), weight.size(0), weight.size(2), {},
                  dense.const_data_ptr<T>(), taps_first};
  int64_t offset = 0;
  for (const int64_t channels : in_channels) {
    in.xs.push_back({nullptr, channels, offset, 1, 1});
    offset += channels;
  }
  TORCH_CHECK_VALUE(offset == in.in_channels, "in_channels: expected ", in.in_channels, " together, got ", offset);
  const ProductOf<T> product = product_of(in, arithmetic_of_way(way));
  packed = packed_memory(product->packed_bytes());
  std::memset(packed.mutable_data_ptr(), 0, packed.nbytes());
  product->pack(packed.mutable_data_ptr());
}

}  // namespace

int64_t conv_norm_act_way(const std::vector<Tensor>& xs, const std::vector<Tensor>& up_weights, const Tensor& weight,
                          const std::vector<int64_t>& factors, int64_t stride, int64_t dilation, int64_t groups,
                          bool foldable) {
  const Node node(xs, up_weights, weight, factors, stride, dilation, groups);
  if (node.empty()) return kLibrary;
  const at::ScalarType type = weight.scalar_type();
  foldable = foldable && node.channels_last && node.count() == 1 && up_weights.empty() &&
             at::globalContext().userEnabledMkldnn() && at::hasMKLDNN();
  const bool halves = foldable && type == at::kBFloat16, floats = foldable && type == at::kFloat;
  if (served_by_runs(node)) return way_from(Arithmetic::bf16_direct, true);
  if (node.way() == Way::library) return halves || floats ? kFolded : kLibrary;
  int64_t way = kLibrary;
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const Arithmetic arithmetic = NativeNode<T>(node).arithmetic_kept();
    // What a stride leaves is small beside its flops, and the activation's own pass over it costs little. With few
    // channels it is not, and comes from far: then it is read ahead and written once.
    const bool folds = floats && arithmetic == Arithmetic::direct && node.stride > 1 && node.out_channels > 32;
    way = folds ? kFolded : way_from(arithmetic, node.channels_last);
  });
  return way;
}

Tensor conv_norm_act_pack(const Tensor& weight, const std::vector<int64_t>& in_channels, int64_t way) {
  Tensor packed = nothing(weight);
  if (way == kLibrary) return packed;
  dispatch(weight.scalar_type(), [&](auto zero) { pack<decltype(zero)>(weight, in_channels, way, packed); });
  return packed;
}

Tensor conv_norm_act_packed(const PackedCall& call, const std::vector<Tensor>& xs,
                            const std::vector<Tensor>& up_weights, const OptionalTensor& residual_given) {
  RECORD_FUNCTION("dla_fast_cpu::conv_norm_act_packed", std::vector<c10::IValue>());
  const OptionalTensor& added = call.added_input < 0 ? residual_given : OptionalTensor(xs.at(call.added_input));
  if (call.way == kFolded) return infer_folded(call, xs.at(0), added);
  const Node node(xs, up_weights, call.weight, call.factors, call.stride, call.dilation, call.groups);
  const OptionalTensor residual = node.residual(added, call.residual_input);
  Tensor y = reused_map(call.weight, {node.images, node.out_channels, node.height, node.width}, node.channels_last);
  if (node.empty()) return y;
  dispatch(call.weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const NormVectors<acc_t<T>> norm = folded<acc_t<T>>(call.scale, call.shift, call.act, call.slope);
    if (call.way == kLibrary) return infer_by_library<T>(node, norm, residual, y);
    TORCH_CHECK_VALUE(layout_of_way(call.way) == node.channels_last, "way: the weight was packed for the other layout");
    const void* const weights = call.packed.numel() == 0 ? nullptr : call.packed.const_data_ptr();
    infer<T>(node, NativeNode<T>(node, weights, arithmetic_of_way(call.way)), norm, residual, y);
  });
  return y;
}

}  // namespace dla_fast::cpu
