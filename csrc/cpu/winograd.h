// A 3x3 convolution by Winograd's minimal filtering (kernels.h), block by block of the map, in cache.
//
// A block gathers the pixels it needs (upsampling on the way where an input asks for it), transforms them, does sixteen
// products per panel of output channels and transforms back; nothing as large as a map is kept. The transforms cost a
// few additions a value. Their rounding is that of one or two additions more than a direct sum has, and an infinite
// input makes NaN of the 2x2 outputs of its tiles. In NCHW the block is transposed when it is gathered, and back.

#pragma once

#include <vector>

#include "blocks.h"

namespace dla_fast::cpu {

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

template <class T>
class Winograd {
  using A = acc_t<T>;

 public:
  Winograd(const MergeInputs& in, const Taps<T>& taps, std::vector<Panel> panels)
      : in_(in),
        grid_(grid_of(in)),
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
        for (size_t i = 0; i < in_.xs.size(); ++i) {
          blocks_.gather(i, block, work);
          kernels<T>().winograd_input(
              {grid_.rows, grid_.cols, in_.xs[i].size(1), v.get() + in_.offsets[i], tiles * depth, depth},
              work.patch.get());
        }
        products(first, last, v.get(), m.get());
        for (int64_t p = first; p < last; ++p) {
          kernels<T>().winograd_output({grid_.rows, grid_.cols, panels_[p].count,
                                        m.get() + (p - first) * 16 * tiles * kPanel, tiles * kPanel, kPanel},
                                       z.get());
          for_rows(in_, grid_, block, panels_[p], static_cast<const A*>(z.get()), 2 * grid_.cols, rows.get(), epilogue);
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
