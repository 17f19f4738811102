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

}  // namespace dla_fast::cpu
