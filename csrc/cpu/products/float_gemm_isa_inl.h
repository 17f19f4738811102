// Bodies of the products (float_gemm.h), compiled once per instruction set: the includer sets DLA_ISA (a namespace
// name), DLA_VECTOR_BYTES and the target, after every header is in, so that no library code is compiled for it.

namespace dla_fast::cpu::DLA_ISA {
namespace {

#include "../shared/vectors_inl.h"

#include "gemm_inl.h"

#include "winograd_inl.h"

}  // namespace

template <class A>
const FloatKernels<A>& float_kernels() {
  static const FloatKernels<A> table = {&gemm<A>,
                                        &winograd_input<A>,
                                        &winograd_gradient<A>,
                                        &winograd_output<A>,
                                        &winograd_weight<A>,
                                        &winograd_weight_gradient<A>};
  return table;
}

template const FloatKernels<float>& float_kernels<float>();
template const FloatKernels<double>& float_kernels<double>();

}  // namespace dla_fast::cpu::DLA_ISA
