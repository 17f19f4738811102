// The 1x1 product of few pixels, of float or double, with a weight that serves one call. K = sum of the inputs'
// channels, N = output channels.
//
// Packing the weight would take as long as the product, so it stays as it lies, as the left-hand matrix, and the pixels
// are packed: z^T = W x^T, dx^T = W^T dz^T, dW = dz^T x. The weight is read once in either direction.

#include <type_traits>

#include "float_gemm.h"
#include "product.h"
#include "tasks.h"

namespace dla_fast::cpu {
namespace {

constexpr int64_t kBlock = 96;  // channels that are computed together

// Channels of an input.
struct Channels {
  size_t input;
  int64_t first, count;
};

template <class A>
class FewPixels : public Product<A> {
 public:
  explicit FewPixels(const Inputs<A>& in) : in_(in) {}

  int64_t groups() const override { return tiles(); }
  void forward(A* out, Epilogue<A> epilogue) const override;
  bool forms_dz() const override { return true; }
  void backward(const Gradient<A>& g) const override;

 private:
  // A tile is kPanel pixels of all of them.
  int64_t tiles() const { return divide_up(in_.total(), kPanel); }
  int64_t first(int64_t tile) const { return tile * kPanel; }
  int64_t pixels(int64_t tile) const { return std::min(kPanel, in_.total() - first(tile)); }
  // Whole vectors of pixels; those too many are zero.
  int64_t cols(int64_t tile) const { return round_up(pixels(tile), 16); }

  // Where a tile's channel lies in a map of so many channels, and the map's rows.
  template <class V>
  Strided<V> of(V* map, int64_t channels, int64_t tile, int64_t channel) const {
    return {map == nullptr ? nullptr : map + in_.at(channels, 0, first(tile), channel), in_.ld(channels)};
  }
  // [channels][kPanel] from a tile of a map, and back.
  void load(Strided<const A> map, A* to, int64_t tile, int64_t channels) const {
    const Strided<A> rows = {to, kPanel};
    in_.channels_last ? k_.load_transposed(map, rows, pixels(tile), channels)
                      : k_.load(map, rows, channels, pixels(tile));
  }
  void store(const A* from, Strided<A> map, int64_t tile, int64_t channels) const {
    const Strided<const A> rows = {from, kPanel};
    in_.channels_last ? k_.load_transposed(rows, map, channels, pixels(tile))
                      : k_.load(rows, map, channels, pixels(tile));
  }
  Shape shape(int64_t tile, int64_t channels) const {
    return in_.channels_last ? Shape{pixels(tile), channels, false} : Shape{channels, pixels(tile), true};
  }

  // The channels of all inputs, `most` together.
  std::vector<Channels> channels(int64_t most) const {
    std::vector<Channels> found;
    for (size_t i = 0; i < in_.xs.size(); ++i) {
      for (int64_t c = 0; c < in_.xs[i].channels; c += most) {
        found.push_back({i, c, std::min(most, in_.xs[i].channels - c)});
      }
    }
    return found;
  }

  void form(const Gradient<A>& g, A* du, A* dz) const;
  void input_gradients(const Gradient<A>& g, const A* du, const A* dz) const;
  void weight_gradient(const Gradient<A>& g, const A* dz) const;

  const Inputs<A>& in_;
  const Kernels<A>& k_ = kernels<A>();
  const FloatKernels<A>& products_ = float_kernels<A>();
};

template <class A>
void FewPixels<A>::forward(A* out, Epilogue<A> epilogue) const {
  const int64_t depth = in_.in_channels, n = in_.out_channels;
  const Scratch<A> x(tiles() * depth * kPanel, in_.total() % kPanel != 0);
  const std::vector<Channels> pieces = channels(kPanel);
  const int64_t count = static_cast<int64_t>(pieces.size());
  parallel(tiles() * count, kPanel * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / count;
      const auto& [i, c, some] = pieces[task % count];
      const Input<A>& input = in_.xs[i];
      load(of(input.data, input.channels, tile, c), x.get() + (tile * depth + input.offset + c) * kPanel, tile, some);
    }
  });
  const Tasks tasks(tiles(), divide_up(n, kBlock));
  parallel_queue(tasks.count, kPanel * depth * divide_up(n, tasks.groups) / 16, [&](const Take& take) {
    const Scratch<A> z(kBlock * kPanel), turned(kPanel * kPanel);
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = tasks.tile(task);
      for (int64_t block = tasks.begin(task); block < tasks.end(task); ++block) {
        const int64_t channel = block * kBlock, some = std::min(kBlock, n - channel);
        const Segment<A> segment = {in_.weight + channel * depth, depth, depth};
        products_.gemm(
            {some, cols(tile), &segment, 1, false, x.get() + tile * depth * kPanel, kPanel, z.get(), kPanel, false});
        for (int64_t c = 0; c < some; c += kPanel) {
          const int64_t width = std::min(kPanel, some - c);
          const Strided<A> to = out == nullptr ? Strided<A>{turned.get(), kPanel} : of(out, n, tile, channel + c);
          store(z.get() + c * kPanel, to, tile, width);
          epilogue({shape(tile, width), tile, channel + c, in_.at(n, 0, first(tile), channel + c)},
                   Strided<const A>{to.data, to.ld});
        }
      }
    }
  });
}

// dz of all pixels as [tile][N][kPanel], and du, laid out like the output, where that is not null.
template <class A>
void FewPixels<A>::form(const Gradient<A>& g, A* du, A* dz) const {
  const int64_t n = in_.out_channels, count = divide_up(n, kPanel);
  parallel(tiles() * count, 4 * kPanel * kPanel, [&](int64_t begin, int64_t end) {
    const Scratch<A> turned(kPanel * kPanel);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task / count, c = task % count * kPanel, width = std::min(kPanel, n - c);
      A* const to = dz + (tile * n + c) * kPanel;
      g.tail.form(shape(tile, width), c, in_.at(n, 0, first(tile), c), in_.ld(n),
                  {in_.channels_last ? turned.get() : to, kPanel}, of(du, n, tile, c));
      if (in_.channels_last) k_.load_transposed({turned.get(), kPanel}, {to, kPanel}, pixels(tile), width);
    }
  });
}

template <class A>
void FewPixels<A>::input_gradients(const Gradient<A>& g, const A* du, const A* dz) const {
  const int64_t depth = in_.in_channels, n = in_.out_channels;
  std::vector<Channels> blocks;
  for (const Channels& block : channels(kBlock)) {
    if (g.dx[block.input] != nullptr) blocks.push_back(block);
  }
  const auto weight = [&](size_t block) {
    return in_.weight + in_.xs[blocks[block].input].offset + blocks[block].first;
  };
  const Tasks tasks(tiles(), static_cast<int64_t>(blocks.size()));
  parallel_queue(tasks.count, kPanel * n * kBlock / 16, [&](const Take& take) {
    const Scratch<A> z(kBlock * kPanel, true);
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = tasks.tile(task), end = tasks.end(task);
      for (int64_t b = tasks.begin(task); b < end; ++b) {
        const auto& [i, c, some] = blocks[b];
        const int64_t input = static_cast<int64_t>(i), width = in_.xs[i].channels;
        if (g.adds(input)) load(of(du, n, tile, c), z.get(), tile, some);
        const Segment<A> segment = {weight(b), depth, n};
        const int64_t next = b + 1 < end ? b + 1 : tasks.begin(task);
        Ahead ahead = Ahead::of<const A>({weight(next), depth}, n, blocks[next].count);
        products_.gemm({some, cols(tile), &segment, 1, true, dz + tile * n * kPanel, kPanel, z.get(), kPanel,
                        g.adds(input), &ahead});
        store(z.get(), of(g.dx[i], width, tile, c), tile, some);
      }
    }
  });
}

template <class A>
void FewPixels<A>::weight_gradient(const Gradient<A>& g, const A* dz) const {
  const int64_t depth = in_.in_channels, n = in_.out_channels;
  const std::vector<Channels> pieces = channels(kPanel);
  parallel_queue(static_cast<int64_t>(pieces.size()), in_.total() * n * kPanel / 16, [&](const Take& take) {
    const Scratch<A> x(kPanel * kPanel, true);
    for (int64_t task = take(); task >= 0; task = take()) {
      const auto& [i, c, some] = pieces[task];
      const Input<A>& input = in_.xs[i];
      for (int64_t tile = 0; tile < tiles(); ++tile) {
        const Strided<const A> from = of(input.data, input.channels, tile, c);
        const Strided<A> to = {x.get(), kPanel};
        in_.channels_last ? k_.load(from, to, pixels(tile), some) : k_.load_transposed(from, to, some, pixels(tile));
        const Segment<A> segment = {dz + tile * n * kPanel, kPanel, pixels(tile)};
        products_.gemm({n, some, &segment, 1, false, x.get(), kPanel, g.dw + input.offset + c, depth, tile > 0});
      }
    }
  });
}

template <class A>
void FewPixels<A>::backward(const Gradient<A>& g) const {
  const int64_t n = in_.out_channels;
  const Scratch<A> dz(tiles() * n * kPanel, in_.total() % kPanel != 0),
      kept(g.wants_du() && g.dresidual == nullptr ? in_.total() * n : 0);
  A* const du = !g.wants_du() ? nullptr : g.dresidual != nullptr ? g.dresidual : kept.get();
  form(g, du, dz.get());
  if (g.any_dx()) input_gradients(g, du, dz.get());
  if (g.dw != nullptr) weight_gradient(g, dz.get());
}

}  // namespace

template <class T>
bool few_pixels_pay(const Inputs<T>& in) {
  constexpr int64_t few = 4 * kPanel, large = 1 << 17;
  if (!std::is_same_v<T, acc_t<T>> || in.kernel != 1 || (!in.channels_last && in.images > 1)) return false;
  return in.total() <= few && in.in_channels * in.out_channels >= large;
}

template <class T>
ProductOf<T> few_pixels(const Inputs<T>& in) {
  if constexpr (std::is_same_v<T, acc_t<T>>) return std::make_unique<FewPixels<T>>(in);
  return nullptr;
}

#define DLA_INSTANTIATE(T)                        \
  template bool few_pixels_pay(const Inputs<T>&); \
  template ProductOf<T> few_pixels(const Inputs<T>&);

DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(c10::BFloat16)
DLA_INSTANTIATE(c10::Half)

}  // namespace dla_fast::cpu
