// The products of an aggregation node of float tensors in bfloat16 instructions, where those are the faster way.

#pragma once

#include <c10/util/FunctionRef.h>

#include "aggregate.h"
#include "bf16x3_gemm.h"

namespace dla_fast::cpu {

// Where each input begins in a depth of whole steps.
struct Bf16x3Steps {
  std::vector<int64_t> begin;
  int64_t total = 0;

  explicit Bf16x3Steps(const AggregateInputs& in);
};

// The products that serve a node, or null: the layout, too few values to pay for splitting them, or the instruction
// set.
const Bf16x3Kernels* bf16x3_for(const AggregateInputs& in);

// z = sum_i W_i x_i of channels_last inputs, tile by tile.
class Bf16x3Forward {
 public:
  // Where a piece of z goes: (first pixel, first channel, scratch memory).
  using Target = c10::function_ref<Strided<float>(int64_t, int64_t, Strided<float>)>;
  // Called with the shape, tile, first pixel, first channel and values of a piece.
  using Epilogue = c10::function_ref<void(const Shape&, int64_t, int64_t, int64_t, Strided<const float>)>;

  Bf16x3Forward(const AggregateInputs& in, const Bf16x3Kernels& kernels);
  int64_t tiles() const { return tiles_; }
  void run(const float* weight, const Target& target, const Epilogue& epilogue) const;

 private:
  void by_tiles(const float* weight, const Target& target, const Epilogue& epilogue) const;
  void by_panels(const float* weight, const Target& target, const Epilogue& epilogue) const;
  void split_weight(const float* weight, int64_t channel, int64_t input, Bf16x3Side to) const;
  void split_pixels(int64_t first, int64_t rows, int64_t input, Bf16x3Side to) const;
  void piece(int64_t tile, int64_t channel, Bf16x3Side left, Bf16x3Side right, float* scratch, Ahead* ahead,
             const Target& target, const Epilogue& epilogue) const;

  const AggregateInputs& in_;
  const Bf16x3Kernels& kernels_;
  Bf16x3Steps steps_;
  int64_t stride_, rows_, tiles_;
  bool few_;  // pixels
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
  // Slices of pixels sum a dW each, tile by tile.
  void by_tiles(int64_t slices) const;
  // dz is kept for all pixels, and dW formed from it in one place: for few pixels and many channels.
  void whole() const;

 private:
  // A panel of dx: so many channels of an input; where all of the weight is split it begins at a block of that.
  struct Panel {
    int64_t input, channel, cols, block;
  };

  void split_weight(const Panel& panel, Bf16x3Side to) const;
  const float* x(int64_t input) const { return in_.xs[input].const_data_ptr<float>(); }
  void tail_gradient(int64_t first, int64_t rows, float* dz, float* du) const;
  void dx(const Panel& panel, int64_t first, int64_t rows, Bf16x3Side dz, const float* du, Bf16x3Side weight,
          Ahead* ahead) const;

  const AggregateInputs& in_;
  const Bf16x3Kernels& kernels_;
  const Args args_;
  int64_t steps_, stride_;  // of N in depth
  std::vector<Panel> panels_;
  int64_t blocks_ = 0;  // of the split weight
};

}  // namespace dla_fast::cpu
