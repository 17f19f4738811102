// The 3x3 convolution of a node's inputs: in bfloat16 instructions where the dtype and the processor are for them, else
// by Winograd's algorithm.

#pragma once

#include <type_traits>

#include "bf16_convolution.h"
#include "winograd.h"

namespace dla_fast::cpu {

// Calls epilogue(shape, row, first channel, z) for every row of pixels of the output and panel of its channels.
// adjoint: with the weight of the gradient's convolution, from its output channels to its input channels.
template <class T, class Epilogue>
void convolve(const MergeInputs& in, const Tensor& weight, bool adjoint, std::vector<Panel> panels,
              const Epilogue& epilogue) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (const Bf16Kernels* products = bf16_kernels()) {
      Bf16Convolution(in, *products, weight, adjoint, std::move(panels)).run(epilogue);
      return;
    }
  }
  Winograd<T>(in, Taps<T>(weight, adjoint), std::move(panels)).run(epilogue);
}

// Gradient of the weight, laid out like it and in the accumulation type; xs are the inputs of `in` at the size of dz.
template <class T>
Tensor convolution_weight_gradient(const Tensor& dz, const MergeInputs& in, const std::vector<Tensor>& xs,
                                   const Tensor& weight) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (const Bf16Kernels* products = bf16_kernels()) return bf16_weight_gradient(*products, dz, in, xs, weight);
  }
  return winograd_weight_gradient<T>(dz, in, xs, weight);
}

}  // namespace dla_fast::cpu
