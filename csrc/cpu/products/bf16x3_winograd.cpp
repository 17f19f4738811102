// Winograd's algorithm with products of floats in bfloat16 instructions (bf16x3_gemm.h).
//
// Transformed in float, then split: a value of v once for all output channels, of the weight once a call or where it is
// packed. By arithmetic that is better than the plain sum in parts, which takes 36 products where this takes 16: on AMX
// 27 cycles a tile and channel of the input for 64 output channels, where those here and the splitting take 12 and 5.

#include "bf16x3_gemm.h"
#include "winograd.h"

namespace dla_fast::cpu {
namespace {

using c10::BFloat16;
using Taps = WinogradTaps<float>;

int64_t steps_of(int64_t depth) {
  return divide_up(depth, kBf16Step);
}

// With the sixteen matrices of every panel's weight, a right-hand side each.
struct Products {
  static constexpr int64_t tiles = 64;
  const Bf16x3Kernels& kernels;
  const BFloat16* packed;

  static int64_t matrix(int64_t depth) { return Bf16x3Side::values(kPanel, steps_of(depth)); }

  struct Thread {
    Thread(const Products& products, int64_t tiles, int64_t depth)
        : depth(depth),
          configured(products.kernels.thread),
          parts(Bf16x3Side::values(tiles, steps_of(depth))),
          side{parts.get(), Bf16x3Side::stride_of(steps_of(depth))} {}
    int64_t depth;
    Bf16Thread configured;
    Scratch<BFloat16> parts;
    Bf16x3Side side;
  };

  void multiply(const Thread& thread, const std::vector<Panel>& panels, int64_t first, int64_t last, int64_t tiles,
                const float* v, float* m) const {
    const int64_t depth = thread.depth, values = matrix(depth);
    const auto weight = [&](int64_t panel, int64_t position) {
      return const_cast<BFloat16*>(packed) + (panel * 16 + position) * values;
    };
    for (int64_t position = 0; position < 16; ++position) {
      kernels.left({v + position * tiles * depth, depth}, tiles, depth, thread.side);
      for (int64_t p = first; p < last; ++p) {
        const BFloat16* next = p + 1 < last ? weight(p + 1, position) : weight(first, (position + 1) % 16);
        Ahead ahead = Ahead::of<const BFloat16>({next, values}, 1, values);
        kernels.gemm({tiles,
                      panels[p].count,
                      steps_of(depth),
                      thread.side,
                      {weight(p, position), thread.side.stride},
                      m + ((p - first) * 16 + position) * tiles * kPanel,
                      kPanel,
                      false,
                      &ahead});
      }
    }
  }
};

int64_t packed_values(const std::vector<Panel>& panels, int64_t depth) {
  return static_cast<int64_t>(panels.size()) * 16 * Products::matrix(depth);
}

// The weight as Products takes it, a step of a panel at a time.
void pack_panels(const Bf16x3Kernels& kernels, const Taps& taps, const std::vector<Panel>& panels, BFloat16* to) {
  const int64_t depth = taps.inputs(), steps = steps_of(depth), values = Products::matrix(depth);
  const int64_t plane = kBf16Step * kPanel;
  parallel(static_cast<int64_t>(panels.size()) * steps, 32 * plane, [&](int64_t begin, int64_t end) {
    const Scratch<float> work(9 * plane), u(16 * plane);
    for (int64_t task = begin; task < end; ++task) {
      const Panel panel = panels[task / steps];
      const int64_t step = task % steps, k = step * kBf16Step, count = std::min(kBf16Step, depth - k);
      taps.transform(k, count, panel.channel, panel.count, u.get(), plane, work.get());
      for (int64_t position = 0; position < 16; ++position) {
        const Bf16x3Side side = {to + (task / steps * 16 + position) * values, Bf16x3Side::stride_of(steps)};
        kernels.right({u.get() + position * plane, kPanel}, panel.count, count, side.at(0, step));
      }
    }
  });
}

// Of the weight's gradient. The tiles are the depth, which whole steps fill best.
struct Sums {
  static constexpr int64_t deep = 128, wide = 128, tiles = 64;
  const Bf16x3Kernels& kernels;

  struct Thread {
    Thread(const Sums& sums, int64_t tiles)
        : configured(sums.kernels.thread),
          v_parts(Bf16x3Side::values(deep, steps_of(tiles))),
          d_parts(Bf16x3Side::values(wide, steps_of(tiles))) {}
    Bf16Thread configured;
    Scratch<BFloat16> v_parts, d_parts;
  };

  void multiply(const Thread& thread, const WinogradSum& sum, const float* v, const float* d, float* du,
                bool add) const {
    const int64_t steps = steps_of(sum.tiles), stride = Bf16x3Side::stride_of(steps);
    const Bf16x3Side left = {thread.v_parts.get(), stride}, right = {thread.d_parts.get(), stride};
    for (int64_t position = 0; position < 16; ++position) {
      kernels.left_transposed({v + position * sum.plane * deep, deep}, sum.depth, sum.tiles, left);
      kernels.right({d + position * sum.plane * wide, wide}, sum.width, sum.tiles, right);
      kernels.gemm({sum.depth, sum.width, steps, left, right, du + position * deep * wide, wide, add});
    }
  }
};

class Bf16x3Winograd : public Convolution<float> {
 public:
  Bf16x3Winograd(const Inputs<float>& in, const Bf16x3Kernels& kernels) : Convolution<float>(in), kernels_(kernels) {}

  bool plain() const override { return false; }
  int64_t packed_bytes() const override {
    return packed_values(panels_of(in_.out_channels), in_.in_channels) * static_cast<int64_t>(sizeof(BFloat16));
  }
  void pack(void* to) const override {
    pack_panels(kernels_, {in_.weight, in_.in_channels, in_.out_channels, in_.taps_first, false},
                panels_of(in_.out_channels), static_cast<BFloat16*>(to));
  }

 protected:
  void convolve(const Inputs<float>& in, bool adjoint, std::vector<Panel> panels,
                RowEpilogue<float> epilogue) const override {
    if (!adjoint) {
      const PackedWeight<BFloat16> weight(*this, in);
      return multiply(in, std::move(panels), weight.get(), epilogue);
    }
    const Scratch<BFloat16> weight(packed_values(panels, in.in_channels));
    pack_panels(kernels_, {in.weight, in.out_channels, in.in_channels, in.taps_first, true}, panels, weight.get());
    multiply(in, std::move(panels), weight.get(), epilogue);
  }
  void weight_gradient(const Gradient<float>& gradient) const override {
    winograd_weight_gradient(in_, gradient, Sums{kernels_});
  }

 private:
  void multiply(const Inputs<float>& in, std::vector<Panel> panels, const BFloat16* weight,
                RowEpilogue<float> epilogue) const {
    WinogradBlocks<float, Products>(in, std::move(panels), {kernels_, weight}).run(epilogue);
  }

  const Bf16x3Kernels& kernels_;
};

}  // namespace

ProductOf<float> bf16x3_winograd(const Inputs<float>& in) {
  return std::make_unique<Bf16x3Winograd>(in, *bf16x3_kernels());
}

}  // namespace dla_fast::cpu
