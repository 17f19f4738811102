#include "blocks.h"

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

template <class A>
WeightSums<A>::WeightSums(const MergeInputs& in, const Tensor& weight, int64_t blocks, int64_t deep, int64_t wide)
    : in_(in), blocks_(blocks), deep_(deep), wide_(wide), taps_apart_(is_channels_last(weight)) {
  for (size_t i = 0; blocks > 0 && i < in.xs.size(); ++i) {
    for (int64_t c = 0; c < in.xs[i].size(1); c += deep) {
      for (int64_t n = 0; n < in.out_channels; n += wide) {
        pieces_.push_back({i, c, std::min(deep, in.xs[i].size(1) - c), n, std::min(wide, in.out_channels - n)});
      }
    }
  }
  const int64_t count = std::max<int64_t>(static_cast<int64_t>(pieces_.size()), 1), threads = at::get_num_threads();
  parts_ = std::clamp<int64_t>(divide_up(2 * threads, count), 1, std::max<int64_t>(blocks, 1));
  sums_ = at::empty({parts_, in.out_channels, 9 * in.in_channels},
                    weight.options().memory_format(std::nullopt).dtype(c10::CppTypeToScalarType<A>::value));
  if (pieces_.empty()) sums_.zero_();
}

template <class A>
void WeightSums<A>::store(int64_t task, const A* taps) {
  const Piece& piece = pieces_[task / parts_];
  const int64_t depth = in_.in_channels, row = 9 * depth, channel = in_.offsets[piece.input] + piece.channel;
  A* const to = sums_.template mutable_data_ptr<A>() + (task % parts_ * in_.out_channels + piece.out) * row;
  if (taps_apart_) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      kernels<A>().load_transposed({taps + tap * per_tap(), wide_}, {to + tap * depth + channel, row}, piece.depth,
                                   piece.width);
    }
  } else {
    kernels<A>().load_transposed({taps, wide_}, {to + channel * 9, row}, piece.depth * 9, piece.width);
  }
}

template <class A>
Tensor WeightSums<A>::result() const {
  const Tensor sum = parts_ == 1 ? sums_[0] : sums_.sum(0);
  return taps_apart_ ? sum.view({in_.out_channels, 3, 3, in_.in_channels}).permute({0, 3, 1, 2})
                     : sum.view({in_.out_channels, in_.in_channels, 3, 3});
}

template class WeightSums<float>;
template class WeightSums<double>;

}  // namespace dla_fast::cpu
