// The 1x1 product of a bfloat16 node in bfloat16 instructions.

#pragma once

#include "bf16_gemm.h"
#include "product.h"
#include "tasks.h"

namespace dla_fast::cpu {

// How z is cut: a tile of pixels is what a task multiplies, and falls into parts, each of which is handed on whole. A
// part never lies in two images of a contiguous tensor.
class Bf16Pointwise : public Product<c10::BFloat16> {
 public:
  Bf16Pointwise(const Inputs<c10::BFloat16>& in, const Bf16Kernels& kernels);
  int64_t groups() const override { return parts_; }
  void forward(float* out, Epilogue<float> epilogue) const override;
  bool forms_dz() const override { return true; }
  void backward(const Gradient<c10::BFloat16>& gradient) const override;

 private:
  void forward_channels_last(Epilogue<float> epilogue) const;
  void forward_contiguous(Epilogue<float> epilogue) const;
  int64_t first_part(int64_t tile) const;

  const Inputs<c10::BFloat16>& in_;
  const Bf16Kernels& kernels_;
  std::vector<int64_t> steps_;  // of each input, before it
  int64_t total_steps_, tile_pixels_, tiles_, parts_;
};

}  // namespace dla_fast::cpu
