// A 3x3 convolution by Winograd's minimal filtering (float_gemm.h), block by block of the map, in cache.
//
// A block gathers the pixels it needs (upsampling on the way where an input asks for it), transforms them, does sixteen
// products per panel of output channels and transforms back; nothing as large as a map is kept. The transforms cost a
// few additions a value. Their rounding is that of one or two additions more than a direct sum has, and an infinite
// input makes NaN of the 2x2 outputs of its tiles. In NCHW the block is transposed when it is gathered, and back.

#include "convolution.h"

namespace dla_fast::cpu {
namespace {

// The weight of a convolution, or where it is the adjoint one of the gradient's: from N to K channels, taps in reverse.
template <class T>
struct Taps {
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

template <class T>
class Blockwise {
  using A = acc_t<T>;

 public:
  // packed: the transformed weight of those panels.
  Blockwise(const Inputs<T>& in, std::vector<Panel> panels, const A* packed)
      : in_(in), grid_(grid_of(in)), blocks_(in, grid_), panels_(std::move(panels)), packed_(packed) {}
  Blockwise(const Blockwise&) = delete;

  void run(RowEpilogue<A> epilogue) const {
    const int64_t depth = in_.in_channels, tiles = grid_.tiles(), count = static_cast<int64_t>(panels_.size());
    const int64_t threads = thread_count();
    const int64_t groups = std::clamp<int64_t>(divide_up(2 * threads, grid_.count()), 1, std::max<int64_t>(count, 1));
    const int64_t cost = tiles * depth * divide_up(count, groups) * kPanel;
    parallel_queue(grid_.count() * groups, cost, [&](const Take& take) {
      const Scratch<A> v(16 * tiles * depth), m(divide_up(count, groups) * 16 * tiles * kPanel), z(4 * tiles * kPanel),
          rows(in_.channels_last ? 0 : kPanel * 2 * grid_.cols);
      const typename Blocks<T>::Work work(blocks_);
      for (int64_t task = take(); task >= 0; task = take()) {
        const TileGrid::Block block = grid_[task / groups];
        const int64_t group = task % groups, first = count * group / groups, last = count * (group + 1) / groups;
        for (size_t i = 0; i < in_.xs.size(); ++i) {
          blocks_.gather(i, block, work);
          float_kernels<A>().winograd_input(
              {grid_.rows, grid_.cols, in_.xs[i].channels, v.get() + in_.xs[i].offset, tiles * depth, depth},
              work.patch.get());
        }
        products(first, last, v.get(), m.get());
        for (int64_t p = first; p < last; ++p) {
          float_kernels<A>().winograd_output({grid_.rows, grid_.cols, panels_[p].count,
                                              m.get() + (p - first) * 16 * tiles * kPanel, tiles * kPanel, kPanel},
                                             z.get());
          for_rows<T, A>(in_, grid_, block, panels_[p], z.get(), 2 * grid_.cols, rows.get(), epilogue);
        }
      }
    });
  }

 private:
  const A* packed(int64_t panel, int64_t position) const {
    return packed_ + (panel * 16 + position) * in_.in_channels * kPanel;
  }

  // m[panel][position][tile][kPanel]; position by position, so that its part of v serves all panels from the cache.
  void products(int64_t first, int64_t last, const A* v, A* m) const {
    const int64_t depth = in_.in_channels, tiles = grid_.tiles();
    for (int64_t position = 0; position < 16; ++position) {
      const Segment<A> segment = {v + position * tiles * depth, depth, depth};
      for (int64_t p = first; p < last; ++p) {
        const A* next = p + 1 < last ? packed(p + 1, position) : packed(first, (position + 1) % 16);
        Ahead ahead = Ahead::of<const A>({next, kPanel}, depth, kPanel);
        float_kernels<A>().gemm({tiles, panels_[p].count, &segment, 1, false, packed(p, position), kPanel,
                                 m + ((p - first) * 16 + position) * tiles * kPanel, kPanel, false, &ahead});
      }
    }
  }

  const Inputs<T>& in_;
  TileGrid grid_;
  Blocks<T> blocks_;
  std::vector<Panel> panels_;
  const A* packed_;
};

int64_t packed_values(const std::vector<Panel>& panels, int64_t depth) {
  return static_cast<int64_t>(panels.size()) * 16 * depth * kPanel;
}

// Panel by panel the sixteen matrices of the transformed weight, [16][depth][kPanel].
template <class T>
void transform(const Taps<T>& taps, const std::vector<Panel>& panels, acc_t<T>* to) {
  using A = acc_t<T>;
  const int64_t depth = taps.inputs(), step = Taps<T>::block, pieces = divide_up(depth, step);
  parallel(static_cast<int64_t>(panels.size()) * pieces, 16 * step * kPanel, [&](int64_t begin, int64_t end) {
    const Scratch<A> work(9 * step * kPanel);
    for (int64_t task = begin; task < end; ++task) {
      const Panel panel = panels[task / pieces];
      const int64_t k = task % pieces * step;
      taps.transform(k, std::min(step, depth - k), panel.channel, panel.count,
                     to + (task / pieces * 16 * depth + k) * kPanel, depth * kPanel, work.get());
    }
  });
}

template <class T>
class Winograd : public Convolution<T> {
  using A = acc_t<T>;

 public:
  using Convolution<T>::Convolution;

  int64_t packed_bytes() const override {
    return packed_values(panels_of(this->in_.out_channels), this->in_.in_channels) * static_cast<int64_t>(sizeof(A));
  }
  void pack(void* to) const override {
    const auto& in = this->in_;
    transform(Taps<T>{in.weight, in.in_channels, in.out_channels, in.taps_first, false}, panels_of(in.out_channels),
              static_cast<A*>(to));
  }

 protected:
  void convolve(const Inputs<T>& in, bool adjoint, std::vector<Panel> panels, RowEpilogue<A> epilogue) const override {
    if (!adjoint) {
      const PackedWeight<A> weight(*this, in);
      return Blockwise<T>(in, std::move(panels), weight.get()).run(epilogue);
    }
    const bool ragged =
        std::any_of(panels.begin(), panels.end(), [](const Panel& p) { return p.count % kPanel != 0; });
    const Scratch<A> weight(packed_values(panels, in.in_channels), ragged);
    transform(Taps<T>{in.weight, in.out_channels, in.in_channels, in.taps_first, true}, panels, weight.get());
    Blockwise<T>(in, std::move(panels), weight.get()).run(epilogue);
  }
  void weight_gradient(const Gradient<T>& gradient) const override;
};

template <class T>
void Winograd<T>::weight_gradient(const Gradient<T>& gradient) const {
  // What is summed at a time stays in the second-level cache while the map passes by.
  constexpr int64_t deep = 64, wide = 128;
  const auto& k = float_kernels<A>();
  const TileGrid grid(this->in_.images, this->in_.height, this->in_.width, 48);
  const WeightSums<T> sums(this->in_, gradient.dw, grid.count(), deep, wide);
  std::vector<Map<T>> maps;
  for (int64_t i = 0; i < this->in_.count(); ++i) {
    maps.push_back(
        {gradient.full[i], this->in_.xs[i].channels, this->in_.height, this->in_.width, this->in_.channels_last});
  }
  const Map<T> dz = {gradient.dz, this->in_.out_channels, this->in_.height, this->in_.width, this->in_.channels_last};
  const int64_t tiles = grid.tiles();
  parallel_queue(sums.tasks(), sums.blocks_per_task() * tiles * deep * wide, [&](const Take& take) {
    const int64_t rows = 2 * grid.rows, cols = 2 * grid.cols;
    const Scratch<A> x((rows + 2) * (cols + 2) * deep), dy(rows * cols * wide), v(16 * tiles * deep),
        d(16 * tiles * wide, true), du(16 * deep * wide), taps(9 * deep * wide);
    for (int64_t task = take(); task >= 0; task = take()) {
      const auto& [input, channel, depth, out, width] = sums.piece(task);
      for (int64_t b = sums.first_block(task); b < sums.last_block(task); ++b) {
        const TileGrid::Block block = grid[b];
        maps[input].gather(block.image, block.h - 1, block.w - 1, rows + 2, cols + 2, channel, depth, x.get());
        k.winograd_input({grid.rows, grid.cols, depth, v.get(), tiles * deep, deep}, x.get());
        dz.gather(block.image, block.h, block.w, rows, cols, out, width, dy.get());
        k.winograd_gradient({grid.rows, grid.cols, width, d.get(), tiles * wide, wide}, dy.get());
        for (int64_t position = 0; position < 16; ++position) {
          const Segment<A> segment = {v.get() + position * tiles * deep, deep, tiles};
          k.gemm({depth, width, &segment, 1, true, d.get() + position * tiles * wide, wide,
                  du.get() + position * deep * wide, wide, b > sums.first_block(task)});
        }
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

}  // namespace

template <class T>
ProductOf<T> winograd(const Inputs<T>& in) {
  return std::make_unique<Winograd<T>>(in);
}

template ProductOf<float> winograd(const Inputs<float>&);
template ProductOf<double> winograd(const Inputs<double>&);
template ProductOf<c10::BFloat16> winograd(const Inputs<c10::BFloat16>&);
template ProductOf<c10::Half> winograd(const Inputs<c10::Half>&);

}  // namespace dla_fast::cpu
