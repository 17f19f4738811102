#include "bf16_convolution.h"

namespace dla_fast::cpu {
namespace {

static_assert(kPanel == 2 * kBf16Panel);

std::vector<int64_t> steps_of(const MergeInputs& in) {
  std::vector<int64_t> steps = {0};
  for (const Tensor& x : in.xs) steps.push_back(steps.back() + divide_up(x.size(1), kBf16Step));
  return steps;
}

// Copies pixels [h, h + rows) x [w, w + cols) of `count` channels from `first` on, zero outside of the map, `stride`
// pixels a row: [pixel][count] or, of a contiguous map, [channel][ld].
void copy_block(const Map<c10::BFloat16>& x, int64_t image, int64_t h, int64_t w, int64_t rows, int64_t cols,
                int64_t stride, int64_t first, int64_t count, c10::BFloat16* to, int64_t ld) {
  const int64_t begin = std::clamp<int64_t>(-w, 0, cols), end = std::clamp<int64_t>(x.width - w, begin, cols);
  const int64_t pixels = x.height * x.width;
  const int64_t planes = x.channels_last ? 1 : count, values = x.channels_last ? count : 1;
  for (int64_t plane = 0; plane < planes; ++plane, to += ld) {
    for (int64_t r = 0; r < rows; ++r) {
      c10::BFloat16* row = to + r * stride * values;
      std::fill_n(row, stride * values, c10::BFloat16(0));
      if (h + r < 0 || h + r >= x.height) continue;
      const int64_t pixel = (h + r) * x.width + w + begin;
      row += begin * values;
      if (!x.channels_last) {
        std::copy_n(x.data + (image * x.channels + first + plane) * pixels + pixel, end - begin, row);
        continue;
      }
      const c10::BFloat16* from = x.data + (image * pixels + pixel) * x.channels + first;
      for (int64_t c = begin; c < end; ++c, from += x.channels, row += count) std::copy_n(from, count, row);
    }
  }
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

Tensor bf16_weight_gradient(const Bf16Kernels& kernels, const Tensor& dz, const MergeInputs& in,
                            const std::vector<Tensor>& xs, const Tensor& weight) {
  using T = c10::BFloat16;
  constexpr int64_t deep = 128, wide = 128;
  const TileGrid grid(in.images, in.height, in.width, 96);
  WeightSums<float> sums(in, weight, grid.count(), deep, wide);
  std::vector<Map<T>> maps;
  for (const Tensor& x : xs) maps.emplace_back(x, in.channels_last);
  const Map<T> gradient(dz, in.channels_last);
  const int64_t rows = 2 * grid.rows, cols = 2 * grid.cols, stride = cols + 2;
  // The pixels of dz in a row, with zeros where x has its border, are the depth of the products.
  const int64_t depth = rows * stride, steps = divide_up(depth, kBf16Step), panel_values = steps * kBf16PanelStep;
  const int64_t x_pixels = (rows + 2) * stride, ld = steps * kBf16Step + 2 * stride + 2 + kBf16Step;
  parallel_queue(sums.tasks(), sums.blocks_per_task() * depth * deep * wide / 8, [&](const auto& take) {
    const Bf16Thread thread(kernels);
    const Scratch<T> pixels(std::max(x_pixels * deep, wide * steps * kBf16Step), true), x(deep * ld, true),
        d(wide / kBf16Panel * panel_values, true);
    const Scratch<float> taps(9 * deep * wide);
    for (int64_t task = take(); task >= 0; task = take()) {
      const auto& [input, channel, channels, out, width] = sums.piece(task);
      // Whole blocks of rows are multiplied; what an earlier piece left in those past its own would do no harm but NaN.
      const int64_t m = round_up(channels, kBf16Block);
      std::fill_n(x.get() + channels * ld, (m - channels) * ld, T(0));
      for (int64_t b = sums.first_block(task); b < sums.last_block(task); ++b) {
        const TileGrid::Block block = grid[b];
        if (in.channels_last) {
          copy_block(maps[input], block.image, block.h - 1, block.w - 1, rows + 2, stride, stride, channel, channels,
                     pixels.get(), 0);
          kernels.transpose({pixels.get(), channels}, x_pixels, channels, {x.get(), ld});
          copy_block(gradient, block.image, block.h, block.w, rows, cols, stride, out, width, pixels.get(), 0);
          kernels.pack({pixels.get(), width}, depth, {d.get(), panel_values, 0, width, true});
        } else {
          copy_block(maps[input], block.image, block.h - 1, block.w - 1, rows + 2, stride, stride, channel, channels,
                     x.get(), ld);
          copy_block(gradient, block.image, block.h, block.w, rows, cols, stride, out, width, pixels.get(), depth);
          for (int64_t n = 0; n < width; n += kBf16Panel) {
            kernels.pack_transposed({pixels.get() + n * depth, depth}, std::min(kBf16Panel, width - n), depth,
                                    d.get() + n / kBf16Panel * panel_values);
          }
        }
        for (int64_t tap = 0; tap < 9; ++tap) {
          const Bf16Segment segment = {x.get() + tap / 3 * stride + tap % 3, ld, steps};
          kernels.gemm({m, width, &segment, 1, d.get(), panel_values, taps.get() + tap * sums.per_tap(),
                        sums.per_channel(), b > sums.first_block(task)});
        }
      }
      sums.store(task, taps.get());
    }
  });
  return sums.result();
}

}  // namespace dla_fast::cpu
