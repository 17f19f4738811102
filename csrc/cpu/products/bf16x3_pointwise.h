// The 1x1 product of a node of floats in bfloat16 instructions, where those are the faster way.
//
// One code for both layouts, which trade sides: channels_last multiplies pixels by weights, contiguous weights by
// pixels.

#pragma once

#include "bf16x3_gemm.h"
#include "product.h"
#include "tasks.h"

namespace dla_fast::cpu {

// The pixels of a node in tiles of about the same size, none of them in two images of a contiguous tensor.
struct PixelTiles {
  struct Tile {
    int64_t image, pixel, count;
  };

  // `most` pixels, in multiples of `unit`; as many tiles as can be shared out evenly, where there are pixels enough.
  PixelTiles(const Inputs<float>& in, int64_t most, int64_t unit, int64_t shares = 1);
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

class Bf16x3Pointwise : public Product<float> {
 public:
  Bf16x3Pointwise(const Inputs<float>& in, const Bf16x3Kernels& kernels);
  bool plain() const override { return false; }
  int64_t packed_bytes() const override;
  void pack(void* to) const override;
  int64_t groups() const override { return tiles_.count(); }
  void forward(float* out, Epilogue<float> epilogue) const override;
  bool forms_dz() const override { return true; }
  void backward(const Gradient<float>& gradient) const override;

 private:
  void by_tiles(float* out, Epilogue<float> epilogue) const;
  void by_panels(float* out, Epilogue<float> epilogue) const;
  void split_weight(int64_t channel, int64_t input, Bf16x3Side to) const;
  void split_pixels(int64_t tile, int64_t input, Bf16x3Side to) const;
  void piece(int64_t tile, int64_t channel, Bf16x3Side pixels, Bf16x3Side weight, float* scratch, Ahead* ahead,
             float* out, Epilogue<float> epilogue) const;

  const Inputs<float>& in_;
  const Bf16x3Kernels& kernels_;
  std::vector<int64_t> steps_;  // of each input, before it; of all of them at the end
  int64_t stride_;
  bool few_;  // pixels
  PixelTiles tiles_;
};

}  // namespace dla_fast::cpu
