#include "winograd.h"

#include <ATen/ops/sum.h>

namespace dla_fast::cpu {

TileGrid::TileGrid(int64_t images, int64_t height, int64_t width, int64_t most_tiles)
    : images(images), height(height), width(width) {
  // About as high as wide: a block reads a pixel more on every side.
  constexpr int64_t widest = 16;
  const int64_t down = std::max<int64_t>(divide_up(height, 2), 1), across = std::max<int64_t>(divide_up(width, 2), 1);
  cols = divide_up(across, divide_up(across, widest));
  col_blocks = divide_up(across, cols);
  rows = std::clamp<int64_t>(most_tiles / cols, 1, down);
  rows = divide_up(down, divide_up(down, rows));
  row_blocks = divide_up(down, rows);
}

TileGrid::Block TileGrid::operator[](int64_t i) const {
  const int64_t w = i % col_blocks * 2 * cols, h = i / col_blocks % row_blocks * 2 * rows;
  return {i / col_blocks / row_blocks, h, w, std::min(2 * rows, height - h), std::min(2 * cols, width - w)};
}

TileGrid grid_of(const MergeInputs& in) {
  // Few enough tiles for the second-level cache to hold them before and after the products, or where it cannot, so many
  // that the weight passes by less often.
  constexpr int64_t few = 48, many = 96, cached = 3 << 17;
  return {in.images, in.height, in.width, few * 16 * (in.in_channels + in.out_channels) <= cached ? few : many};
}

namespace {

// The gradient of a weight is cut into pieces that stay in the second-level cache while the map passes by.
constexpr int64_t kDeep = 64, kWide = 128;

struct Piece {
  size_t input;
  int64_t channel, depth;  // of that input
  int64_t out, wide;       // of dz
};

std::vector<Piece> pieces_of(const MergeInputs& in) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < in.xs.size(); ++i) {
    for (int64_t c = 0; c < in.xs[i].size(1); c += kDeep) {
      for (int64_t n = 0; n < in.out_channels; n += kWide) {
        pieces.push_back({i, c, std::min(kDeep, in.xs[i].size(1) - c), n, std::min(kWide, in.out_channels - n)});
      }
    }
  }
  return pieces;
}

}  // namespace

template <class T>
Tensor winograd_weight_gradient(const Tensor& dz, const MergeInputs& in, const std::vector<Tensor>& xs,
                                const Tensor& weight) {
  using A = acc_t<T>;
  const auto& k = kernels<T>();
  const TileGrid grid(in.images, in.height, in.width, 48);
  const std::vector<Piece> pieces = grid.count() > 0 ? pieces_of(in) : std::vector<Piece>();
  const int64_t count = static_cast<int64_t>(pieces.size()), tiles = grid.tiles(), threads = at::get_num_threads();
  // Where there are fewer pieces than threads, each is summed over parts of the map, which are added in order.
  const int64_t parts =
      std::clamp<int64_t>(divide_up(2 * threads, std::max<int64_t>(count, 1)), 1, std::max<int64_t>(grid.count(), 1));
  const bool taps_apart = is_channels_last(weight);
  const int64_t depth = in.in_channels, row = 9 * depth;
  Tensor dw = at::empty({parts, in.out_channels, taps_apart ? 9 * depth : depth * 9},
                        dz.options().memory_format(std::nullopt).dtype(accumulation_type(dz.scalar_type())));
  if (pieces.empty()) dw.zero_();
  A* out = dw.mutable_data_ptr<A>();
  std::vector<Map<T>> maps;
  for (const Tensor& x : xs) maps.emplace_back(x, in.channels_last);
  const Map<T> gradient(dz, in.channels_last);
  const int64_t cost = divide_up(grid.count(), parts) * tiles * kDeep * kWide;
  parallel_queue(count * parts, cost, [&](const auto& take) {
    const int64_t rows = 2 * grid.rows, cols = 2 * grid.cols;
    const Scratch<A> x((rows + 2) * (cols + 2) * kDeep), dy(rows * cols * kWide), v(16 * tiles * kDeep),
        d(16 * tiles * kWide, true), du(16 * kDeep * kWide), taps(9 * kDeep * kWide);
    for (int64_t task = take(); task >= 0; task = take()) {
      const Piece& piece = pieces[task / parts];
      const int64_t part = task % parts, first = grid.count() * part / parts;
      for (int64_t b = first; b < grid.count() * (part + 1) / parts; ++b) {
        const TileGrid::Block block = grid[b];
        maps[piece.input].gather(block.image, block.h - 1, block.w - 1, rows + 2, cols + 2, piece.channel, piece.depth,
                                 x.get());
        k.winograd_input({grid.rows, grid.cols, piece.depth, v.get(), tiles * kDeep, kDeep}, x.get());
        gradient.gather(block.image, block.h, block.w, rows, cols, piece.out, piece.wide, dy.get());
        k.winograd_gradient({grid.rows, grid.cols, piece.wide, d.get(), tiles * kWide, kWide}, dy.get());
        for (int64_t position = 0; position < 16; ++position) {
          const Segment<A> segment = {v.get() + position * tiles * kDeep, kDeep, tiles};
          k.gemm({piece.depth, piece.wide, &segment, 1, true, d.get() + position * tiles * kWide, kWide,
                  du.get() + position * kDeep * kWide, kWide, b > first});
        }
      }
      // [tap][channel][kWide] or [channel][tap][kWide], as they follow each other in the weight.
      const int64_t per_tap = (taps_apart ? piece.depth : 1) * kWide, per_channel = (taps_apart ? 1 : 9) * kWide;
      for (int64_t c = 0; c < piece.depth; ++c) {
        k.winograd_weight_gradient(du.get() + c * kWide, kDeep * kWide, piece.wide, taps.get() + c * per_channel,
                                   per_tap);
      }
      const int64_t channel = in.offsets[piece.input] + piece.channel;
      A* const to = out + (part * in.out_channels + piece.out) * row;
      if (taps_apart) {
        for (int64_t tap = 0; tap < 9; ++tap) {
          kernels<A>().load_transposed({taps.get() + tap * per_tap, kWide}, {to + tap * depth + channel, row},
                                       piece.depth, piece.wide);
        }
      } else {
        kernels<A>().load_transposed({taps.get(), kWide}, {to + channel * 9, row}, piece.depth * 9, piece.wide);
      }
    }
  });
  const Tensor sum = parts == 1 ? dw[0] : dw.sum(0);
  return taps_apart ? sum.view({in.out_channels, 3, 3, depth}).permute({0, 3, 1, 2})
                    : sum.view({in.out_channels, depth, 3, 3});
}

template Tensor winograd_weight_gradient<float>(const Tensor&, const MergeInputs&, const std::vector<Tensor>&,
                                                const Tensor&);
template Tensor winograd_weight_gradient<double>(const Tensor&, const MergeInputs&, const std::vector<Tensor>&,
                                                 const Tensor&);
template Tensor winograd_weight_gradient<c10::BFloat16>(const Tensor&, const MergeInputs&, const std::vector<Tensor>&,
                                                        const Tensor&);
template Tensor winograd_weight_gradient<c10::Half>(const Tensor&, const MergeInputs&, const std::vector<Tensor>&,
                                                    const Tensor&);

}  // namespace dla_fast::cpu
