// Forward of the direct convolution (direct.h) of floats in bfloat16 instructions (bf16x3_gemm.h): for strides and
// dilations, where Winograd's algorithm does not serve.
//
// The pixels that a block takes lie in cache, split, sorted by what remains of their row and column divided by the
// stride: those that a tap takes are then neighbours, and all taps read the same memory from other places. The pixels
// of a sorted row, those beyond the block's width included, are the rows of one product for each image.

#include "bf16x3_gemm.h"
#include "direct.h"

namespace dla_fast::cpu {
namespace {

using c10::BFloat16;

// Where the pixels of a block lie: [row % stride][column % stride][rows][cols].
struct Sorted {
  int64_t stride, rows, cols;

  Sorted(int64_t stride, int64_t height, int64_t width)
      : stride(stride), rows(divide_up(height, stride)), cols(divide_up(width, stride)) {}
  int64_t count() const { return stride * stride * rows * cols; }
  int64_t at(int64_t row, int64_t column) const {
    return ((row % stride * stride + column % stride) * rows + row / stride) * cols + column / stride;
  }
};

class Bf16x3Direct : public Direct<float> {
 public:
  Bf16x3Direct(const Inputs<float>& in, const Bf16x3Kernels& kernels);
  bool plain() const override { return false; }
  int64_t packed_bytes() const override {
    return divide_up(in_.out_channels, kPanel) * panel_values() * static_cast<int64_t>(sizeof(BFloat16));
  }
  void pack(void* to) const override;
  int64_t groups() const override { return grid_.count() * pieces(); }
  void forward(float* out, Epilogue<float> epilogue) const override;
  // Sums of parts are not finished in registers, as those of the base are.
  bool infer(const Norm<float>& /*norm*/, const float* /*residual*/, float* /*y*/) const override { return false; }

 private:
  int64_t pieces() const { return grid_.together * grid_.rows; }
  int64_t panel_values() const { return Bf16x3Side::values(kPanel, in_.taps() * steps_.back()); }
  int64_t panel_stride() const { return Bf16x3Side::stride_of(in_.taps() * steps_.back()); }
  void gather(const RowGrid::Block& block, const Sorted& sorted, float* patch, BFloat16* parts) const;

  const Bf16x3Kernels& kernels_;
  std::vector<int64_t> steps_ = {0};  // where each input begins in a tap, and their sum
  int64_t most_channels_ = 0;
};

Bf16x3Direct::Bf16x3Direct(const Inputs<float>& in, const Bf16x3Kernels& kernels)
    : Direct<float>(in, false), kernels_(kernels) {
  for (const Input<float>& x : in.xs) {
    steps_.push_back(steps_.back() + divide_up(x.channels, kBf16Step));
    most_channels_ = std::max(most_channels_, x.channels);
  }
}

// Panel by panel a right-hand side, tap by tap and in that input by input.
void Bf16x3Direct::pack(void* to) const {
  const int64_t taps = in_.taps(), depth = taps * in_.in_channels, inputs = in_.count();
  parallel(divide_up(in_.out_channels, kPanel) * inputs, 3 * depth * kPanel / inputs, [&](int64_t begin, int64_t end) {
    const Scratch<float> work(in_.taps_first ? 0 : kPanel * most_channels_);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t input = task % inputs, n = task / inputs * kPanel, cols = std::min(kPanel, in_.out_channels - n);
      const Input<float>& x = in_.xs[input];
      const Bf16x3Side side = {static_cast<BFloat16*>(to) + task / inputs * panel_values(), panel_stride()};
      for (int64_t tap = 0; tap < taps; ++tap) {
        Strided<const float> from = {in_.weight + n * depth + tap * in_.in_channels + x.offset, depth};
        if (!in_.taps_first) {
          for (int64_t i = 0; i < cols; ++i) {
            const float* w = in_.weight + (n + i) * depth + x.offset * taps + tap;
            for (int64_t c = 0; c < x.channels; ++c) work.get()[i * x.channels + c] = w[c * taps];
          }
          from = {work.get(), x.channels};
        }
        kernels_.right_transposed(from, cols, x.channels, side.at(0, tap * steps_.back() + steps_[input]));
      }
    }
  });
}

// The pixels that a block takes, image by image `sorted.count()` rows of a left-hand side.
void Bf16x3Direct::gather(const RowGrid::Block& block, const Sorted& sorted, float* patch, BFloat16* parts) const {
  const int64_t stride = window_.stride, rows = window_.side(block.height), cols = window_.side(grid_.cols);
  const Bf16x3Side side = Bf16x3Side::of_rows(parts, grid_.together * sorted.count());
  for (size_t i = 0; i < maps_.size(); ++i) {
    const int64_t channels = maps_[i].channels;
    for (int64_t q = 0; q < block.images; ++q) {
      const Bf16x3Side image = side.at(0, steps_[i]).from_row(q * sorted.count());
      maps_[i].gather(block.image + q, block.h * stride - window_.padding(), block.w * stride - window_.padding(), rows,
                      cols, 0, channels, patch);
      if (stride == 1) {
        kernels_.left({patch, channels}, rows * cols, channels, image);
        continue;
      }
      // In the order of memory: what is split is whole blocks, and those that follow are written later.
      for (int64_t phase = 0; phase < stride * stride; ++phase) {
        const int64_t first = phase % stride, count = divide_up(cols - first, stride);
        for (int64_t row = phase / stride; row < rows && count > 0; row += stride) {
          kernels_.left({patch + (row * cols + first) * channels, stride * channels}, count, channels,
                        image.from_row(sorted.at(row, first)));
        }
      }
    }
  }
}

void Bf16x3Direct::forward(float* /*out*/, Epilogue<float> epilogue) const {
  const int64_t n = in_.out_channels, steps = steps_.back();
  const int64_t rows = window_.side(grid_.rows), cols = window_.side(grid_.cols);
  const Sorted sorted(window_.stride, rows, cols);
  std::vector<int64_t> taps;
  for (int64_t y = 0; y < window_.kernel; ++y) {
    for (int64_t x = 0; x < window_.kernel; ++x) {
      taps.push_back(sorted.at(y * window_.dilation, x * window_.dilation) * kBf16Step);
    }
  }
  const PackedWeight<BFloat16> packed(*this, in_);
  const Tasks tasks(grid_.count(), divide_up(n, kPanel));
  const int64_t cost = grid_.together * grid_.rows * sorted.cols * in_.taps() * in_.in_channels;
  parallel_queue(tasks.count, cost * divide_up(n, tasks.groups) / 32, [&](const Take& take) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<float> patch(rows * cols * most_channels_), z(grid_.rows * sorted.cols * kPanel),
        transposed(in_.channels_last ? 0 : grid_.cols * kPanel);
    const Scratch<BFloat16> parts(Bf16x3Side::values_of_rows(grid_.together * sorted.count(), steps), true);
    const Bf16x3Side pixels = Bf16x3Side::of_rows(parts.get(), grid_.together * sorted.count());
    for (int64_t task = take(); task >= 0; task = take()) {
      const RowGrid::Block block = grid_[tasks.tile(task)];
      gather(block, sorted, patch.get(), parts.get());
      const int64_t panel_end = tasks.end(task);
      for (int64_t panel = tasks.begin(task); panel < panel_end; ++panel) {
        const int64_t channel = panel * kPanel, count = std::min(kPanel, n - channel);
        const int64_t next = panel + 1 < panel_end ? panel + 1 : tasks.begin(task);
        const auto weight = [&](int64_t p) { return const_cast<BFloat16*>(packed.get()) + p * panel_values(); };
        Ahead ahead = Ahead::of<const BFloat16>({weight(next), panel_values()}, 1, panel_values());
        for (int64_t q = 0; q < block.images; ++q) {
          kernels_.gemm({(block.height - 1) * sorted.cols + block.width,
                         count,
                         steps,
                         pixels.from_row(q * sorted.count()),
                         {weight(panel), panel_stride()},
                         z.get(),
                         kPanel,
                         false,
                         &ahead,
                         taps.data(),
                         in_.taps()});
          for (int64_t r = 0; r < block.height; ++r) {
            const float* const from = z.get() + r * sorted.cols * kPanel;
            const int64_t at = in_.at(n, block.image + q, (block.h + r) * in_.width + block.w, channel),
                          group = tasks.tile(task) * pieces() + q * grid_.rows + r;
            if (in_.channels_last) {
              epilogue({{block.width, count, false}, group, channel, at}, Strided<const float>{from, kPanel});
            } else {
              kernels<float>().load_transposed({from, kPanel}, {transposed.get(), block.width}, block.width, count);
              epilogue({{count, block.width, true}, group, channel, at},
                       Strided<const float>{transposed.get(), block.width});
            }
          }
        }
      }
    }
  });
}

}  // namespace

ProductOf<float> bf16x3_direct(const Inputs<float>& in) {
  return std::make_unique<Bf16x3Direct>(in, *bf16x3_kernels());
}

}  // namespace dla_fast::cpu
