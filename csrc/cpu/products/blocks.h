// The blocks that a 3x3 convolution of several maps is cut into, and how their pixels come into cache.

#pragma once

#include <c10/util/FunctionRef.h>

#include <vector>

#include "../shared/upsampling.h"
#include "float_gemm.h"
#include "product.h"
#include "tasks.h"

namespace dla_fast::cpu {

// A map cut into blocks of tiles of 2x2 pixels.
struct TileGrid {
  struct Block {
    int64_t image, h, w;    // first pixel
    int64_t height, width;  // pixels within the map
    int64_t rows;           // of tiles that have such pixels
  };

  int64_t images, height, width, rows, cols, row_blocks, col_blocks;

  TileGrid(int64_t images, int64_t height, int64_t width, int64_t most_tiles);
  int64_t count() const { return images * row_blocks * col_blocks; }
  // Of a block, at most.
  int64_t tiles() const { return rows * cols; }
  int64_t tiles(const Block& block) const { return block.rows * cols; }
  int64_t moment_groups() const { return images * height * col_blocks; }
  Block operator[](int64_t i) const;
};

// One map.
template <class T>
struct Map {
  const T* data;
  int64_t channels, height, width;
  bool channels_last;
  const Ending<T>* ending = nullptr;          // what is read is formed of data; of a contiguous map, without a residual
  const TailGradient<T>* gradient = nullptr;  // it is formed as dz, where data is null; of a channels_last map

  // Pixels [h, h + rows) x [w, w + cols) of `count` channels from `first` on as [rows][cols][count]: zero outside.
  template <class A>
  void gather(int64_t image, int64_t h, int64_t w, int64_t rows, int64_t cols, int64_t first, int64_t count,
              A* to) const {
    const int64_t begin = std::clamp<int64_t>(-w, 0, cols), end = std::clamp<int64_t>(width - w, begin, cols);
    for (int64_t r = 0; r < rows; ++r, to += cols * count) {
      if (h + r < 0 || h + r >= height || begin == end) {
        std::fill_n(to, cols * count, A(0));
        continue;
      }
      std::fill_n(to, begin * count, A(0));
      std::fill_n(to + end * count, (cols - end) * count, A(0));
      gather_row(image, h + r, w + begin, end - begin, first, count, {to + begin * count, count});
    }
  }

  // Pixels of one row within the map as [cols][count].
  void gather_row(int64_t image, int64_t h, int64_t w, int64_t cols, int64_t first, int64_t count,
                  Strided<acc_t<T>> to) const {
    const int64_t pixel = h * width + w, pixels = height * width;
    if (!channels_last) {
      kernels<T>().load_transposed({data + (image * channels + first) * pixels + pixel, pixels}, to, count, cols);
      if (ending == nullptr) return;
      const Strided<const acc_t<T>> z = {to.data, to.ld};
      kernels<acc_t<T>>().tail({cols, count, false}, ending->norm.from(first), z, {nullptr, 0}, to);
      return;
    }
    const int64_t at = (image * pixels + pixel) * channels + first;
    if (gradient != nullptr) {
      gradient->form({cols, count, false}, first, at, channels, to, {nullptr, 0});
    } else if (ending != nullptr) {
      ending->form({cols, count, false}, first, at, channels, to);
    } else if (count == channels && to.ld == count) {
      kernels<T>().load({data + at, cols * count}, {to.data, cols * count}, 1, cols * count);
    } else {
      kernels<T>().load({data + at, channels}, to, cols, count);
    }
  }
};

// The blocks of a node's inputs.
template <class T>
class Blocks {
  using A = acc_t<T>;

 public:
  Blocks(const Inputs<T>& in, const TileGrid& grid) : in_(in), grid_(grid) {
    for (const Input<T>& x : in.xs) {
      maps_.push_back({x.data, x.channels, x.height, x.width, in.channels_last, x.ending, x.gradient});
      const bool up = x.factor > 1;
      ups_.push_back(up ? pack_up_weight<T, A>(x.up_weight, x.channels, x.factor, in.channels_last) : Scratch<A>(0));
      const int64_t channels = x.channels, width = x.width, cols = 2 * grid.cols + 2;
      most_channels_ = std::max(most_channels_, channels);
      if (up && !std::is_same_v<T, A>) row_ = std::max(row_, width * (in.channels_last ? channels : 1));
      if (up && in.channels_last) zeros_ = std::max(zeros_, channels);
      if (up && !in.channels_last) {
        zeros_ = std::max(zeros_, plane_scratch(width, x.factor));
        planes_ = std::max(planes_, channels * cols);
      }
    }
  }

  // What a thread works in.
  struct Work {
    Scratch<A> patch, near, far, scratch, planes;
    explicit Work(const Blocks& b)
        : patch(b.most_channels_ * (2 * b.grid_.rows + 2) * (2 * b.grid_.cols + 2)),
          near(b.row_),
          far(b.row_),
          scratch(b.zeros_, true),
          planes(b.planes_) {}
  };

  // Input i of a block with a pixel around it, zero outside of the map: work.patch[2 rows + 2][2 cols + 2][channels],
  // of the block's rows.
  void gather(size_t i, const TileGrid::Block& block, const Work& work) const {
    if (in_.xs[i].factor == 1) {
      maps_[i].gather(block.image, block.h - 1, block.w - 1, 2 * block.rows + 2, 2 * grid_.cols + 2, 0,
                      maps_[i].channels, work.patch.get());
    } else {
      upsample_block(i, block, work);
    }
  }

 private:
  void upsample_block(size_t i, const TileGrid::Block& block, const Work& work) const {
    const Map<T>& x = maps_[i];
    const int64_t cols = 2 * grid_.cols + 2, begin = std::max<int64_t>(block.w - 1, 0),
                  end = std::min(block.w - 1 + cols, in_.width), skip = begin - (block.w - 1);
    A* to = work.patch.get();
    for (int64_t r = 0; r < 2 * block.rows + 2; ++r, to += cols * x.channels) {
      const int64_t h = block.h - 1 + r;
      if (h < 0 || h >= in_.height) {
        std::fill_n(to, cols * x.channels, A(0));
        continue;
      }
      std::fill_n(to, skip * x.channels, A(0));
      std::fill_n(to + (skip + end - begin) * x.channels, (cols - skip - (end - begin)) * x.channels, A(0));
      A* const inside = to + skip * x.channels;
      if (x.channels_last) {
        upsample_row(i, block.image, 0, h, begin, end, inside, work);
        continue;
      }
      for (int64_t c = 0; c < x.channels; ++c) {
        upsample_row(i, block.image * x.channels + c, c, h, begin, end, work.planes.get() + c * cols, work);
      }
      kernels<A>().load_transposed({work.planes.get(), cols}, {inside, x.channels}, x.channels, end - begin);
    }
  }

  void upsample_row(size_t i, int64_t plane, int64_t channel, int64_t h, int64_t begin, int64_t end, A* to,
                    const Work& work) const {
    const Map<T>& x = maps_[i];
    const int64_t f = in_.xs[i].factor, depth = x.channels_last ? x.channels : 1, row = x.width * depth;
    const int64_t source = (h + f / 2) / f, ky = (h + f / 2) % f;
    const A* taps = ups_[i].get() + channel * 4 * f * f;
    const T* image = x.data + plane * x.height * row;
    UpRow<A> u = {};
    u.near = row_of<T, A>(source < x.height ? image + source * row : nullptr, row, work.near.get());
    u.far = row_of<T, A>(source > 0 ? image + (source - 1) * row : nullptr, row, work.far.get());
    u.weight_near = taps + ky * 2 * f * depth;
    u.weight_far = taps + (ky + f) * 2 * f * depth;
    u.out = to;
    u.width = x.width;
    u.channels = depth;
    u.factor = f;
    u.begin = begin;
    u.end = end;
    u.scratch = work.scratch.get();
    x.channels_last ? kernels<T>().up_row(u) : kernels<T>().up_row_plane(u);
  }

  const Inputs<T>& in_;
  const TileGrid& grid_;
  std::vector<Map<T>> maps_;
  std::vector<Scratch<A>> ups_;
  int64_t most_channels_ = 0, row_ = 0, zeros_ = 0, planes_ = 0;
};

// The blocks of a node.
template <class T>
TileGrid grid_of(const Inputs<T>& in) {
  // Few enough tiles for the second-level cache to hold them before and after the products, or where it cannot, so many
  // that the weight passes by less often.
  constexpr int64_t few = 48, many = 96, cached = 3 << 17;
  return {in.images, in.height, in.width, few * 16 * (in.in_channels + in.out_channels) <= cached ? few : many};
}

// Output channels that are computed together, at most kPanel of them.
struct Panel {
  int64_t channel, count;

  // Those of so many channels from `first` on.
  static void add(std::vector<Panel>& panels, int64_t first, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kPanel) panels.push_back({first + c, std::min(kPanel, channels - c)});
  }
};

// Those of all output channels.
inline std::vector<Panel> panels_of(int64_t channels) {
  std::vector<Panel> panels;
  Panel::add(panels, 0, channels);
  return panels;
}

// A row of pixels of the output; `group` counts the rows of blocks, for the moments.
struct PixelRow {
  int64_t image, h, w, group;
};

// Called with (shape, row, first channel, values) for every row of pixels of the output and panel of its channels.
template <class A>
using RowEpilogue = c10::function_ref<void(const Shape&, const PixelRow&, int64_t, Strided<const A>)>;

// Calls epilogue for the rows of a block's panel: z holds kPanel values a pixel and `stride` pixels a row.
// transposed: kPanel * 2 grid.cols, for contiguous tensors.
template <class T, class A>
void for_rows(const Inputs<T>& in, const TileGrid& grid, const TileGrid::Block& block, const Panel& panel, const A* z,
              int64_t stride, A* transposed, RowEpilogue<A> epilogue) {
  const int64_t ld = 2 * grid.cols, column = block.w / ld;
  for (int64_t r = 0; r < block.height; ++r, z += stride * kPanel) {
    const PixelRow row = {block.image, block.h + r, block.w,
                          (block.image * in.height + block.h + r) * grid.col_blocks + column};
    if (in.channels_last) {
      epilogue(Shape{block.width, panel.count, false}, row, panel.channel, Strided<const A>{z, kPanel});
    } else {
      kernels<A>().load_transposed({z, kPanel}, {transposed, ld}, block.width, panel.count);
      epilogue(Shape{panel.count, block.width, true}, row, panel.channel, Strided<const A>{transposed, ld});
    }
  }
}

// The gradient of a weight, in pieces of `deep` input channels by `wide` output channels. A task sums one over the
// blocks of the map, or where there are fewer pieces than threads over a part of them; the parts are added in order.
template <class T>
class WeightSums {
  using A = acc_t<T>;

 public:
  struct Piece {
    size_t input;
    int64_t channel, depth;  // of that input
    int64_t out, width;      // of dz
  };

  WeightSums(const Inputs<T>& in, T* dw, int64_t blocks, int64_t deep, int64_t wide);

  int64_t tasks() const { return static_cast<int64_t>(pieces_.size()) * parts_; }
  int64_t blocks_per_task() const { return divide_up(blocks_, parts_); }
  const Piece& piece(int64_t task) const { return pieces_[task / parts_]; }
  int64_t first_block(int64_t task) const { return blocks_ * (task % parts_) / parts_; }
  int64_t last_block(int64_t task) const { return blocks_ * (task % parts_ + 1) / parts_; }

  // Where the sums of a task are to lie: rows of `wide` values, in the order of the weight.
  int64_t per_tap() const { return (in_.taps_first ? deep_ : 1) * wide_; }
  int64_t per_channel() const { return (in_.taps_first ? 1 : in_.taps()) * wide_; }
  void store(int64_t task, const A* taps) const { store(task, taps, per_tap()); }
  // With the taps that far apart, where they are first.
  void store(int64_t task, const A* taps, int64_t per_tap) const;

  // Writes dw.
  void add() const { sums_.add(); }

 private:
  static std::vector<Piece> pieces_of(const Inputs<T>& in, int64_t deep, int64_t wide);

  const Inputs<T>& in_;
  int64_t blocks_, deep_, wide_;
  std::vector<Piece> pieces_;
  int64_t parts_;
  SlicedSums<T> sums_;
};

}  // namespace dla_fast::cpu
