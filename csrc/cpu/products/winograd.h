// A 3x3 convolution by Winograd's minimal filtering (float_gemm.h), block by block of the map, in cache.
//
// A block gathers the pixels it needs (upsampling on the way where an input asks for it), transforms them, does sixteen
// products per panel of output channels and transforms back; nothing as large as a map is kept. The transforms cost a
// few additions a value. Their rounding is that of one or two additions more than a direct sum has, and an infinite
// input makes NaN of the outputs that it reaches, which are computed once more then (operators/exact.h). In NCHW the
// block is transposed when it is gathered, and back.
//
// The products are a policy: in float or double (winograd.cpp), or in bfloat16 parts of float (bf16x3_winograd.cpp).

#pragma once

#include "convolution.h"

namespace dla_fast::cpu {

// The weight of a convolution, or where it is the adjoint one of the gradient's: from N to K channels, taps in reverse.
template <class T>
struct WinogradTaps {
  using A = acc_t<T>;
  const T* weight;
  int64_t inner, outer;  // K and N of the weight as it lies
  bool taps_first;
  bool adjoint;

  // Channels that the convolution reads.
  int64_t inputs() const { return adjoint ? outer : inner; }

  static constexpr int64_t block = 16;

  // `count` input channels from k on, of `cols` output channels from n on, as G w G^T: u[16, plane apart][k][kPanel].
  // work: 9 * block * kPanel.
  void transform(int64_t k, int64_t count, int64_t n, int64_t cols, A* u, int64_t plane, A* work) const {
    const auto& table = kernels<T>();
    const T* w = weight;
    const int64_t row = 9 * inner;
    int64_t per_channel = 9 * kPanel, per_tap = kPanel;
    if (adjoint) {
      for (int64_t i = 0; i < count; ++i) {
        const T* from = w + (k + i) * row;
        const Strided<A> to = {work + i * per_channel, kPanel};
        taps_first ? table.load({from + n, inner}, to, 9, cols) : table.load_transposed({from + n * 9, 9}, to, cols, 9);
      }
    } else if (taps_first) {
      per_channel = kPanel;
      per_tap = count * kPanel;
      for (int64_t tap = 0; tap < 9; ++tap) {
        table.load_transposed({w + n * row + tap * inner + k, row}, {work + tap * per_tap, kPanel}, cols, count);
      }
    } else {
      table.load_transposed({w + n * row + k * 9, row}, {work, kPanel}, cols, count * 9);
    }
    for (int64_t i = 0; i < count; ++i) {
      float_kernels<A>().winograd_weight(work + i * per_channel, per_tap, adjoint, cols, u + i * kPanel, plane);
    }
  }
};

// Products: how the transformed values are multiplied by the transformed weight. It has
//   tiles, so many together where blocks are smaller,
//   Thread(products, tiles, depth), what a thread works in, and
//   multiply(thread, panels, first, last, tiles, v, m), m[panel][position][tile][kPanel] of those panels from
//   v[position][tile][depth].
template <class T, class Products>
class WinogradBlocks {
  using A = acc_t<T>;

 public:
  WinogradBlocks(const Inputs<T>& in, std::vector<Panel> panels, const Products& products)
      : in_(in), grid_(grid_of(in)), blocks_(in, grid_), panels_(std::move(panels)), products_(products) {}
  WinogradBlocks(const WinogradBlocks&) = delete;

  void run(RowEpilogue<A> epilogue) const {
    const int64_t depth = in_.in_channels, count = static_cast<int64_t>(panels_.size()), threads = thread_count();
    // Small blocks come several together, so that the weight passes by less often.
    const int64_t most =
        std::clamp<int64_t>(Products::tiles / grid_.tiles(), 1, std::max<int64_t>(grid_.count() / threads, 1));
    const int64_t batches = divide_up(grid_.count(), most);
    const int64_t groups = std::clamp<int64_t>(divide_up(2 * threads, batches), 1, std::max<int64_t>(count, 1));
    const int64_t cost = most * grid_.tiles() * depth * divide_up(count, groups) * kPanel;
    parallel_queue(batches * groups, cost, [&](const Take& take) {
      const int64_t widest = most * grid_.tiles();
      const Scratch<A> v(16 * widest * depth), m(divide_up(count, groups) * 16 * widest * kPanel),
          z(4 * grid_.tiles() * kPanel), rows(in_.channels_last ? 0 : kPanel * 2 * grid_.cols);
      const typename Blocks<T>::Work work(blocks_);
      const typename Products::Thread thread(products_, widest, depth);
      for (int64_t task = take(); task >= 0; task = take()) {
        // A thread meets the same panels again, and where blocks are not of one size as much work as the others.
        const int64_t begin = task % batches * most, end = std::min(begin + most, grid_.count());
        const int64_t group = task / batches, first = count * group / groups, last = count * (group + 1) / groups;
        int64_t tiles = 0, tile = 0;
        for (int64_t b = begin; b < end; ++b) tiles += grid_.tiles(grid_[b]);
        for (int64_t b = begin; b < end; ++b) {
          const TileGrid::Block block = grid_[b];
          for (size_t i = 0; i < in_.xs.size(); ++i) {
            blocks_.gather(i, block, work);
            float_kernels<A>().winograd_input({block.rows, grid_.cols, in_.xs[i].channels,
                                               v.get() + tile * depth + in_.xs[i].offset, tiles * depth, depth},
                                              work.patch.get());
          }
          tile += grid_.tiles(block);
        }
        products_.multiply(thread, panels_, first, last, tiles, v.get(), m.get());
        for (int64_t p = first; p < last; ++p) {
          A* at = m.get() + (p - first) * 16 * tiles * kPanel;
          for (int64_t b = begin; b < end; ++b) {
            const TileGrid::Block block = grid_[b];
            float_kernels<A>().winograd_output({block.rows, grid_.cols, panels_[p].count, at, tiles * kPanel, kPanel},
                                               z.get());
            for_rows<T, A>(in_, grid_, block, panels_[p], z.get(), 2 * grid_.cols, rows.get(), epilogue);
            at += grid_.tiles(block) * kPanel;
          }
        }
      }
    });
  }

 private:
  const Inputs<T>& in_;
  TileGrid grid_;
  Blocks<T> blocks_;
  std::vector<Panel> panels_;
  const Products& products_;
};

// The weight's gradient: dU = V^T D of the transformed inputs and gradient, summed over tiles, back to the taps.
//
// Products has `deep` and `wide`, the channels of x and dz that are multiplied at a time, so that what is summed stays
// in the second-level cache while the map passes by; `tiles`, of so many blocks together, at most; Thread(products,
// tiles); and multiply(thread, shape, v, d, du, add) of v[position][plane][deep], d[position][plane][wide] and
// du[position][deep][wide].
struct WinogradSum {
  int64_t plane, tiles, depth, width;
};

template <class T, class Products>
void winograd_weight_gradient(const Inputs<T>& in, const Gradient<T>& gradient, const Products& products) {
  using A = acc_t<T>;
  constexpr int64_t deep = Products::deep, wide = Products::wide;
  const auto& k = float_kernels<A>();
  const TileGrid grid(in.images, in.height, in.width, std::min<int64_t>(Products::tiles, 48));
  const WeightSums<T> sums(in, gradient.dw, grid.count(), deep, wide);
  std::vector<Map<T>> maps;
  for (int64_t i = 0; i < in.count(); ++i) {
    maps.push_back({gradient.full[i], in.xs[i].channels, in.height, in.width, in.channels_last, in.xs[i].ending});
  }
  const Map<T> dz = {gradient.dz, in.out_channels,      in.height, in.width, in.channels_last,
                     nullptr,     gradient.dz_on_load()};
  const int64_t most = std::max<int64_t>(Products::tiles / grid.tiles(), 1);
  parallel_queue(sums.tasks(), sums.blocks_per_task() * grid.tiles() * deep * wide, [&](const Take& take) {
    const int64_t rows = 2 * grid.rows, cols = 2 * grid.cols, plane = most * grid.tiles();
    const Scratch<A> x((rows + 2) * (cols + 2) * deep), dy(rows * cols * wide), v(16 * plane * deep),
        d(16 * plane * wide, true), du(16 * deep * wide), taps(9 * deep * wide);
    const typename Products::Thread thread(products, plane);
    for (int64_t task = take(); task >= 0; task = take()) {
      const auto& [input, channel, depth, out, width] = sums.piece(task);
      const int64_t first = sums.first_block(task), last = sums.last_block(task);
      for (int64_t b = first; b < last; b += most) {
        int64_t tile = 0;
        for (int64_t i = b; i < std::min(b + most, last); ++i) {
          const TileGrid::Block block = grid[i];
          maps[input].gather(block.image, block.h - 1, block.w - 1, 2 * block.rows + 2, cols + 2, channel, depth,
                             x.get());
          k.winograd_input({block.rows, grid.cols, depth, v.get() + tile * deep, plane * deep, deep}, x.get());
          dz.gather(block.image, block.h, block.w, 2 * block.rows, cols, out, width, dy.get());
          k.winograd_gradient({block.rows, grid.cols, width, d.get() + tile * wide, plane * wide, wide}, dy.get());
          tile += grid.tiles(block);
        }
        products.multiply(thread, {plane, tile, depth, width}, v.get(), d.get(), du.get(), b > first);
      }
      for (int64_t c = 0; c < depth; ++c) {
        k.winograd_weight_gradient(du.get() + c * wide, deep * wide, width, taps.get() + c * sums.per_channel(),
                                   sums.per_tap());
      }
      sums.store(task, taps.get());
    }
  });
  sums.add();
}

}  // namespace dla_fast::cpu
