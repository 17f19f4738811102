// The products of an aggregation node of float tensors in bfloat16 instructions. K and N as in aggregate.cpp.
//
// z is formed in pieces, a tile of pixels by kPanel channels. The weight is split once a call (6KN bytes), the pixels
// tile by tile (6K bytes a pixel, in cache); with few pixels the other way about.

#include "aggregate_bf16x3.h"

namespace dla_fast::cpu {

Bf16x3Steps::Bf16x3Steps(const AggregateInputs& in) {
  for (const Tensor& x : in.xs) {
    begin.push_back(total);
    total += divide_up(x.size(1), kBf16Step);
  }
  begin.push_back(total);
}

const Bf16x3Kernels* bf16x3_for(const AggregateInputs& in) {
  const Bf16x3Kernels* kernels = bf16x3_kernels();
  if (kernels == nullptr || !in.channels_last || in.total() == 0 || in.out_channels == 0) return nullptr;
  return kernels;
}

Bf16x3Forward::Bf16x3Forward(const AggregateInputs& in, const Bf16x3Kernels& kernels)
    : in_(in), kernels_(kernels), steps_(in), stride_(Bf16x3Side::stride_of(steps_.total)) {
  // With its part of the weight a tile fits a second-level cache; the last ones of a call keep every thread busy.
  constexpr int64_t bytes = 768 * 1024, least = 64, most = 128;
  const int64_t fitting = bytes / (std::max<int64_t>(steps_.total, 1) * kBf16x3Step / kBf16Block * 2);
  const int64_t wanted = divide_up(in.total(), 8 * static_cast<int64_t>(at::get_num_threads()));
  few_ = in.total() <= 2 * most;
  rows_ = few_ ? most : round_up(std::clamp(std::min(fitting, wanted), least, most), 2 * kBf16Block);
  tiles_ = divide_up(in.total(), rows_);
}

void Bf16x3Forward::run(const float* weight, const Target& target, const Epilogue& epilogue) const {
  // What the other side meets but a few times is split by whoever multiplies it, straight into cache.
  if (few_) {
    by_panels(weight, target, epilogue);
  } else {
    by_tiles(weight, target, epilogue);
  }
}

// A panel of output channels of the weight, which lies transposed: they are the columns.
void Bf16x3Forward::split_weight(const float* weight, int64_t channel, int64_t input, Bf16x3Side to) const {
  const int64_t depth = in_.in_channels;
  kernels_.right_transposed({weight + channel * depth + in_.offsets[input], depth},
                            std::min(kPanel, in_.out_channels - channel), in_.xs[input].size(1),
                            to.at(0, steps_.begin[input]));
}

void Bf16x3Forward::split_pixels(int64_t first, int64_t rows, int64_t input, Bf16x3Side to) const {
  const int64_t channels = in_.xs[input].size(1);
  kernels_.left({in_.xs[input].const_data_ptr<float>() + first * channels, channels}, rows, channels,
                to.at(0, steps_.begin[input]));
}

void Bf16x3Forward::piece(int64_t tile, int64_t channel, Bf16x3Side left, Bf16x3Side right, float* scratch,
                          Ahead* ahead, const Target& target, const Epilogue& epilogue) const {
  const int64_t first = tile * rows_, rows = std::min(rows_, in_.total() - first);
  const int64_t cols = std::min(kPanel, in_.out_channels - channel);
  const Strided<float> to = target(first, channel, Strided<float>{scratch, kPanel});
  kernels_.gemm({rows, cols, steps_.total, left, right, to.data, to.ld, false, ahead});
  epilogue(Shape{rows, cols, false}, tile, first, channel, Strided<const float>{to.data, to.ld});
}

void Bf16x3Forward::by_tiles(const float* weight, const Target& target, const Epilogue& epilogue) const {
  const int64_t total = in_.total(), depth = in_.in_channels, n = in_.out_channels;
  const int64_t inputs = static_cast<int64_t>(in_.xs.size()), panels = divide_up(n, kPanel);
  const Scratch<c10::BFloat16> weight_parts(Bf16x3Side::values(n, steps_.total));
  const Bf16x3Side right = {weight_parts.get(), stride_};
  parallel(panels * inputs, kPanel * depth / inputs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i / inputs * kPanel;
      split_weight(weight, channel, i % inputs, right.at(channel / kBf16Block, 0));
    }
  });
  const Tasks tasks(tiles_, panels);
  parallel_queue(tasks.count, rows_ * depth * divide_up(n, tasks.groups) / 32, [&](const auto& take) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<c10::BFloat16> pixel_parts(Bf16x3Side::values(rows_, steps_.total));
    const Scratch<float> z(rows_ * kPanel);
    const Bf16x3Side left = {pixel_parts.get(), stride_};
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = task / tasks.groups, first = tile * rows_, rows = std::min(rows_, total - first);
      for (int64_t i = 0; i < inputs; ++i) split_pixels(first, rows, i, left);
      const int64_t next = first + rows, next_rows = std::min(rows_, total - next);
      for (int64_t panel = tasks.begin(task); panel < tasks.end(task); ++panel) {
        // The next tile comes into the cache meanwhile, an input at a time.
        Ahead ahead;
        if (const int64_t input = panel - tasks.begin(task); input < inputs) {
          const int64_t channels = in_.xs[input].size(1);
          ahead = Ahead::of<const float>({in_.xs[input].const_data_ptr<float>() + next * channels, channels}, next_rows,
                                         channels);
        }
        const int64_t channel = panel * kPanel;
        piece(tile, channel, left, right.at(channel / kBf16Block, 0), z.get(), &ahead, target, epilogue);
      }
    }
  });
}

void Bf16x3Forward::by_panels(const float* weight, const Target& target, const Epilogue& epilogue) const {
  const int64_t total = in_.total(), depth = in_.in_channels;
  const int64_t inputs = static_cast<int64_t>(in_.xs.size());
  const Scratch<c10::BFloat16> pixel_parts(Bf16x3Side::values(total, steps_.total));
  const Bf16x3Side left = {pixel_parts.get(), stride_};
  parallel(divide_up(total, kBf16Block), kBf16Block * depth, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBf16Block, rows = std::min(total, end * kBf16Block) - first;
    for (int64_t i = 0; i < inputs; ++i) split_pixels(first, rows, i, left.at(begin, 0));
  });
  const Tasks tasks(divide_up(in_.out_channels, kPanel), tiles_);
  parallel_queue(tasks.count, total / tasks.groups * depth * kPanel / 32, [&](const auto& take) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<c10::BFloat16> weight_parts(Bf16x3Side::values(kPanel, steps_.total));
    const Scratch<float> z(rows_ * kPanel);
    const Bf16x3Side right = {weight_parts.get(), stride_};
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t channel = task / tasks.groups * kPanel;
      for (int64_t i = 0; i < inputs; ++i) split_weight(weight, channel, i, right);
      for (int64_t tile = tasks.begin(task); tile < tasks.end(task); ++tile) {
        piece(tile, channel, left.at(tile * rows_ / kBf16Block, 0), right, z.get(), nullptr, target, epilogue);
      }
    }
  });
}

}  // namespace dla_fast::cpu
