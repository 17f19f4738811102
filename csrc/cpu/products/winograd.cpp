// Winograd's algorithm with products of float and double matrices.

#include "winograd.h"

namespace dla_fast::cpu {
namespace {

// With the sixteen matrices of every panel's weight, [16][depth][kPanel].
template <class A>
struct Products {
  static constexpr int64_t tiles = 48;
  const A* packed;

  struct Thread {
    Thread(const Products& /*products*/, int64_t /*tiles*/, int64_t depth) : depth(depth) {}
    int64_t depth;
  };

  // Position by position, so that its part of v serves all panels from the cache.
  void multiply(const Thread& thread, const std::vector<Panel>& panels, int64_t first, int64_t last, int64_t tiles,
                const A* v, A* m) const {
    const int64_t depth = thread.depth;
    const auto weight = [&](int64_t panel, int64_t position) {
      return packed + (panel * 16 + position) * depth * kPanel;
    };
    for (int64_t position = 0; position < 16; ++position) {
      const Segment<A> segment = {v + position * tiles * depth, depth, depth};
      for (int64_t p = first; p < last; ++p) {
        const A* next = p + 1 < last ? weight(p + 1, position) : weight(first, (position + 1) % 16);
        Ahead ahead = Ahead::of<const A>({next, kPanel}, depth, kPanel);
        float_kernels<A>().gemm({tiles, panels[p].count, &segment, 1, false, weight(p, position), kPanel,
                                 m + ((p - first) * 16 + position) * tiles * kPanel, kPanel, false, &ahead, true});
      }
    }
  }
};

template <class A>
struct Sums {
  static constexpr int64_t deep = 64, wide = 128, tiles = 48;

  struct Thread {
    Thread(const Sums& /*sums*/, int64_t /*tiles*/) {}
  };

  void multiply(const Thread& /*thread*/, const WinogradSum& sum, const A* v, const A* d, A* du, bool add) const {
    for (int64_t position = 0; position < 16; ++position) {
      const Segment<A> segment = {v + position * sum.plane * deep, deep, sum.tiles};
      float_kernels<A>().gemm({sum.depth, sum.width, &segment, 1, true, d + position * sum.plane * wide, wide,
                               du + position * deep * wide, wide, add});
    }
  }
};

int64_t packed_values(const std::vector<Panel>& panels, int64_t depth) {
  return static_cast<int64_t>(panels.size()) * 16 * depth * kPanel;
}

// Panel by panel the sixteen matrices of the transformed weight, [16][depth][kPanel].
template <class T>
void transform(const WinogradTaps<T>& taps, const std::vector<Panel>& panels, acc_t<T>* to) {
  using A = acc_t<T>;
  const int64_t depth = taps.inputs(), step = WinogradTaps<T>::block, pieces = divide_up(depth, step);
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

  bool plain() const override { return false; }
  int64_t packed_bytes() const override {
    return packed_values(panels_of(this->in_.out_channels), this->in_.in_channels) * static_cast<int64_t>(sizeof(A));
  }
  void pack(void* to) const override {
    const auto& in = this->in_;
    transform(WinogradTaps<T>{in.weight, in.in_channels, in.out_channels, in.taps_first, false},
              panels_of(in.out_channels), static_cast<A*>(to));
  }

 protected:
  void convolve(const Inputs<T>& in, bool adjoint, std::vector<Panel> panels, RowEpilogue<A> epilogue) const override {
    if (!adjoint) {
      const PackedWeight<A> weight(*this, in);
      return WinogradBlocks<T, Products<A>>(in, std::move(panels), {weight.get()}).run(epilogue);
    }
    const bool ragged = std::any_of(panels.begin(), panels.end(), [](const Panel& p) { return p.count % kPanel != 0; });
    const Scratch<A> weight(packed_values(panels, in.in_channels), ragged);
    transform(WinogradTaps<T>{in.weight, in.out_channels, in.in_channels, in.taps_first, true}, panels, weight.get());
    WinogradBlocks<T, Products<A>>(in, std::move(panels), {weight.get()}).run(epilogue);
  }
  void weight_gradient(const Gradient<T>& gradient) const override {
    winograd_weight_gradient(this->in_, gradient, Sums<A>());
  }
};

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
