#include "library.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>

#include <algorithm>

namespace dla_fast::cpu {
namespace {

// Inside an operator's kernel nothing is recorded, and dtypes are what they are.
struct Plainly {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

Tensor concatenated(const Node& node) {
  return node.count() == 1 ? node.full(0) : at::cat(node.all_full(), 1);
}

// oneDNN sums the weight's gradient of a dilated channels_last convolution of bfloat16 over memory that nobody wrote,
// where a group's channels are not a multiple of 16 (torch 2.13 with avx512_bf16: NaN, or values of 1e36).
bool layout_to_trust(const Node& node) {
  return node.channels_last && !(node.dilation > 1 && node.weight.scalar_type() == at::kBFloat16);
}

// And so it does, in either layout, with a kernel past the edge of a map that is narrower than the stride.
bool gradient_to_trust(const Node& node) {
  return node.kernel == 1 || node.in_width >= node.stride || node.weight.scalar_type() != at::kBFloat16;
}

}  // namespace

Tensor library_convolution(const Node& node) {
  const Plainly plainly;
  if (node.in_channels == 0) return node.map(node.out_channels).zero_();  // theirs has no channels either
  const std::vector<int64_t> stride(2, node.stride), dilation(2, node.dilation),
      padding(2, node.dilation * (node.kernel / 2));
  const Tensor z = at::convolution(arranged(concatenated(node), node.channels_last), node.weight, std::nullopt, stride,
                                   padding, dilation, false, {0, 0}, node.groups);
  return arranged(z, node.channels_last);
}

LibraryGradients library_gradients(const Node& node, const Tensor& dz, const std::vector<bool>& needed,
                                   bool need_weight) {
  const Plainly plainly;
  const std::vector<int64_t> stride(2, node.stride), dilation(2, node.dilation),
      padding(2, node.dilation * (node.kernel / 2));
  const bool channels_last = layout_to_trust(node);
  const bool any = std::find(needed.begin(), needed.end(), true) != needed.end();
  LibraryGradients out;
  out.full.resize(needed.size());
  if (!any && !need_weight) return out;
  const at::ScalarType type = node.weight.scalar_type(), trusted = gradient_to_trust(node) ? type : at::kFloat;
  const auto given = [&](const Tensor& t) { return arranged(t, channels_last).to(trusted); };
  Tensor dx;
  std::tie(dx, out.weight, std::ignore) =
      at::convolution_backward(given(dz), given(concatenated(node)), given(node.weight), std::nullopt, stride, padding,
                               dilation, false, {0, 0}, node.groups, {any, need_weight, false});
  if (any) dx = dx.to(type);
  if (need_weight) out.weight = out.weight.to(type);
  for (int64_t i = 0; i < node.count(); ++i) {
    if (needed[i]) out.full[i] = dx.narrow(1, node.offsets[i], node.xs[i].size(1));
  }
  return out;
}

}  // namespace dla_fast::cpu
