// A 3x3 convolution of bfloat16 maps in bfloat16 instructions, block by block of the map, in cache.
//
// Winograd's algorithm would round its transforms to bfloat16, so this is the plain sum of products: 18KN flops a
// pixel. A block lies in cache with a pixel around it; its pixels in a row, the two of the border included, are the
// rows of one product, whose nine taps are the same memory read from nine places.

#pragma once

#include <vector>

#include "bf16_gemm.h"
#include "blocks.h"

namespace dla_fast::cpu {

class Bf16Convolution {
  using T = c10::BFloat16;

 public:
  // adjoint: the gradient's convolution, from N to K channels with the taps in reverse.
  Bf16Convolution(const MergeInputs& in, const Bf16Kernels& kernels, const Tensor& weight, bool adjoint,
                  std::vector<Panel> panels);
  Bf16Convolution(const Bf16Convolution&) = delete;

  // Calls epilogue(shape, row, first channel, z) for every row of pixels and panel.
  template <class Epilogue>
  void run(const Epilogue& epilogue) const {
    const int64_t count = static_cast<int64_t>(panels_.size()), stride = 2 * grid_.cols + 2;
    const int64_t rows = 2 * grid_.rows, pixels = (rows + 2) * stride + 2 + kBf16Block,
                  width = steps_.back() * kBf16Step;
    const int64_t threads = at::get_num_threads();
    const int64_t groups = std::clamp<int64_t>(divide_up(4 * threads, grid_.count()), 1, std::max<int64_t>(count, 1));
    const int64_t cost = rows * stride * 9 * width * divide_up(count, groups) * kPanel / 64;
    parallel_queue(grid_.count() * groups, cost, [&](const auto& take) {
      const Bf16Thread thread(kernels_);
      const Scratch<T> patch(pixels * width, true);
      const Scratch<float> z(std::max(rows * stride, kBf16Block) * kPanel),
          transposed(in_.channels_last ? 0 : kPanel * 2 * grid_.cols);
      const Blocks<T>::Work work(blocks_);
      for (int64_t task = take(); task >= 0; task = take()) {
        const TileGrid::Block block = grid_[task / groups];
        for (size_t i = 0; i < in_.xs.size(); ++i) {
          const int64_t channels = in_.xs[i].size(1);
          blocks_.gather(i, block, work);
          kernels<T>().store({work.patch.get(), channels}, {patch.get() + steps_[i] * kBf16Step, width},
                             (rows + 2) * stride, channels);
        }
        std::vector<Bf16Segment> taps;
        for (int64_t tap = 0; tap < 9; ++tap) {
          taps.push_back({patch.get() + (tap / 3 * stride + tap % 3) * width, width, steps_.back()});
        }
        const int64_t group = task % groups;
        for (int64_t p = count * group / groups; p < count * (group + 1) / groups; ++p) {
          kernels_.gemm({block.height * stride, panels_[p].count, taps.data(), 9,
                         packed_.get() + 2 * p * panel_values(), panel_values(), z.get(), kPanel});
          for_rows(in_, grid_, block, panels_[p], static_cast<const float*>(z.get()), stride, transposed.get(),
                   epilogue);
        }
      }
    });
  }

 private:
  int64_t panel_values() const { return 9 * steps_.back() * kBf16PanelStep; }

  const MergeInputs& in_;
  const Bf16Kernels& kernels_;
  TileGrid grid_;
  Blocks<T> blocks_;
  std::vector<Panel> panels_;
  std::vector<int64_t> steps_;  // where each input begins in a tap, and their sum
  Scratch<T> packed_;           // two panels of bf16_gemm.h for each of ours
};

// Gradient of the weight, laid out like it, in float; xs are the inputs of `in` at the size of dz.
Tensor bf16_weight_gradient(const Bf16Kernels& kernels, const Tensor& dz, const MergeInputs& in,
                            const std::vector<Tensor>& xs, const Tensor& weight);

}  // namespace dla_fast::cpu
