// The products of an aggregation node in bfloat16 instructions, where the processor has them.

#pragma once

#include <c10/util/FunctionRef.h>

#include "aggregate.h"
#include "bf16_gemm.h"

namespace dla_fast::cpu {

// How z is cut: a tile of pixels is what a task multiplies, and falls into parts, each of which is handed on whole. A
// part never lies in two images of a contiguous tensor.
class Bf16Forward {
 public:
  // Called with the shape, part, first pixel (or offset), first channel and values of a piece of z.
  using Epilogue = c10::function_ref<void(const Shape&, int64_t, int64_t, int64_t, Strided<const float>)>;

  Bf16Forward(const AggregateInputs& in, const Bf16Kernels& kernels);
  int64_t parts() const { return parts_; }
  void run(const c10::BFloat16* weight, const Epilogue& epilogue) const;

 private:
  void run_channels_last(const c10::BFloat16* weight, const Epilogue& epilogue) const;
  void run_contiguous(const c10::BFloat16* weight, const Epilogue& epilogue) const;
  int64_t first_part(int64_t tile) const;

  const AggregateInputs& in_;
  const Bf16Kernels& kernels_;
  std::vector<int64_t> steps_;  // of each input, before it
  int64_t total_steps_, tile_pixels_, tiles_, parts_;
};

// The gradients of the inputs and the weight. Residual: input 0 gets that of its addition as well.
class Bf16Backward {
 public:
  struct Args {
    const NormVectors<float>& norm;
    const std::vector<float>&m0, &m1;  // as Kernels::apply takes them
    const c10::BFloat16 *dy, *z, *weight;
    bool residual;
    const std::vector<bool>& need_dx;
    std::vector<Tensor>& dxs;
    c10::BFloat16* dweight;  // null where it is not needed
  };

  // Neither pixels nor output channels may be zero.
  Bf16Backward(const AggregateInputs& in, const Bf16Kernels& kernels, const Args& args);
  void run() const;

 private:
  // Pixels of one image (a channels_last tensor is taken for one), at a column of their tile that begins a step.
  struct Chunk {
    int64_t image, pixel, count, column;
  };
  struct PixelTile {
    int64_t first, last, columns;  // its chunks, and columns with the padding of each to whole steps
  };
  struct Buffers;

  // dz with a row for every channel, tile after tile: the left-hand side of the weight's gradient.
  int64_t tile_values() const { return round_up(in_.out_channels, kBf16Block) * ld_; }
  void inputs_gradients(c10::BFloat16* dz_all) const;
  void form_channels_last(const PixelTile& tile, c10::BFloat16* across, const Buffers& to) const;
  void form_contiguous(const PixelTile& tile, c10::BFloat16* across, const Buffers& to) const;
  void dx_channels_last(const PixelTile& tile, int64_t input, int64_t channel, const c10::BFloat16* packed_weight,
                        const Buffers& from) const;
  void dx_contiguous(const PixelTile& tile, int64_t input, int64_t channel, const c10::BFloat16* weight_across,
                     const Buffers& from) const;
  void weight_gradient(const c10::BFloat16* dz_all) const;
  void pack_x(int64_t tile_begin, int64_t tile_end, int64_t input, int64_t channel, int64_t cols, c10::BFloat16* to,
              int64_t panel_values) const;

  const AggregateInputs& in_;
  const Bf16Kernels& kernels_;
  const Args args_;
  int64_t depth_, tile_pixels_, ld_;  // depth: output channels in whole steps
  std::vector<Chunk> chunks_;
  std::vector<PixelTile> tiles_;
};

}  // namespace dla_fast::cpu
