#include "bf16_convolution.h"

namespace dla_fast::cpu {
namespace {

static_assert(kPanel == 2 * kBf16Panel);

std::vector<int64_t> steps_of(const MergeInputs& in) {
  std::vector<int64_t> steps = {0};
  for (const Tensor& x : in.xs) steps.push_back(steps.back() + divide_up(x.size(1), kBf16Step));
  return steps;
}

}  // namespace

Bf16Convolution::Bf16Convolution(const MergeInputs& in, const Bf16Kernels& kernels, const Tensor& weight, bool adjoint,
                                 std::vector<Panel> panels)
    : in_(in),
      kernels_(kernels),
      grid_(grid_of(in)),
      blocks_(in, grid_),
      panels_(std::move(panels)),
      steps_(steps_of(in)),
      packed_(static_cast<int64_t>(panels_.size()) * 2 * panel_values(), true) {
  const Tensor dense = weight.contiguous(at::MemoryFormat::ChannelsLast);
  const T* w = dense.const_data_ptr<T>();
  const int64_t inner = weight.size(1), row = 9 * inner;
  parallel(static_cast<int64_t>(panels_.size()) * 9, steps_.back() * kBf16PanelStep, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Panel& panel = panels_[task / 9];
      const int64_t tap = task % 9;
      T* const to = packed_.get() + 2 * (task / 9) * panel_values() + tap * steps_.back() * kBf16PanelStep;
      if (adjoint) {
        kernels.pack({w + (8 - tap) * inner + panel.channel, row}, weight.size(0),
                     {to, panel_values(), 0, panel.count, true});
        continue;
      }
      for (size_t i = 0; i < in.xs.size(); ++i) {
        for (int64_t half = 0; half * kBf16Panel < panel.count; ++half) {
          const int64_t first = half * kBf16Panel;
          kernels.pack_transposed({w + (panel.channel + first) * row + tap * inner + in.offsets[i], row},
                                  std::min(kBf16Panel, panel.count - first), in.xs[i].size(1),
                                  to + half * panel_values() + steps_[i] * kBf16PanelStep);
        }
      }
    }
  });
}

}  // namespace dla_fast::cpu
