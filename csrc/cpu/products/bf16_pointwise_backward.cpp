// Backward of the 1x1 product in bfloat16 instructions. K = sum of the inputs' channels, N = output channels.
//
// First, by tiles of pixels: dz, rounded to bfloat16 as aten's is, and from it dx = dz W (contiguous: W^T dz). Then the
// weight's gradient dz x^T, by panels of input channels, so that each is summed in one place over all pixels. It takes
// dz with channels for rows, which the first pass leaves behind (2N bytes a pixel), and x in pairs of pixels.

#include <algorithm>

#include "bf16_pointwise.h"

namespace dla_fast::cpu {
namespace {

using c10::BFloat16;

// What is multiplied at a time: rows, and columns of the right-hand side that stay in cache meanwhile.
constexpr int64_t kPartRows = 64, kPartColumns = 128;
constexpr int64_t kPartRowsMost = kPartRows + kBf16Block;  // a product of few rows writes a whole block
// dz of so many values is formed at a time, in float and in the first-level cache.
constexpr int64_t kFormed = 8192;
// Bytes of a tile of dz (and of the residual's gradient), and values of dz that meet a panel at a time: with the
// weight's or the input's panels they fit a second-level cache.
constexpr int64_t kTileBytes = 512 * 1024, kDepthValues = 256 * 1024;

class Backward {
 public:
  Backward(const Inputs<BFloat16>& in, const Bf16Kernels& kernels, const Gradient<BFloat16>& gradient);
  void run() const;

 private:
  // Pixels of one image (a channels_last tensor is taken for one), at a column of their tile that begins a step.
  struct Chunk {
    int64_t image, pixel, count, column;
  };
  struct PixelTile {
    int64_t first, last, columns;  // its chunks, and columns with the padding of each to whole steps
  };
  // A thread's memory for a tile.
  struct Buffers {
    Scratch<float> formed, du, product;
    Scratch<BFloat16> dz;      // channels_last: rows of pixels; contiguous: packed
    Scratch<BFloat16> across;  // of tasks that do not leave it behind
    int64_t ld_du;
    bool dz_wanted;  // dx is formed from it
  };

  // dz with a row for every channel, tile after tile: the left-hand side of the weight's gradient.
  int64_t tile_values() const { return round_up(in_.out_channels, kBf16Block) * ld_; }
  void inputs_gradients(BFloat16* dz_all) const;
  // keep_du: this task leaves du where it is asked for; others form the same tile.
  void form_channels_last(const PixelTile& tile, BFloat16* across, const Buffers& to, bool keep_du) const;
  void form_contiguous(const PixelTile& tile, BFloat16* across, const Buffers& to, bool keep_du) const;
  void dx_channels_last(const PixelTile& tile, int64_t input, int64_t channel, const BFloat16* packed_weight,
                        const Buffers& from) const;
  void dx_contiguous(const PixelTile& tile, int64_t input, int64_t channel, const BFloat16* weight_across,
                     const Buffers& from) const;
  void weight_gradient(const BFloat16* dz_all) const;
  void pack_x(int64_t tile_begin, int64_t tile_end, int64_t input, int64_t channel, int64_t cols, BFloat16* to,
              int64_t panel_values) const;

  const Inputs<BFloat16>& in_;
  const Bf16Kernels& kernels_;
  const Gradient<BFloat16>& g_;
  int64_t depth_, tile_pixels_, ld_;  // depth: output channels in whole steps
  std::vector<Chunk> chunks_;
  std::vector<PixelTile> tiles_;
};

Backward::Backward(const Inputs<BFloat16>& in, const Bf16Kernels& kernels, const Gradient<BFloat16>& gradient)
    : in_(in), kernels_(kernels), g_(gradient), depth_(round_up(in.out_channels, kBf16Step)) {
  const int64_t images = in.channels_last ? 1 : in.images, pixels = in.channels_last ? in.total() : in.pixels();
  const int64_t threads = thread_count(), row_bytes = depth_ * (gradient.tail.residual != nullptr ? 6 : 2);
  int64_t most = in.channels_last ? 512 : 256;
  while (most > kPartRows && (most * row_bytes > kTileBytes || (threads > 1 && in.total() < 2 * threads * most))) {
    most /= 2;
  }
  // Tiles of about the same size: a rest of a few pixels costs as much as a step.
  const int64_t even = round_up(divide_up(pixels, divide_up(pixels, most)), kBf16Step);
  tile_pixels_ = 0;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t pixel = 0; pixel < pixels; pixel += even) {
      const int64_t count = std::min(even, pixels - pixel), padded = round_up(count, kBf16Step);
      const int64_t index = static_cast<int64_t>(chunks_.size());
      if (tiles_.empty() || tiles_.back().columns + padded > most) tiles_.push_back({index, index, 0});
      PixelTile& tile = tiles_.back();
      chunks_.push_back({image, pixel, count, tile.columns});
      tile.last = index + 1;
      tile.columns += padded;
      tile_pixels_ = std::max(tile_pixels_, tile.columns);
    }
  }
  ld_ = tile_pixels_ + kBf16Step;  // rows a power of two apart would evict each other from the cache
}

void Backward::run() const {
  const Scratch<BFloat16> dz_all(g_.dw != nullptr ? static_cast<int64_t>(tiles_.size()) * tile_values() : 0);
  inputs_gradients(g_.dw != nullptr ? dz_all.get() : nullptr);
  if (g_.dw != nullptr) weight_gradient(dz_all.get());
}

void Backward::inputs_gradients(BFloat16* dz_all) const {
  const int64_t n = in_.out_channels, depth = in_.in_channels, inputs = in_.count();
  // Pieces of dx: so many channels of an input.
  const int64_t piece = in_.channels_last ? kPartColumns : kPartRows;
  std::vector<int64_t> panel_at(inputs + 1, 0);
  for (int64_t i = 0; i < inputs; ++i) panel_at[i + 1] = panel_at[i] + divide_up(in_.xs[i].channels, kBf16Panel);
  struct Piece {
    int64_t input, channel, panel;
  };
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t c = 0; g_.dx[i] != nullptr && c < in_.xs[i].channels; c += piece) {
      pieces.push_back({i, c, panel_at[i] + c / kBf16Panel});
    }
  }
  const int64_t count = static_cast<int64_t>(pieces.size()), tiles = static_cast<int64_t>(tiles_.size());
  if (count == 0 && dz_all == nullptr && g_.dresidual == nullptr) return;
  // channels_last: W_i in panels, the right-hand sides. contiguous: W^T, the left-hand side.
  const int64_t panel_values = depth_ * kBf16Panel;
  const Scratch<BFloat16> weight(
      count == 0 ? 0 : (in_.channels_last ? panel_at.back() * panel_values : (depth + kBf16Block) * depth_));
  parallel(count, piece * n / 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto& [input, channel, panel] = pieces[p];
      const int64_t cols = std::min(piece, in_.xs[input].channels - channel), at = in_.xs[input].offset + channel;
      if (in_.channels_last) {
        kernels_.pack({in_.weight + at, depth}, n, {weight.get() + panel * panel_values, panel_values, 0, cols, true});
      } else {
        kernels_.transpose({in_.weight + at, depth}, n, cols, {weight.get() + at * depth_, depth_});
      }
    }
  });
  // With fewer tiles than threads a tile's pieces are shared out, and each task forms dz for itself.
  const int64_t threads = thread_count();
  const int64_t groups = std::clamp<int64_t>(divide_up(threads, tiles), 1, std::max<int64_t>(count, 1));
  parallel_queue(tiles * groups, tile_pixels_ * n * (depth / groups + 64) / 64, [&](const Take& take) {
    const Bf16Thread thread(kernels_);
    const int64_t dz_values =
        in_.channels_last ? std::max(tile_pixels_, kBf16Block) * (depth_ + kBf16Step) : tile_pixels_ * depth_;
    const Buffers buffers = {
        Scratch<float>(in_.channels_last ? std::max(kFormed, 4 * n) : std::max(kFormed, tile_pixels_)),
        Scratch<float>(g_.wants_du() ? tile_pixels_ * n : 0),
        Scratch<float>(kPartRowsMost * (in_.channels_last ? kPartColumns : tile_pixels_)),
        Scratch<BFloat16>(count > 0 || in_.channels_last ? dz_values : 0, in_.channels_last),
        Scratch<BFloat16>(dz_all == nullptr || groups > 1 ? tile_values() : 0),
        in_.channels_last ? n : tile_pixels_,
        count > 0};
    for (int64_t task = take(); task >= 0; task = take()) {
      const PixelTile& tile = tiles_[task / groups];
      const int64_t group = task % groups;
      const bool keep = dz_all != nullptr && group == 0;
      BFloat16* across = keep ? dz_all + task / groups * tile_values() : buffers.across.get();
      if (in_.channels_last) {
        form_channels_last(tile, keep ? across : nullptr, buffers, group == 0);
      } else {
        form_contiguous(tile, across, buffers, group == 0);
      }
      for (int64_t p = count * group / groups; p < count * (group + 1) / groups; ++p) {
        const auto& [input, channel, panel] = pieces[p];
        if (in_.channels_last) {
          dx_channels_last(tile, input, channel, weight.get() + panel * panel_values, buffers);
        } else {
          dx_contiguous(tile, input, channel, weight.get() + (in_.xs[input].offset + channel) * depth_, buffers);
        }
      }
    }
  });
}

void Backward::form_channels_last(const PixelTile& tile, BFloat16* across, const Buffers& to, bool keep_du) const {
  const int64_t n = in_.out_channels, ld = depth_ + kBf16Step, together = std::max<int64_t>(4, kFormed / n / 4 * 4);
  const Chunk& chunk = chunks_[tile.first];
  for (int64_t row = 0; row < chunk.count; row += together) {
    const int64_t rows = std::min(together, chunk.count - row), at = (chunk.pixel + row) * n;
    g_.tail.form({rows, n, false}, 0, at, n, {to.formed.get(), n},
                 {g_.wants_du() ? to.du.get() + row * n : nullptr, n});
    kernels_.store({to.formed.get(), n}, {nullptr, 0}, {to.dz.get() + row * ld, ld}, rows, n);
  }
  if (across != nullptr) kernels_.transpose({to.dz.get(), ld}, chunk.count, n, {across, ld_});
  if (keep_du && g_.dresidual != nullptr) {
    kernels_.store({to.du.get(), n}, {nullptr, 0}, {g_.dresidual + chunk.pixel * n, n}, chunk.count, n);
  }
}

void Backward::form_contiguous(const PixelTile& tile, BFloat16* across, const Buffers& to, bool keep_du) const {
  const int64_t n = in_.out_channels, pixels = in_.pixels();
  for (int64_t i = tile.first; i < tile.last; ++i) {
    const Chunk& chunk = chunks_[i];
    const int64_t together = std::max<int64_t>(1, kFormed / chunk.count);
    const int64_t padding = round_up(chunk.count, kBf16Step) - chunk.count;
    for (int64_t c = 0; c < n; c += together) {
      const int64_t rows = std::min(together, n - c), at = (chunk.image * n + c) * pixels + chunk.pixel;
      BFloat16* dz = across + c * ld_ + chunk.column;
      float* du = g_.wants_du() ? to.du.get() + c * to.ld_du + chunk.column : nullptr;
      g_.tail.form({rows, chunk.count, true}, c, at, pixels, {to.formed.get(), chunk.count}, {du, to.ld_du});
      if (keep_du && g_.dresidual != nullptr) {
        kernels_.store({du, to.ld_du}, {nullptr, 0}, {g_.dresidual + at, pixels}, rows, chunk.count);
      }
      kernels_.store({to.formed.get(), chunk.count}, {nullptr, 0}, {dz, ld_}, rows, chunk.count);
      for (int64_t r = 0; padding > 0 && r < rows; ++r) {
        std::fill_n(dz + r * ld_ + chunk.count, padding, BFloat16(0));
      }
    }
  }
  if (to.dz_wanted) kernels_.pack({across, ld_}, n, {to.dz.get(), depth_ * kBf16Panel, 0, tile.columns, true});
}

void Backward::dx_channels_last(const PixelTile& tile, int64_t input, int64_t channel, const BFloat16* packed_weight,
                                const Buffers& from) const {
  const int64_t channels = in_.xs[input].channels, cols = std::min(kPartColumns, channels - channel);
  const int64_t ld = depth_ + kBf16Step;
  const Chunk& chunk = chunks_[tile.first];
  BFloat16* dx = g_.dx[input] + chunk.pixel * channels + channel;
  for (int64_t row = 0; row < chunk.count; row += kPartRows) {
    const int64_t rows = std::min(kPartRows, chunk.count - row);
    // A product of few rows reads a whole block, which the tile has: rows of it that came before, or of its padding.
    const Bf16Segment segment = {from.dz.get() + row * ld, ld, depth_ / kBf16Step};
    kernels_.gemm({rows, cols, &segment, 1, packed_weight, depth_ * kBf16Panel, from.product.get(), kPartColumns});
    const bool more = g_.adds(input);
    kernels_.store({from.product.get(), kPartColumns},
                   {more ? from.du.get() + row * from.ld_du + channel : nullptr, from.ld_du},
                   {dx + row * channels, channels}, rows, cols);
  }
}

void Backward::dx_contiguous(const PixelTile& tile, int64_t input, int64_t channel, const BFloat16* weight_across,
                             const Buffers& from) const {
  const int64_t channels = in_.xs[input].channels, rows = std::min(kPartRows, channels - channel);
  const Bf16Segment segment = {weight_across, depth_, depth_ / kBf16Step};
  kernels_.gemm(
      {rows, tile.columns, &segment, 1, from.dz.get(), depth_ * kBf16Panel, from.product.get(), tile_pixels_});
  for (int64_t i = tile.first; i < tile.last; ++i) {
    const Chunk& chunk = chunks_[i];
    const float* product = from.product.get() + chunk.column;
    BFloat16* dx = g_.dx[input] + (chunk.image * channels + channel) * in_.pixels();
    const bool more = g_.adds(input);
    kernels_.store({product, tile_pixels_},
                   {more ? from.du.get() + channel * from.ld_du + chunk.column : nullptr, from.ld_du},
                   {dx + chunk.pixel, in_.pixels()}, rows, chunk.count);
  }
}

// x of some tiles as the right-hand side of the weight's gradient: pairs of pixels.
void Backward::pack_x(int64_t tile_begin, int64_t tile_end, int64_t input, int64_t channel, int64_t cols, BFloat16* to,
                      int64_t panel_values) const {
  const int64_t channels = in_.xs[input].channels, pixels = in_.pixels();
  const BFloat16* x = in_.xs[input].data;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    for (int64_t i = tiles_[t].first; i < tiles_[t].last; ++i) {
      const Chunk& chunk = chunks_[i];
      if (in_.channels_last) {
        kernels_.pack({x + chunk.pixel * channels + channel, channels}, chunk.count, {to, panel_values, 0, cols, true});
      } else {
        const BFloat16* rows = x + (chunk.image * channels + channel) * pixels + chunk.pixel;
        for (int64_t c = 0; c < cols; c += kBf16Panel) {
          kernels_.pack_transposed({rows + c * pixels, pixels}, std::min(kBf16Panel, cols - c), chunk.count,
                                   to + c / kBf16Panel * panel_values);
        }
      }
      to += divide_up(chunk.count, kBf16Step) * kBf16PanelStep;
    }
  }
}

void Backward::weight_gradient(const BFloat16* dz_all) const {
  const int64_t n = in_.out_channels, rows = round_up(n, kBf16Block), depth = in_.in_channels;
  const int64_t threads = thread_count(), tiles = static_cast<int64_t>(tiles_.size());
  const int64_t wanted = std::clamp<int64_t>(kDepthValues / n, 256, 1024);
  const int64_t per_block = std::max<int64_t>(1, wanted / tile_pixels_), blocks = divide_up(tiles, per_block);
  // Columns are shared out among the threads, and pixels as well where those are few: a sum of its own for each slice.
  int64_t width = kPartColumns;
  while (threads > 1 && width > kBf16Panel && depth < 2 * threads * width) width /= 2;
  struct Piece {
    int64_t input, channel;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < in_.xs.size(); ++i) {
    for (int64_t c = 0; c < in_.xs[i].channels; c += width) pieces.push_back({static_cast<int64_t>(i), c});
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (count == 0) return;
  const int64_t slices = std::clamp<int64_t>(divide_up(threads, count), 1, blocks);
  const Scratch<float> sums(slices > 1 ? slices * n * depth : 0);
  parallel_queue(count * slices, in_.total() * n * width / slices / 64, [&](const Take& take) {
    const Bf16Thread thread(kernels_);
    const int64_t panel_values = per_block * tile_pixels_ * kBf16Panel;
    const Scratch<BFloat16> x(width / kBf16Panel * panel_values);
    const Scratch<float> dw(rows * width);
    std::vector<Bf16Segment> segments;
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t slice = task % slices, begin = blocks * slice / slices, end = blocks * (slice + 1) / slices;
      const auto& [input, channel] = pieces[task / slices];
      const int64_t cols = std::min(width, in_.xs[input].channels - channel), at = in_.xs[input].offset + channel;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t tile = block * per_block, tile_end = std::min(tiles, tile + per_block);
        pack_x(tile, tile_end, input, channel, cols, x.get(), panel_values);
        segments.clear();
        for (int64_t t = tile; t < tile_end; ++t) {
          segments.push_back({dz_all + t * tile_values(), ld_, tiles_[t].columns / kBf16Step});
        }
        kernels_.gemm({rows, cols, segments.data(), static_cast<int64_t>(segments.size()), x.get(), panel_values,
                       dw.get(), width, block > begin});
      }
      if (slices == 1) {
        kernels_.store({dw.get(), width}, {nullptr, 0}, {g_.dw + at, depth}, n, cols);
      } else {
        for (int64_t r = 0; r < n; ++r) {
          std::copy_n(dw.get() + r * width, cols, sums.get() + (slice * n + r) * depth + at);
        }
      }
    }
  });
  if (slices == 1) return;
  parallel_ranges(n * depth, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t s = 1; s < slices; ++s) {
      for (int64_t i = begin; i < end; ++i) sums.get()[i] += sums.get()[s * n * depth + i];
    }
    kernels_.store({sums.get() + begin, 0}, {nullptr, 0}, {g_.dw + begin, 0}, 1, end - begin);
  });
}

}  // namespace

void Bf16Pointwise::backward(const Gradient<BFloat16>& gradient) const {
  Backward(in_, kernels_, gradient).run();
}

}  // namespace dla_fast::cpu
