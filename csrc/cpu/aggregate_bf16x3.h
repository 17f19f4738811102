// The products of an aggregation node of float tensors in bfloat16 instructions, where those are the faster way.
//
// One code for both layouts, which trade sides: channels_last multiplies pixels by weights, contiguous weights by
// pixels.

#pragma once

#include <c10/util/FunctionRef.h>

#include "aggregate.h"
#include "bf16x3_gemm.h"

namespace dla_fast::cpu {

// The products that serve a node, or null.
const Bf16x3Kernels* bf16x3_for(const AggregateInputs& in);

// The pixels of a node in tiles of about the same size, none of them in two images of a contiguous tensor.
struct PixelTiles {
  struct Tile {
    int64_t image, pixel, count;
  };

  // `most` pixels, in multiples of `unit`; as many tiles as can be shared out evenly, where there are pixels enough.
  PixelTiles(const AggregateInputs& in, int64_t most, int64_t unit, int64_t shares = 1);
  int64_t count() const { return images * per_image; }
  Tile operator[](int64_t i) const {
    const int64_t pixel = i % per_image * size;
    return {i / per_image, pixel, std::min(size, pixels - pixel)};
  }

  int64_t images, pixels;  // a channels_last tensor is one image
  int64_t size, per_image;
  bool channels_last;

  // A tile in a tensor of so many channels: pixels x channels, or channels x pixels.
  template <class T>
  Strided<T> in_map(T* data, int64_t channels, const Tile& tile, int64_t channel = 0) const {
    if (channels_last) return {data + tile.pixel * channels + channel, channels};
    return {data + (tile.image * channels + channel) * pixels + tile.pixel, pixels};
  }
  Shape shape(const Tile& tile, int64_t channels) const {
    return channels_last ? Shape{tile.count, channels, false} : Shape{channels, tile.count, true};
  }
  // To fetch it.
  Ahead ahead(const float* data, int64_t channels, const Tile& tile, int64_t channel, int64_t count) const {
    return Ahead::of<const float>(in_map(data, channels, tile, channel), channels_last ? tile.count : count,
                                  channels_last ? count : tile.count);
  }
};

// z = sum_i W_i x_i, a tile of pixels by kPanel channels at a time.
class Bf16x3Forward {
 public:
  // Where a piece of z goes: (first pixel or offset, first channel, scratch memory).
  using Target = c10::function_ref<Strided<float>(int64_t, int64_t, Strided<float>)>;
  // Called with the shape, tile, first pixel or offset, first channel and values of a piece.
  using Epilogue = c10::function_ref<void(const Shape&, int64_t, int64_t, int64_t, Strided<const float>)>;

  Bf16x3Forward(const AggregateInputs& in, const Bf16x3Kernels& kernels);
  int64_t tiles() const { return tiles_.count(); }
  void run(const float* weight, const Target& target, const Epilogue& epilogue) const;

 private:
  void by_tiles(const float* weight, const Target& target, const Epilogue& epilogue) const;
  void by_panels(const float* weight, const Target& target, const Epilogue& epilogue) const;
  void split_weight(const float* weight, int64_t channel, int64_t input, Bf16x3Side to) const;
  void split_pixels(int64_t tile, int64_t input, Bf16x3Side to) const;
  void piece(int64_t tile, int64_t channel, Bf16x3Side pixels, Bf16x3Side weight, float* scratch, Ahead* ahead,
             const Target& target, const Epilogue& epilogue) const;

  const AggregateInputs& in_;
  const Bf16x3Kernels& kernels_;
  std::vector<int64_t> steps_;  // of each input, before it; of all of them at the end
  int64_t stride_;
  bool few_;  // pixels
  PixelTiles tiles_;
};

// The gradients of the inputs and the weight. Residual: input 0 gets that of its addition as well.
class Bf16x3Backward {
 public:
  struct Args {
    const NormVectors<float>& norm;
    const std::vector<float>&m0, &m1;  // as Kernels::apply takes them
    const float *dy, *z, *weight;
    bool residual;
    const std::vector<bool>& need_dx;
    std::vector<Tensor>& dxs;
    const std::vector<float*>& dw;  // sums of the weight's gradient, one for every slice; empty where it is not needed
  };

  Bf16x3Backward(const AggregateInputs& in, const Bf16x3Kernels& kernels, const Args& args);
  // Slices of the tiles sum a dW each.
  void by_tiles(int64_t slices) const;
  // dz is kept for all pixels, and dW formed from it in one place: for few pixels and many channels.
  void whole() const;

 private:
  // A panel of channels of an input; where all of the weight is split, its part begins at `block`.
  struct Panel {
    int64_t input, channel, count, block;
  };

  static std::vector<Panel> panels_of(const AggregateInputs& in, const std::vector<bool>* wanted);
  const float* x(int64_t input) const { return in_.xs[input].const_data_ptr<float>(); }
  int64_t ld(const PixelTiles& tiles) const;
  void split_weight(const Panel& panel, Bf16x3Side to) const;
  void tail_gradient(const PixelTiles& tiles, const PixelTiles::Tile& tile, float* dz, float* du) const;
  // dz as formed there, split as dx takes it and as dW does.
  void split_for_dx(const PixelTiles& tiles, const PixelTiles::Tile& tile, const float* dz, Bf16x3Side to) const;
  void split_for_dw(const PixelTiles& tiles, const PixelTiles::Tile& tile, const float* dz, Bf16x3Side to) const;
  void split_x(const PixelTiles& tiles, const PixelTiles::Tile& tile, const Panel& panel, Bf16x3Side to) const;
  void dx(const PixelTiles& tiles, const PixelTiles::Tile& tile, const Panel& panel, Bf16x3Side dz, const float* du,
          Bf16x3Side weight, Ahead* ahead) const;

  const AggregateInputs& in_;
  const Bf16x3Kernels& kernels_;
  const Args args_;
  int64_t steps_, stride_;     // of N in depth
  std::vector<Panel> panels_;  // of dx
};

}  // namespace dla_fast::cpu
