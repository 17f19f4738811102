// A 3x3 convolution of bfloat16 maps in bfloat16 instructions, block by block of the map, in cache.
//
// Winograd's algorithm would round its transforms to bfloat16, so this is the plain sum of products: 18KN flops a
// pixel. A block lies in cache with a pixel around it; its pixels in a row, the two of the border included, are the
// rows of one product, whose nine taps are the same memory read from nine places.

#include "bf16_gemm.h"
#include "convolution.h"

namespace dla_fast::cpu {
namespace {

using T = c10::BFloat16;

static_assert(kPanel == 2 * kBf16Panel);

std::vector<int64_t> steps_of(const Inputs<T>& in) {
  std::vector<int64_t> steps = {0};
  for (const Input<T>& x : in.xs) steps.push_back(steps.back() + divide_up(x.channels, kBf16Step));
  return steps;
}

// Copies pixels [h, h + rows) x [w, w + cols) of `count` channels from `first` on, zero outside of the map, `stride`
// pixels a row: [pixel][count] or, of a contiguous map, [channel][ld].
void copy_block(const Map<T>& x, int64_t image, int64_t h, int64_t w, int64_t rows, int64_t cols, int64_t stride,
                int64_t first, int64_t count, T* to, int64_t ld) {
  const int64_t begin = std::clamp<int64_t>(-w, 0, cols), end = std::clamp<int64_t>(x.width - w, begin, cols);
  const int64_t pixels = x.height * x.width;
  const int64_t planes = x.channels_last ? 1 : count, values = x.channels_last ? count : 1;
  for (int64_t plane = 0; plane < planes; ++plane, to += ld) {
    for (int64_t r = 0; r < rows; ++r) {
      T* row = to + r * stride * values;
      std::fill_n(row, stride * values, T(0));
      if (h + r < 0 || h + r >= x.height) continue;
      const int64_t pixel = (h + r) * x.width + w + begin;
      row += begin * values;
      if (!x.channels_last) {
        std::copy_n(x.data + (image * x.channels + first + plane) * pixels + pixel, end - begin, row);
        continue;
      }
      const T* from = x.data + (image * pixels + pixel) * x.channels + first;
      for (int64_t c = begin; c < end; ++c, from += x.channels, row += count) std::copy_n(from, count, row);
    }
  }
}

class Blockwise {
 public:
  // adjoint: the gradient's convolution, from N to K channels with the taps in reverse.
  Blockwise(const Inputs<T>& in, const Bf16Kernels& kernels, bool adjoint, std::vector<Panel> panels);
  Blockwise(const Blockwise&) = delete;

  void run(RowEpilogue<float> epilogue) const {
    const int64_t count = static_cast<int64_t>(panels_.size()), stride = 2 * grid_.cols + 2;
    const int64_t rows = 2 * grid_.rows, pixels = (rows + 2) * stride + 2 + kBf16Block,
                  width = steps_.back() * kBf16Step;
    const int64_t threads = thread_count();
    const int64_t groups = std::clamp<int64_t>(divide_up(4 * threads, grid_.count()), 1, std::max<int64_t>(count, 1));
    const int64_t cost = rows * stride * 9 * width * divide_up(count, groups) * kPanel / 64;
    parallel_queue(grid_.count() * groups, cost, [&](const Take& take) {
      const Bf16Thread thread(kernels_);
      const Scratch<T> patch(pixels * width, true);
      const Scratch<float> z(std::max(rows * stride, kBf16Block) * kPanel),
          transposed(in_.channels_last ? 0 : kPanel * 2 * grid_.cols);
      const Blocks<T>::Work work(blocks_);
      for (int64_t task = take(); task >= 0; task = take()) {
        const TileGrid::Block block = grid_[task / groups];
        for (size_t i = 0; i < in_.xs.size(); ++i) {
          const int64_t channels = in_.xs[i].channels;
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
          for_rows<T, float>(in_, grid_, block, panels_[p], z.get(), stride, transposed.get(), epilogue);
        }
      }
    });
  }

 private:
  int64_t panel_values() const { return 9 * steps_.back() * kBf16PanelStep; }

  const Inputs<T>& in_;
  const Bf16Kernels& kernels_;
  TileGrid grid_;
  Blocks<T> blocks_;
  std::vector<Panel> panels_;
  std::vector<int64_t> steps_;  // where each input begins in a tap, and their sum
  Scratch<T> packed_;           // two panels of bf16_gemm.h for each of ours
};

Blockwise::Blockwise(const Inputs<T>& in, const Bf16Kernels& kernels, bool adjoint, std::vector<Panel> panels)
    : in_(in),
      kernels_(kernels),
      grid_(grid_of(in)),
      blocks_(in, grid_),
      panels_(std::move(panels)),
      steps_(steps_of(in)),
      packed_(static_cast<int64_t>(panels_.size()) * 2 * panel_values(), true) {
  const int64_t outer = adjoint ? in.in_channels : in.out_channels, inner = adjoint ? in.out_channels : in.in_channels,
                row = 9 * inner;
  const Scratch<T> moved(in.taps_first ? 0 : outer * row);
  const T* w = in.taps_first ? in.weight : moved.get();
  if (!in.taps_first) {
    parallel(outer, row, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * inner; i < end * inner; ++i) {
        T* to = moved.get() + i / inner * row + i % inner;
        for (int64_t tap = 0; tap < 9; ++tap) to[tap * inner] = in.weight[i * 9 + tap];
      }
    });
  }
  parallel(static_cast<int64_t>(panels_.size()) * 9, steps_.back() * kBf16PanelStep, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Panel& panel = panels_[task / 9];
      const int64_t tap = task % 9;
      T* const to = packed_.get() + 2 * (task / 9) * panel_values() + tap * steps_.back() * kBf16PanelStep;
      if (adjoint) {
        kernels.pack({w + (8 - tap) * inner + panel.channel, row}, outer, {to, panel_values(), 0, panel.count, true});
        continue;
      }
      for (size_t i = 0; i < in.xs.size(); ++i) {
        for (int64_t half = 0; half * kBf16Panel < panel.count; ++half) {
          const int64_t first = half * kBf16Panel;
          kernels.pack_transposed({w + (panel.channel + first) * row + tap * inner + in.xs[i].offset, row},
                                  std::min(kBf16Panel, panel.count - first), in.xs[i].channels,
                                  to + half * panel_values() + steps_[i] * kBf16PanelStep);
        }
      }
    }
  });
}

class Bf16Convolution : public Convolution<T> {
 public:
  Bf16Convolution(const Inputs<T>& in, const Bf16Kernels& kernels) : Convolution<T>(in), kernels_(kernels) {}

 protected:
  void convolve(const Inputs<T>& in, bool adjoint, std::vector<Panel> panels,
                RowEpilogue<float> epilogue) const override {
    Blockwise(in, kernels_, adjoint, std::move(panels)).run(epilogue);
  }
  void weight_gradient(const Gradient<T>& gradient) const override;

 private:
  const Bf16Kernels& kernels_;
};

void Bf16Convolution::weight_gradient(const Gradient<T>& gradient) const {
  constexpr int64_t deep = 128, wide = 128;
  const TileGrid grid(in_.images, in_.height, in_.width, 96);
  const WeightSums<T> sums(in_, gradient.dw, grid.count(), deep, wide);
  std::vector<Map<T>> maps;
  for (int64_t i = 0; i < in_.count(); ++i) {
    maps.push_back({gradient.full[i], in_.xs[i].channels, in_.height, in_.width, in_.channels_last});
  }
  const Map<T> dz = {gradient.dz, in_.out_channels, in_.height, in_.width, in_.channels_last};
  const int64_t rows = 2 * grid.rows, cols = 2 * grid.cols, stride = cols + 2;
  // The pixels of dz in a row, with zeros where x has its border, are the depth of the products.
  const int64_t depth = rows * stride, steps = divide_up(depth, kBf16Step), panel_values = steps * kBf16PanelStep;
  const int64_t x_pixels = (rows + 2) * stride, ld = steps * kBf16Step + 2 * stride + 2 + kBf16Step;
  parallel_queue(sums.tasks(), sums.blocks_per_task() * depth * deep * wide / 8, [&](const Take& take) {
    const Bf16Thread thread(kernels_);
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
        if (in_.channels_last) {
          copy_block(maps[input], block.image, block.h - 1, block.w - 1, rows + 2, stride, stride, channel, channels,
                     pixels.get(), 0);
          kernels_.transpose({pixels.get(), channels}, x_pixels, channels, {x.get(), ld});
          copy_block(dz, block.image, block.h, block.w, rows, cols, stride, out, width, pixels.get(), 0);
          kernels_.pack({pixels.get(), width}, depth, {d.get(), panel_values, 0, width, true});
        } else {
          copy_block(maps[input], block.image, block.h - 1, block.w - 1, rows + 2, stride, stride, channel, channels,
                     x.get(), ld);
          copy_block(dz, block.image, block.h, block.w, rows, cols, stride, out, width, pixels.get(), depth);
          for (int64_t n = 0; n < width; n += kBf16Panel) {
            kernels_.pack_transposed({pixels.get() + n * depth, depth}, std::min(kBf16Panel, width - n), depth,
                                     d.get() + n / kBf16Panel * panel_values);
          }
        }
        for (int64_t tap = 0; tap < 9; ++tap) {
          const Bf16Segment segment = {x.get() + tap / 3 * stride + tap % 3, ld, steps};
          kernels_.gemm({m, width, &segment, 1, d.get(), panel_values, taps.get() + tap * sums.per_tap(),
                         sums.per_channel(), b > sums.first_block(task)});
        }
      }
      sums.store(task, taps.get());
    }
  });
  sums.add();
}

}  // namespace

ProductOf<T> bf16_convolution(const Inputs<T>& in) {
  const Bf16Kernels* kernels = bf16_kernels();
  return kernels == nullptr ? nullptr : std::make_unique<Bf16Convolution>(in, *kernels);
}

}  // namespace dla_fast::cpu
