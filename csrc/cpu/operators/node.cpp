#include "node.h"

#include <ATen/ops/empty_like.h>

#include "../shared/scratch.h"
#include "../shared/upsampling.h"
#include "upsample.h"

namespace dla_fast::cpu {

Node::Node(at::TensorList inputs, at::TensorList up_weights, const Tensor& weight, at::IntArrayRef factors,
           int64_t stride, int64_t dilation, int64_t groups)
    : channels_last(true),
      in_channels(0),
      out_channels(weight.size(0)),
      kernel(weight.size(2)),
      stride(stride),
      dilation(dilation),
      groups(groups),
      factors(factors.vec()),
      weight(weight) {
  TORCH_CHECK_VALUE(!inputs.empty() && inputs.size() == factors.size(), "xs: expected one factor per input");
  TORCH_CHECK_VALUE(kernel % 2 == 1 && weight.size(3) == kernel, "weight: expected an odd square kernel, got ", kernel,
                    "x", weight.size(3));
  for (const Tensor& x : inputs) channels_last = channels_last && is_channels_last(x);
  channels_last = channels_last || is_channels_last(weight);
  ups.reserve(inputs.size());
  xs.reserve(inputs.size());
  offsets.reserve(inputs.size());
  size_t up = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const int64_t f = factors[i];
    TORCH_CHECK_VALUE(f == 1 || up < up_weights.size(), "up_weights: expected one per upsampled input");
    ups.push_back(f > 1 ? up_weights[up++].contiguous() : Tensor());
    TORCH_CHECK_VALUE(f == 1 || ups[i].numel() == inputs[i].size(1) * 4 * f * f, "up_weights: expected (",
                      inputs[i].size(1), ", 1, ", 2 * f, ", ", 2 * f, ") for xs[", i, "]");
    xs.push_back(arranged(inputs[i], channels_last));
    offsets.push_back(in_channels);
    in_channels += inputs[i].size(1);
    const int64_t h = f > 1 ? upsampled(inputs[i].size(2), f) : inputs[i].size(2),
                  w = f > 1 ? upsampled(inputs[i].size(3), f) : inputs[i].size(3);
    if (i == 0) {
      images = inputs[0].size(0);
      in_height = h;
      in_width = w;
    }
    TORCH_CHECK_VALUE(inputs[i].size(0) == images && h == in_height && w == in_width, "xs[", i,
                      "]: expected (N, H, W) = (", images, ", ", in_height, ", ", in_width, "), got (",
                      inputs[i].size(0), ", ", h, ", ", w, ")");
    TORCH_CHECK_VALUE(inputs[i].scalar_type() == weight.scalar_type(), "xs[", i, "]: expected the dtype of weight");
  }
  TORCH_CHECK_VALUE(in_channels == weight.size(1) * groups, "weight: expected ", in_channels / groups,
                    " input channels, got ", weight.size(1));
  // With padding dilation * (kernel / 2), of an odd kernel.
  height = in_height == 0 ? 0 : (in_height - 1) / stride + 1;
  width = in_width == 0 ? 0 : (in_width - 1) / stride + 1;
}

void Node::take(const Prologue& given, int64_t residual_input) {
  if (!given.there()) return;
  // What else reads the input, or reads other pixels than the product, needs it as a map.
  const bool plain = factors[given.input] == 1 && given.input != residual_input && (kernel > 1 || stride == 1);
  if (plain && way() != Way::library && !empty()) {
    prologue = &given;
  } else {
    xs[given.input] = given.form(xs[given.input], channels_last);
  }
}

// Measured on Zen 4 (docs/benchmarks.md): on nodes, and on 3x3 convolutions without a stride, our products of floats
// with the tail or the moments behind them in cache are faster than the library's convolutions followed by passes; on
// strided ones they are up to a tenth slower. In half precision the library has instructions that our strided, dilated
// and larger kernels have not; without vectors of eight floats it has the better code. Groups are rare in these
// networks.
Way Node::way() const {
  if (groups != 1) return Way::library;
  if (kernel == 1) return Way::pointwise;
  if (kernel == 3 && stride == 1 && dilation == 1) {
    // What is neither concatenated nor upsampled the library multiplies faster in bfloat16 than our vectors.
    const bool alone = count() == 1 && factors[0] == 1;
    const bool vectors = weight.scalar_type() == at::kBFloat16 && current_isa() == Isa::avx512_bf16;
    return alone && vectors ? Way::library : Way::convolution;
  }
  const bool floats = weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kDouble;
  return floats && current_isa() != Isa::generic ? Way::convolution : Way::library;
}

bool Node::upsamples_on_the_way() const {
  return kernel == 3 && stride == 1 && dilation == 1 && !plainly;
}

Tensor Node::map(int64_t channels) const {
  return empty_map(weight, {images, channels, height, width}, channels_last);
}

Tensor Node::full(int64_t i) const {
  return factors[i] > 1 ? upsample_in(channels_last, xs[i], std::nullopt, ups[i], factors[i]) : xs[i];
}

std::vector<Tensor> Node::all_full() const {
  std::vector<Tensor> out;
  for (int64_t i = 0; i < count(); ++i) out.push_back(full(i));
  return out;
}

OptionalTensor Node::residual(const OptionalTensor& given, int64_t input) const {
  TORCH_CHECK_VALUE(input < count(), "residual_input: there is no input ", input);
  TORCH_CHECK_VALUE(input < 0 || !given.has_value(), "residual: expected a tensor or an input, got both");
  TORCH_CHECK_VALUE(input < 0 || factors[input] == 1, "residual_input: input ", input, " is upsampled");
  const OptionalTensor added = input < 0 ? arranged(given, channels_last) : OptionalTensor(xs[input]);
  if (added.has_value()) {
    TORCH_CHECK_VALUE(added->sizes() == at::IntArrayRef({images, out_channels, height, width}),
                      "residual: expected the output's shape, got ", added->sizes());
    TORCH_CHECK_VALUE(added->scalar_type() == weight.scalar_type(), "residual: expected the dtype of weight");
  }
  return added;
}

namespace {

// The inputs as the products take them: a 1x1 product those pixels that the stride takes of upsampled maps.
std::vector<Tensor> taken(const Node& node) {
  if (node.upsamples_on_the_way()) return node.xs;
  std::vector<Tensor> xs = node.all_full();
  if (node.kernel == 1 && node.stride > 1) {
    for (Tensor& x : xs) {
      x = arranged(x.slice(2, 0, std::nullopt, node.stride).slice(3, 0, std::nullopt, node.stride), node.channels_last);
    }
  }
  return xs;
}

}  // namespace

template <class T>
NativeNode<T>::NativeNode(const Node& node, const void* packed, std::optional<Arithmetic> arithmetic)
    : maps_(taken(node)), weight_(arranged(node.weight, node.kernel > 1 && is_channels_last(node.weight))) {
  in_ = {node.channels_last,
         node.images,
         node.height,
         node.width,
         node.in_channels,
         node.out_channels,
         node.kernel,
         {},
         weight_.template const_data_ptr<T>(),
         node.kernel > 1 && is_channels_last(node.weight),
         node.kernel > 1 ? node.stride : 1,
         node.kernel > 1 ? node.dilation : 1,
         packed};
  const bool upsampling = node.upsamples_on_the_way();
  for (int64_t i = 0; i < node.count(); ++i) {
    const Tensor& x = maps_[i];
    Input<T> input = {x.const_data_ptr<T>(), x.size(1), node.offsets[i], x.size(2), x.size(3)};
    if (upsampling && node.factors[i] > 1) {
      input.factor = node.factors[i];
      input.up_weight = node.ups[i].template const_data_ptr<T>();
    }
    in_.xs.push_back(input);
  }
  const Arithmetic way = node.plainly             ? Arithmetic::direct
                         : arithmetic.has_value() ? *arithmetic
                                                  : arithmetic_of(in_, false);
  if (node.prologue != nullptr) take_prologue(node, way);
  product_ = product_of(in_, way);
  forms_dz_ = cpu::forms_dz_on_load(in_, way);
}

template <class T>
void NativeNode<T>::take_prologue(const Node& node, Arithmetic arithmetic) {
  const Prologue& given = *node.prologue;
  const int64_t i = given.input;
  z_ = maps_[i];
  added_ = arranged(given.residual, node.channels_last);
  ending_ = {given.norm().vectors<acc_t<T>>(), z_.const_data_ptr<T>(), data_or_null<T>(added_)};
  goes_through_ = goes_through(in_, arithmetic);
  if (forms_on_load(in_, arithmetic, added_.has_value())) {
    in_.xs[i].ending = &*ending_;
    return;
  }
  maps_[i] = given.form(z_, node.channels_last);
  in_.xs[i].data = maps_[i].const_data_ptr<T>();
}

template <class T>
Arithmetic NativeNode<T>::arithmetic_kept() const {
  return arithmetic_of(in_, true);
}

template <class T>
Tensor NativeNode<T>::weight_gradient() const {
  Tensor out = at::empty_like(weight_);
  want_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

template class NativeNode<float>;
template class NativeNode<double>;
template class NativeNode<c10::BFloat16>;
template class NativeNode<c10::Half>;

}  // namespace dla_fast::cpu
