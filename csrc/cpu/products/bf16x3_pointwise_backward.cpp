// Backward of the 1x1 product of floats in bfloat16 instructions. K = sum of the inputs' channels, N = output channels.
//
// dz is formed in cache, a tile of pixels at a time, and split twice: over its channels for dx = W^T dz, over its
// pixels for dW = dz x^T. The weight is split once a call, x where its gradient is summed.

#include <algorithm>

#include "bf16x3_pointwise.h"

namespace dla_fast::cpu {
namespace {

using c10::BFloat16;

constexpr int64_t kPad = 16;  // keeps the rows of a tile off the same cache sets

int64_t steps_of(int64_t depth) {
  return divide_up(depth, kBf16Step);
}

class Backward {
 public:
  // dw: sums of the weight's gradient, one for every slice; none where it is not needed.
  Backward(const Inputs<float>& in, const Bf16x3Kernels& kernels, const Gradient<float>& gradient,
           const std::vector<float*>& dw)
      : in_(in),
        kernels_(kernels),
        g_(gradient),
        dw_(dw),
        steps_(steps_of(in.out_channels)),
        stride_(Bf16x3Side::stride_of(steps_)),
        panels_(panels_of(in, &gradient.dx)) {}

  // Slices of the tiles sum a dW each.
  void by_tiles(int64_t slices) const;
  // dz is kept for all pixels, and dW formed from it in one place: for few pixels and many channels.
  void whole() const;

 private:
  // A panel of channels of an input; where all of the weight is split, its part begins at `block`.
  struct Panel {
    int64_t input, channel, count, block;
  };

  static std::vector<Panel> panels_of(const Inputs<float>& in, const std::vector<float*>* wanted);
  int64_t ld(const PixelTiles& tiles) const;
  void split_weight(const Panel& panel, Bf16x3Side to) const;
  void form(const PixelTiles& tiles, const PixelTiles::Tile& tile, float* dz, float* du) const;
  // dz as formed there, split as dx takes it and as dW does.
  void split_for_dx(const PixelTiles& tiles, const PixelTiles::Tile& tile, const float* dz, Bf16x3Side to) const;
  void split_for_dw(const PixelTiles& tiles, const PixelTiles::Tile& tile, const float* dz, Bf16x3Side to) const;
  void split_x(const PixelTiles& tiles, const PixelTiles::Tile& tile, const Panel& panel, Bf16x3Side to) const;
  void dx(const PixelTiles& tiles, const PixelTiles::Tile& tile, const Panel& panel, Bf16x3Side dz, const float* du,
          Bf16x3Side weight, Ahead* ahead) const;

  const Inputs<float>& in_;
  const Bf16x3Kernels& kernels_;
  const Gradient<float>& g_;
  const std::vector<float*>& dw_;
  int64_t steps_, stride_;     // of N in depth
  std::vector<Panel> panels_;  // of dx
};

std::vector<Backward::Panel> Backward::panels_of(const Inputs<float>& in, const std::vector<float*>* wanted) {
  std::vector<Panel> panels;
  int64_t block = 0;
  for (int64_t i = 0; i < in.count(); ++i) {
    const int64_t channels = wanted == nullptr || (*wanted)[i] != nullptr ? in.xs[i].channels : 0;
    for (int64_t c = 0; c < channels; c += kPanel) {
      panels.push_back({i, c, std::min(kPanel, channels - c), block});
      block += kPanel / kBf16Block;
    }
  }
  return panels;
}

// Of the rows of a tile of dz.
int64_t Backward::ld(const PixelTiles& tiles) const {
  return (in_.channels_last ? in_.out_channels : tiles.size) + kPad;
}

// Of W_i: its input channels by N in depth.
void Backward::split_weight(const Panel& panel, Bf16x3Side to) const {
  const auto split = in_.channels_last ? kernels_.right : kernels_.left_transposed;
  split({in_.weight + in_.xs[panel.input].offset + panel.channel, in_.in_channels}, panel.count, in_.out_channels, to);
}

// dz, and the residual's gradient du, laid out like a tile of z; du without padding.
void Backward::form(const PixelTiles& tiles, const PixelTiles::Tile& tile, float* dz, float* du) const {
  const int64_t n = in_.out_channels, at = in_.at(n, tile.image, tile.pixel, 0), ld_map = in_.ld(n),
                ld_du = ld(tiles) - kPad;
  const Shape shape = tiles.shape(tile, n);
  g_.tail.form(shape, 0, at, ld_map, {dz, ld(tiles)}, {g_.wants_du() ? du : nullptr, ld_du});
  if (g_.dresidual != nullptr) {
    cpu::kernels<float>().store({du, ld_du}, {g_.dresidual + at, ld_map}, shape.rows, shape.cols);
  }
}

void Backward::split_for_dx(const PixelTiles& tiles, const PixelTiles::Tile& tile, const float* dz,
                            Bf16x3Side to) const {
  (in_.channels_last ? kernels_.left : kernels_.right)({dz, ld(tiles)}, tile.count, in_.out_channels, to);
}

void Backward::split_for_dw(const PixelTiles& tiles, const PixelTiles::Tile& tile, const float* dz,
                            Bf16x3Side to) const {
  (in_.channels_last ? kernels_.left_transposed : kernels_.left)({dz, ld(tiles)}, in_.out_channels, tile.count, to);
}

void Backward::split_x(const PixelTiles& tiles, const PixelTiles::Tile& tile, const Panel& panel, Bf16x3Side to) const {
  const auto split = in_.channels_last ? kernels_.right : kernels_.right_transposed;
  split(tiles.in_map(in_.xs[panel.input].data, in_.xs[panel.input].channels, tile, panel.channel), panel.count,
        tile.count, to);
}

void Backward::dx(const PixelTiles& tiles, const PixelTiles::Tile& tile, const Panel& panel, Bf16x3Side dz,
                  const float* du, Bf16x3Side weight, Ahead* ahead) const {
  const Strided<float> to = tiles.in_map(g_.dx[panel.input], in_.xs[panel.input].channels, tile, panel.channel);
  const Shape shape = tiles.shape(tile, panel.count);
  const bool add = g_.adds(panel.input);
  if (add) {
    const int64_t ld_du = ld(tiles) - kPad;
    du += in_.channels_last ? panel.channel : panel.channel * ld_du;
    for (int64_t r = 0; r < shape.rows; ++r) std::copy_n(du + r * ld_du, shape.cols, to.data + r * to.ld);
  }
  const auto [left, right] = in_.channels_last ? std::pair(dz, weight) : std::pair(weight, dz);
  kernels_.gemm({shape.rows, shape.cols, steps_, left, right, to.data, to.ld, add, ahead});
}

void Backward::by_tiles(int64_t slices) const {
  // A tile of N channels, in float and split twice, fits a second-level cache beside an input and the sums of dW, which
  // each tile reads and writes.
  constexpr int64_t values = 32768;
  const int64_t n = in_.out_channels, depth = in_.in_channels;
  const PixelTiles tiles(in_, std::clamp<int64_t>(values / n, 96, 256), kBf16Step, slices);
  const int64_t pixel_steps = tiles.size / kBf16Step, pixel_stride = Bf16x3Side::stride_of(pixel_steps);
  const bool need_dw = !dw_.empty();
  int64_t widest = 0;
  for (const Input<float>& x : in_.xs) widest = std::max(widest, x.channels);
  const Scratch<BFloat16> weight_parts(static_cast<int64_t>(panels_.size()) * Bf16x3Side::values(kPanel, steps_));
  const Bf16x3Side weight = {weight_parts.get(), stride_};
  parallel(static_cast<int64_t>(panels_.size()), kPanel * n, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) split_weight(panels_[p], weight.at(panels_[p].block, 0));
  });
  parallel_ranges(slices, 1, [&](int64_t begin, int64_t end) {
    const Bf16Thread thread(kernels_.thread);
    const int64_t tile_values = tiles.size * n;
    const Scratch<float> dz(tile_values + std::max(tiles.size, n) * kPad), du(g_.wants_du() ? tile_values : 0);
    const Scratch<BFloat16> over_channels(panels_.empty() ? 0 : Bf16x3Side::values(tiles.size, steps_)),
        over_pixels(need_dw ? Bf16x3Side::values(n, pixel_steps) : 0),
        x_parts(need_dw ? Bf16x3Side::values(widest, pixel_steps) : 0);
    const Bf16x3Side dx_side = {over_channels.get(), stride_}, dw_side = {over_pixels.get(), pixel_stride},
                     x_side = {x_parts.get(), pixel_stride};
    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t first = tiles.count() * slice / slices, last = tiles.count() * (slice + 1) / slices;
      if (need_dw && first == last) std::fill_n(dw_[slice], n * depth, 0.0f);
      for (int64_t i = first; i < last; ++i) {
        const PixelTiles::Tile tile = tiles[i];
        form(tiles, tile, dz.get(), du.get());
        if (!panels_.empty()) split_for_dx(tiles, tile, dz.get(), dx_side);
        for (const Panel& panel : panels_) {
          // x comes into the cache meanwhile, for dW.
          const int64_t channels = in_.xs[panel.input].channels;
          Ahead ahead;
          if (need_dw) ahead = tiles.ahead(in_.xs[panel.input].data, channels, tile, panel.channel, panel.count);
          dx(tiles, tile, panel, dx_side, du.get(), weight.at(panel.block, 0), &ahead);
        }
        if (!need_dw) continue;
        split_for_dw(tiles, tile, dz.get(), dw_side);
        Ahead ahead[2];
        if (i + 1 < last) {
          ahead[0] = tiles.ahead(g_.tail.z, n, tiles[i + 1], 0, n);
          ahead[1] = tiles.ahead(g_.tail.dy, n, tiles[i + 1], 0, n);
        }
        for (int64_t input = 0; input < in_.count(); ++input) {
          const int64_t channels = in_.xs[input].channels;
          split_x(tiles, tile, {input, 0, channels, 0}, x_side);
          kernels_.gemm({n, channels, steps_of(tile.count), dw_side, x_side, dw_[slice] + in_.xs[input].offset, depth,
                         i > first, &ahead[input % 2]});
        }
      }
    }
  });
}

void Backward::whole() const {
  // What is over pixels comes to whole steps in every image.
  constexpr int64_t most = 128;
  const int64_t n = in_.out_channels, depth = in_.in_channels;
  const PixelTiles tiles(in_, most, kBf16Step);
  const int64_t image_steps = steps_of(tiles.pixels), pixel_steps = tiles.images * image_steps;
  const auto step_of = [&](const PixelTiles::Tile& tile) { return tile.image * image_steps + tile.pixel / kBf16Step; };
  const int64_t pixel_stride = Bf16x3Side::stride_of(pixel_steps), tile_values = Bf16x3Side::values(tiles.size, steps_);
  const Scratch<BFloat16> over_channels(panels_.empty() ? 0 : tiles.count() * tile_values),
      over_pixels(Bf16x3Side::values(n, pixel_steps));
  const Scratch<float> du(g_.wants_du() ? tiles.count() * tiles.size * n : 0);
  const auto dx_side = [&](int64_t tile) { return Bf16x3Side{over_channels.get() + tile * tile_values, stride_}; };
  const auto du_of = [&](int64_t tile) { return du.get() + (g_.wants_du() ? tile * tiles.size * n : 0); };
  const Bf16x3Side dw_side = {over_pixels.get(), pixel_stride};
  parallel_queue(tiles.count(), 4 * tiles.size * n, [&](const Take& take) {
    const Scratch<float> dz(tiles.size * n + std::max(tiles.size, n) * kPad);
    for (int64_t i = take(); i >= 0; i = take()) {
      form(tiles, tiles[i], dz.get(), du_of(i));
      if (!panels_.empty()) split_for_dx(tiles, tiles[i], dz.get(), dx_side(i));
      split_for_dw(tiles, tiles[i], dz.get(), dw_side.at(0, step_of(tiles[i])));
    }
  });
  // A panel of the weight meets few tiles: it is split by whoever multiplies it, straight into cache.
  const Tasks tasks(static_cast<int64_t>(panels_.size()), tiles.count());
  parallel_queue(tasks.count, in_.total() / tasks.groups * n * kPanel / 32, [&](const Take& take) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<BFloat16> weight_parts(Bf16x3Side::values(kPanel, steps_));
    const Bf16x3Side weight = {weight_parts.get(), stride_};
    for (int64_t task = take(); task >= 0; task = take()) {
      const Panel& panel = panels_[tasks.tile(task)];
      split_weight(panel, weight);
      for (int64_t i = tasks.begin(task); i < tasks.end(task); ++i) {
        dx(tiles, tiles[i], panel, dx_side(i), du_of(i), weight, nullptr);
      }
    }
  });
  const std::vector<Panel> columns = panels_of(in_, nullptr);
  parallel_queue(static_cast<int64_t>(columns.size()), in_.total() * n * kPanel / 32, [&](const Take& take) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<BFloat16> x_parts(Bf16x3Side::values(kPanel, pixel_steps));
    const Bf16x3Side x_side = {x_parts.get(), pixel_stride};
    for (int64_t task = take(); task >= 0; task = take()) {
      const Panel& panel = columns[task];
      for (int64_t i = 0; i < tiles.count(); ++i) split_x(tiles, tiles[i], panel, x_side.at(0, step_of(tiles[i])));
      kernels_.gemm(
          {n, panel.count, pixel_steps, dw_side, x_side, dw_[0] + in_.xs[panel.input].offset + panel.channel, depth});
    }
  });
}

}  // namespace

void Bf16x3Pointwise::backward(const Gradient<float>& gradient) const {
  const int64_t total = in_.total(), weights = in_.in_channels * in_.out_channels;
  const int64_t tiles = in_.channels_last ? total / 24 : in_.images * divide_up(in_.pixels(), kPanel);
  const int64_t slices = slices_of(tiles, total, weights);
  const bool whole = gradient.dw != nullptr && 2 * slices * in_.in_channels > 3 * total;
  const SlicedSums<float> sums(gradient.dw, weights, whole ? 1 : slices);
  const Backward run(in_, kernels_, gradient, sums.at);
  whole ? run.whole() : run.by_tiles(slices);
  sums.add();
}

}  // namespace dla_fast::cpu
