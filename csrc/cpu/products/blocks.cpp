#include "blocks.h"

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
  const int64_t high = std::min(2 * rows, height - h);
  return {i / col_blocks / row_blocks, h, w, high, std::min(2 * cols, width - w), divide_up(high, 2)};
}

template <class T>
std::vector<typename WeightSums<T>::Piece> WeightSums<T>::pieces_of(const Inputs<T>& in, int64_t deep, int64_t wide) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < in.xs.size(); ++i) {
    for (int64_t c = 0; c < in.xs[i].channels; c += deep) {
      for (int64_t n = 0; n < in.out_channels; n += wide) {
        pieces.push_back({i, c, std::min(deep, in.xs[i].channels - c), n, std::min(wide, in.out_channels - n)});
      }
    }
  }
  return pieces;
}

template <class T>
WeightSums<T>::WeightSums(const Inputs<T>& in, T* dw, int64_t blocks, int64_t deep, int64_t wide)
    : in_(in),
      blocks_(blocks),
      deep_(deep),
      wide_(wide),
      pieces_(pieces_of(in, deep, wide)),
      parts_(std::clamp<int64_t>(divide_up(2 * thread_count(), std::max<int64_t>(pieces_.size(), 1)), 1, blocks)),
      sums_(dw, in.taps() * in.in_channels * in.out_channels, parts_) {}

template <class T>
void WeightSums<T>::store(int64_t task, const A* taps, int64_t per_tap) const {
  const Piece& piece = pieces_[task / parts_];
  const int64_t count = in_.taps(), depth = in_.in_channels, row = count * depth,
                channel = in_.xs[piece.input].offset + piece.channel;
  A* const to = sums_.at[task % parts_] + piece.out * row;
  if (in_.taps_first) {
    for (int64_t tap = 0; tap < count; ++tap) {
      kernels<A>().load_transposed({taps + tap * per_tap, wide_}, {to + tap * depth + channel, row}, piece.depth,
                                   piece.width);
    }
  } else {
    kernels<A>().load_transposed({taps, wide_}, {to + channel * count, row}, piece.depth * count, piece.width);
  }
}

template class WeightSums<float>;
template class WeightSums<double>;
template class WeightSums<c10::BFloat16>;
template class WeightSums<c10::Half>;

}  // namespace dla_fast::cpu
