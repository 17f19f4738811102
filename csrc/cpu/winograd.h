// A 3x3 convolution by Winograd's minimal filtering (kernels.h), block by block of the map, in cache.
//
// A block gathers the pixels it needs (upsampling on the way where an input asks for it), transforms them, does sixteen
// products per panel of output channels and transforms back; nothing as large as a map is kept. The transforms cost a
// few additions a value. Their rounding is that of one or two additions more than a direct sum has, and an infinite
// input makes NaN of the 2x2 outputs of its tiles. In NCHW the block is transposed when it is gathered, and back.

#pragma once

#include <vector>

#include "merge.h"
#include "upsample.h"

namespace dla_fast::cpu {

// A map cut into blocks of tiles of 2x2 pixels.
struct TileGrid {
  struct Block {
    int64_t image, h, w;    // first pixel
    int64_t height, width;  // pixels within the map
  };

  int64_t images, height, width, rows, cols, row_blocks, col_blocks;

  TileGrid(int64_t images, int64_t height, int64_t width, int64_t most_tiles);
  int64_t count() const { return images * row_blocks * col_blocks; }
  int64_t tiles() const { return rows * cols; }
  Block operator[](int64_t i) const;
};

// One tensor's map.
template <class T>
struct Map {
  const T* data;
  int64_t channels, height, width;
  bool channels_last;

  Map(const Tensor& t, bool channels_last)
      : data(t.const_data_ptr<T>()),
        channels(t.size(1)),
        height(t.size(2)),
        width(t.size(3)),
        channels_last(channels_last) {}

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
      const int64_t pixel = (h + r) * width + w + begin, pixels = height * width;
      const Strided<A> dst = {to + begin * count, count};
      if (channels_last) {
        kernels<T>().load({data + (image * pixels + pixel) * channels + first, channels}, dst, end - begin, count);
      } else {
        kernels<T>().load_transposed({data + (image * channels + first) * pixels + pixel, pixels}, dst, count,
                                     end - begin);
      }
    }
  }
};

// The blocks of a node's inputs.
template <class T>
class Blocks {
  using A = acc_t<T>;

 public:
  Blocks(const MergeInputs& in, const TileGrid& grid) : in_(in), grid_(grid) {
    for (size_t i = 0; i < in.xs.size(); ++i) {
      maps_.emplace_back(in.xs[i], in.channels_last);
      ups_.push_back(in.factors[i] > 1 ? pack_up_weight<T, A>(in.ups[i], in.factors[i], in.channels_last)
                                       : Scratch<A>(0));
      const bool up = in.factors[i] > 1;
      const int64_t channels = in.xs[i].size(1), width = in.xs[i].size(3), cols = 2 * grid.cols + 2;
      most_channels_ = std::max(most_channels_, channels);
      if (up && !std::is_same_v<T, A>) row_ = std::max(row_, width * (in.channels_last ? channels : 1));
      if (up && in.channels_last) zeros_ = std::max(zeros_, channels);
      if (up && !in.channels_last) {
        zeros_ = std::max(zeros_, plane_scratch(width, in.factors[i]));
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

  // All inputs of a block, transformed: [16][tile][in_channels].
  void transform(const TileGrid::Block& block, A* v, const Work& work) const {
    const int64_t depth = in_.in_channels;
    for (size_t i = 0; i < maps_.size(); ++i) {
      const int64_t channels = maps_[i].channels;
      if (in_.factors[i] == 1) {
        maps_[i].gather(block.image, block.h - 1, block.w - 1, 2 * grid_.rows + 2, 2 * grid_.cols + 2, 0, channels,
                        work.patch.get());
      } else {
        upsample_block(i, block, work);
      }
      kernels<T>().winograd_input({grid_.rows, grid_.cols, channels, v + in_.offsets[i], grid_.tiles() * depth, depth},
                                  work.patch.get());
    }
  }

 private:
  void upsample_block(size_t i, const TileGrid::Block& block, const Work& work) const {
    const Map<T>& x = maps_[i];
    const int64_t cols = 2 * grid_.cols + 2, begin = std::max<int64_t>(block.w - 1, 0),
                  end = std::min(block.w - 1 + cols, in_.width), skip = begin - (block.w - 1);
    A* to = work.patch.get();
    for (int64_t r = 0; r < 2 * grid_.rows + 2; ++r, to += cols * x.channels) {
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
    const int64_t f = in_.factors[i], depth = x.channels_last ? x.channels : 1, row = x.width * depth;
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

  const MergeInputs& in_;
  const TileGrid& grid_;
  std::vector<Map<T>> maps_;
  std::vector<Scratch<A>> ups_;
  int64_t most_channels_ = 0, row_ = 0, zeros_ = 0, planes_ = 0;
};

// A 3x3 weight (N, K, 3, 3), dense in the one layout or the other.
template <class T>
struct Taps {
  using A = acc_t<T>;
  Tensor weight;
  bool channels_last;
  bool adjoint;  // of the gradient's convolution: from N to K channels, taps in reverse

  Taps(const Tensor& w, bool adjoint)
      : weight(is_channels_last(w) ? w.contiguous(at::MemoryFormat::ChannelsLast) : w.contiguous()),
        channels_last(is_channels_last(weight)),
        adjoint(adjoint) {}

  static constexpr int64_t block = 16;

  // `count` input channels from k on, of `cols` output channels from n on, as G w G^T: u[16, plane apart][k][kPanel].
  // work: 9 * block * kPanel.
  void transform(int64_t k, int64_t count, int64_t n, int64_t cols, A* u, int64_t plane, A* work) const {
    const auto& table = kernels<T>();
    const T* w = weight.const_data_ptr<T>();
    const int64_t inner = weight.size(1), row = 9 * inner;
    int64_t per_channel = 9 * kPanel, per_tap = kPanel;
    if (adjoint) {
      for (int64_t i = 0; i < count; ++i) {
        const T* from = w + (k + i) * row;
        const Strided<A> to = {work + i * per_channel, kPanel};
        channels_last ? table.load({from + n, inner}, to, 9, cols)
                      : table.load_transposed({from + n * 9, 9}, to, cols, 9);
      }
    } else if (channels_last) {
      per_channel = kPanel;
      per_tap = count * kPanel;
      for (int64_t tap = 0; tap < 9; ++tap) {
        table.load_transposed({w + n * row + tap * inner + k, row}, {work + tap * per_tap, kPanel}, cols, count);
      }
    } else {
      table.load_transposed({w + n * row + k * 9, row}, {work, kPanel}, cols, count * 9);
    }
    for (int64_t i = 0; i < count; ++i) {
      table.winograd_weight(work + i * per_channel, per_tap, adjoint, cols, u + i * kPanel, plane);
    }
  }
};

// How many tiles a block has: few enough for the second-level cache to hold them before and after the products, or
// where it cannot, so many that the weight passes by less often.
int64_t tiles_of_block(int64_t in_channels, int64_t out_channels);

template <class T>
class Winograd {
  using A = acc_t<T>;

 public:
  // Output channels that are computed together, at most kPanel of them.
  struct Panel {
    int64_t channel, count;
  };
  // A row of pixels of the output.
  struct Row {
    int64_t image, h, w;
    int64_t group;  // counts rows of blocks, for the moments
  };

  Winograd(const MergeInputs& in, const Taps<T>& taps, std::vector<Panel> panels)
      : in_(in),
        grid_(in.images, in.height, in.width, tiles_of_block(in.in_channels, in.out_channels)),
        blocks_(in, grid_),
        panels_(std::move(panels)),
        packed_(static_cast<int64_t>(panels_.size()) * 16 * in.in_channels * kPanel, ragged(panels_)) {
    const int64_t depth = in.in_channels, step = Taps<T>::block, pieces = divide_up(depth, step);
    parallel(static_cast<int64_t>(panels_.size()) * pieces, 16 * step * kPanel, [&](int64_t begin, int64_t end) {
      const Scratch<A> work(9 * step * kPanel);
      for (int64_t task = begin; task < end; ++task) {
        const Panel panel = panels_[task / pieces];
        const int64_t k = task % pieces * step;
        taps.transform(k, std::min(step, depth - k), panel.channel, panel.count,
                       packed_.get() + (task / pieces * 16 * depth + k) * kPanel, depth * kPanel, work.get());
      }
    });
  }
  Winograd(const Winograd&) = delete;

  // The panels of so many channels from `first` on.
  static void add_panels(std::vector<Panel>& panels, int64_t first, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kPanel) panels.push_back({first + c, std::min(kPanel, channels - c)});
  }

  int64_t moment_groups() const { return in_.images * in_.height * grid_.col_blocks; }

  // Calls epilogue(shape, row, first channel, z) for every row of pixels and panel.
  template <class Epilogue>
  void run(const Epilogue& epilogue) const {
    const int64_t depth = in_.in_channels, tiles = grid_.tiles(), count = static_cast<int64_t>(panels_.size());
    const int64_t threads = at::get_num_threads();
    const int64_t groups = std::clamp<int64_t>(divide_up(2 * threads, grid_.count()), 1, std::max<int64_t>(count, 1));
    const int64_t cost = tiles * depth * divide_up(count, groups) * kPanel;
    parallel_queue(grid_.count() * groups, cost, [&](const auto& take) {
      const Scratch<A> v(16 * tiles * depth), m(divide_up(count, groups) * 16 * tiles * kPanel), z(4 * tiles * kPanel),
          rows(in_.channels_last ? 0 : kPanel * 2 * grid_.cols);
      const typename Blocks<T>::Work work(blocks_);
      for (int64_t task = take(); task >= 0; task = take()) {
        const TileGrid::Block block = grid_[task / groups];
        const int64_t group = task % groups, first = count * group / groups, last = count * (group + 1) / groups;
        blocks_.transform(block, v.get(), work);
        products(first, last, v.get(), m.get());
        for (int64_t p = first; p < last; ++p) {
          kernels<T>().winograd_output({grid_.rows, grid_.cols, panels_[p].count,
                                        m.get() + (p - first) * 16 * tiles * kPanel, tiles * kPanel, kPanel},
                                       z.get());
          for (int64_t r = 0; r < block.height; ++r) {
            const Row row = {block.image, block.h + r, block.w,
                             (block.image * in_.height + block.h + r) * grid_.col_blocks + block.w / (2 * grid_.cols)};
            finish(row, block.width, panels_[p], z.get() + r * 2 * grid_.cols * kPanel, rows.get(), epilogue);
          }
        }
      }
    });
  }

 private:
  static bool ragged(const std::vector<Panel>& panels) {
    return std::any_of(panels.begin(), panels.end(), [](const Panel& p) { return p.count % kPanel != 0; });
  }

  const A* packed(int64_t panel, int64_t position) const {
    return packed_.get() + (panel * 16 + position) * in_.in_channels * kPanel;
  }

  // m[panel][position][tile][kPanel]; position by position, so that its part of v serves all panels from the cache.
  void products(int64_t first, int64_t last, const A* v, A* m) const {
    const int64_t depth = in_.in_channels, tiles = grid_.tiles();
    for (int64_t position = 0; position < 16; ++position) {
      const Segment<A> segment = {v + position * tiles * depth, depth, depth};
      for (int64_t p = first; p < last; ++p) {
        const A* next = p + 1 < last ? packed(p + 1, position) : packed(first, (position + 1) % 16);
        Ahead ahead = Ahead::of<const A>({next, kPanel}, depth, kPanel);
        kernels<T>().gemm({tiles, panels_[p].count, &segment, 1, false, packed(p, position), kPanel,
                           m + ((p - first) * 16 + position) * tiles * kPanel, kPanel, false, &ahead});
      }
    }
  }

  template <class Epilogue>
  void finish(const Row& row, int64_t width, const Panel& panel, const A* z, A* transposed,
              const Epilogue& epilogue) const {
    if (in_.channels_last) {
      epilogue(Shape{width, panel.count, false}, row, panel.channel, Strided<const A>{z, kPanel});
      return;
    }
    const int64_t ld = 2 * grid_.cols;
    kernels<A>().load_transposed({z, kPanel}, {transposed, ld}, width, panel.count);
    epilogue(Shape{panel.count, width, true}, row, panel.channel, Strided<const A>{transposed, ld});
  }

  const MergeInputs& in_;
  TileGrid grid_;
  Blocks<T> blocks_;
  std::vector<Panel> panels_;
  Scratch<A> packed_;
};

// Gradient of the weight, laid out like it and in the accumulation type; xs are the inputs of `in` at the size of dz.
template <class T>
Tensor winograd_weight_gradient(const Tensor& dz, const MergeInputs& in, const std::vector<Tensor>& xs,
                                const Tensor& weight);

}  // namespace dla_fast::cpu
