// Backward of the aggregation node of float tensors in bfloat16 instructions. K and N as in aggregate.cpp.
//
// dz is formed in cache, a tile of pixels at a time, and split twice: with pixels for rows it gives dx = dz W, with
// channels for rows dW = dz^T x. The weight is split once a call, x where its gradient is summed.

#include <algorithm>

#include "aggregate_bf16x3.h"

namespace dla_fast::cpu {
namespace {

using c10::BFloat16;

constexpr int64_t kPad = 16;  // keeps the rows of a tile off the same cache sets

}  // namespace

Bf16x3Backward::Bf16x3Backward(const AggregateInputs& in, const Bf16x3Kernels& kernels, const Args& args)
    : in_(in),
      kernels_(kernels),
      args_(args),
      steps_(divide_up(in.out_channels, kBf16Step)),
      stride_(Bf16x3Side::stride_of(steps_)) {
  for (int64_t i = 0; i < static_cast<int64_t>(in.xs.size()); ++i) {
    const int64_t channels = args.need_dx[i] ? in.xs[i].size(1) : 0;
    for (int64_t c = 0; c < channels; c += kPanel) {
      panels_.push_back({i, c, std::min(kPanel, channels - c), blocks_});
      blocks_ += divide_up(panels_.back().cols, kBf16Block);
    }
  }
}

// Of W_i, with its input channels for columns.
void Bf16x3Backward::split_weight(const Panel& panel, Bf16x3Side to) const {
  kernels_.right({args_.weight + in_.offsets[panel.input] + panel.channel, in_.in_channels}, panel.cols,
                 in_.out_channels, to);
}

// dz of a tile of pixels (rows of N + kPad values), and the residual's gradient du (rows of N).
void Bf16x3Backward::tail_gradient(int64_t first, int64_t rows, float* dz, float* du) const {
  const int64_t n = in_.out_channels, at = first * n;
  cpu::kernels<float>().apply(Shape{rows, n, false}, args_.norm.from(0), args_.m0.data(), args_.m1.data(),
                              {args_.dy + at, n}, {args_.z + at, n}, {args_.residual ? x(0) + at : nullptr, n},
                              {dz, n + kPad}, {args_.residual ? du : nullptr, n});
}

void Bf16x3Backward::dx(const Panel& panel, int64_t first, int64_t rows, Bf16x3Side dz, const float* du,
                        Bf16x3Side weight, Ahead* ahead) const {
  const int64_t channels = in_.xs[panel.input].size(1);
  float* to = args_.dxs[panel.input].mutable_data_ptr<float>() + first * channels + panel.channel;
  const bool add = args_.residual && panel.input == 0;
  for (int64_t r = 0; add && r < rows; ++r)
    std::copy_n(du + r * channels + panel.channel, panel.cols, to + r * channels);
  kernels_.gemm({rows, panel.cols, steps_, dz, weight, to, channels, add, ahead});
}

void Bf16x3Backward::by_tiles(int64_t slices) const {
  // A tile of N channels, in float and split twice, fits a second-level cache beside an input and sums of dW; each tile
  // reads and writes those sums.
  constexpr int64_t values = 32768;
  const int64_t total = in_.total(), n = in_.out_channels, depth = in_.in_channels;
  const int64_t wanted = round_up(std::clamp<int64_t>(values / n, 96, 256), kBf16Step);
  const int64_t per_slice = divide_up(total, slices);
  const int64_t rows_max = round_up(divide_up(per_slice, divide_up(per_slice, wanted)), kBf16Step);
  const int64_t pixel_steps = rows_max / kBf16Step, pixel_stride = Bf16x3Side::stride_of(pixel_steps);
  int64_t widest = 0;
  for (const Tensor& t : in_.xs) widest = std::max(widest, t.size(1));
  const bool need_dw = !args_.dw.empty();
  const Scratch<BFloat16> weight_parts(blocks_ * stride_);
  const Bf16x3Side weight = {weight_parts.get(), stride_};
  parallel(static_cast<int64_t>(panels_.size()), kPanel * n, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) split_weight(panels_[p], weight.at(panels_[p].block, 0));
  });
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<float> dz(rows_max * (n + kPad)), du(args_.residual ? rows_max * n : 0);
    const Scratch<BFloat16> dz_rows(panels_.empty() ? 0 : Bf16x3Side::values(rows_max, steps_)),
        dz_across(need_dw ? Bf16x3Side::values(n, pixel_steps) : 0),
        pixels(need_dw ? Bf16x3Side::values(widest, pixel_steps) : 0);
    const Bf16x3Side rows_side = {dz_rows.get(), stride_}, across = {dz_across.get(), pixel_stride},
                     right = {pixels.get(), pixel_stride};
    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t start = total * slice / slices, last = total * (slice + 1) / slices;
      for (int64_t first = start; first < last; first += rows_max) {
        const int64_t rows = std::min(rows_max, last - first), next = first + rows,
                      next_rows = std::min(rows_max, last - next);
        tail_gradient(first, rows, dz.get(), du.get());
        if (!panels_.empty()) kernels_.left({dz.get(), n + kPad}, rows, n, rows_side);
        for (const Panel& panel : panels_) {
          // x comes into the cache meanwhile, for dW.
          const int64_t channels = in_.xs[panel.input].size(1);
          Ahead ahead;
          if (need_dw) {
            ahead =
                Ahead::of<const float>({x(panel.input) + first * channels + panel.channel, channels}, rows, panel.cols);
          }
          dx(panel, first, rows, rows_side, du.get(), weight.at(panel.block, 0), &ahead);
        }
        if (!need_dw) continue;
        kernels_.left_transposed({dz.get(), n + kPad}, n, rows, across);
        Ahead ahead[2] = {Ahead::of<const float>({args_.z + next * n, n}, next_rows, n),
                          Ahead::of<const float>({args_.dy + next * n, n}, next_rows, n)};
        for (size_t i = 0; i < in_.xs.size(); ++i) {
          const int64_t channels = in_.xs[i].size(1);
          kernels_.right({x(i) + first * channels, channels}, channels, rows, right);
          kernels_.gemm({n, channels, divide_up(rows, kBf16Step), across, right, args_.dw[slice] + in_.offsets[i],
                         depth, first > start, &ahead[i % 2]});
        }
      }
    }
  });
}

void Bf16x3Backward::whole() const {
  const int64_t total = in_.total(), n = in_.out_channels, depth = in_.in_channels;
  const int64_t pixel_steps = divide_up(total, kBf16Step), pixel_stride = Bf16x3Side::stride_of(pixel_steps);
  const Scratch<BFloat16> dz_rows(panels_.empty() ? 0 : Bf16x3Side::values(total, steps_)),
      dz_across(Bf16x3Side::values(n, pixel_steps));
  const Scratch<float> du(args_.residual ? total * n : 0);
  const Bf16x3Side rows_side = {dz_rows.get(), stride_}, across = {dz_across.get(), pixel_stride};
  parallel_queue(pixel_steps, 2 * kBf16Step * n, [&](const auto& take) {
    const Scratch<float> dz(kBf16Step * (n + kPad));
    for (int64_t step = take(); step >= 0; step = take()) {
      const int64_t first = step * kBf16Step, rows = std::min(kBf16Step, total - first);
      tail_gradient(first, rows, dz.get(), du.get() + (args_.residual ? first * n : 0));
      if (!panels_.empty()) kernels_.left({dz.get(), n + kPad}, rows, n, rows_side.at(first / kBf16Block, 0));
      kernels_.left_transposed({dz.get(), n + kPad}, n, rows, across.at(0, step));
    }
  });
  // A panel of the weight meets few tiles: it is split by whoever multiplies it, straight into cache.
  constexpr int64_t tile = 128;
  const Tasks tasks(static_cast<int64_t>(panels_.size()), divide_up(total, tile));
  parallel_queue(tasks.count, total / tasks.groups * n * kPanel / 32, [&](const auto& take) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<BFloat16> weight(Bf16x3Side::values(kPanel, steps_));
    const Bf16x3Side right = {weight.get(), stride_};
    for (int64_t task = take(); task >= 0; task = take()) {
      const Panel& panel = panels_[task / tasks.groups];
      split_weight(panel, right);
      for (int64_t t = tasks.begin(task); t < tasks.end(task); ++t) {
        const int64_t first = t * tile;
        dx(panel, first, std::min(tile, total - first), rows_side.at(first / kBf16Block, 0),
           du.get() + (args_.residual ? first * n : 0), right, nullptr);
      }
    }
  });
  std::vector<Panel> columns;
  for (int64_t i = 0; i < static_cast<int64_t>(in_.xs.size()); ++i) {
    const int64_t channels = in_.xs[i].size(1);
    for (int64_t c = 0; c < channels; c += kPanel) columns.push_back({i, c, std::min(kPanel, channels - c), 0});
  }
  parallel_queue(static_cast<int64_t>(columns.size()), total * n * kPanel / 32, [&](const auto& take) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<BFloat16> pixels(Bf16x3Side::values(kPanel, pixel_steps));
    const Bf16x3Side right = {pixels.get(), pixel_stride};
    for (int64_t task = take(); task >= 0; task = take()) {
      const Panel& panel = columns[task];
      const int64_t channels = in_.xs[panel.input].size(1);
      kernels_.right({x(panel.input) + panel.channel, channels}, panel.cols, total, right);
      kernels_.gemm(
          {n, panel.cols, pixel_steps, across, right, args_.dw[0] + in_.offsets[panel.input] + panel.channel, depth});
    }
  });
}

}  // namespace dla_fast::cpu
