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
  return node.count() == 1 ? node.full(0) : arranged(at::cat(node.all_full(), 1), node.channels_last);
}

}  // namespace

Tensor library_convolution(const Node& node) {
  const Plainly plainly;
  const std::vector<int64_t> stride(2, node.stride), dilation(2, node.dilation),
      padding(2, node.dilation * (node.kernel / 2));
  const Tensor z = at::convolution(concatenated(node), node.weight, std::nullopt, stride, padding, dilation, false,
                                   {0, 0}, node.groups);
  return arranged(z, node.channels_last);
}

LibraryGradients library_gradients(const Node& node, const Tensor& dz, const std::vector<bool>& needed,
                                   bool need_weight) {
  const Plainly plainly;
  const std::vector<int64_t> stride(2, node.stride), dilation(2, node.dilation),
      padding(2, node.dilation * (node.kernel / 2));
  const bool any = std::find(needed.begin(), needed.end(), true) != needed.end();
  LibraryGradients out;
  out.full.resize(needed.size());
  if (!any && !need_weight) return out;
  Tensor dx;
  std::tie(dx, out.weight, std::ignore) =
      at::convolution_backward(dz, concatenated(node), node.weight, std::nullopt, stride, padding, dilation, false,
                               {0, 0}, node.groups, {any, need_weight, false});
  for (int64_t i = 0; i < node.count(); ++i) {
    if (needed[i]) out.full[i] = dx.narrow(1, node.offsets[i], node.xs[i].size(1));
  }
  return out;
}

}  // namespace dla_fast::cpu
