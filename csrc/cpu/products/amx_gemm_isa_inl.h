// Bodies of the products with AMX (bf16_gemm.h, bf16x3_gemm.h), compiled for the tiles of the processor and for
// emulated ones: the includer sets DLA_ISA (a namespace name) and the target, after every header is in.

namespace dla_fast::cpu::DLA_ISA {
namespace {

using c10::BFloat16;

#include "bf16_gemm_amx_inl.h"

#include "bf16x3_gemm_amx_inl.h"

}  // namespace

const Bf16Kernels& bf16_kernels() {
  const Bf16Kernels& shared = avx512_bf16::bf16_kernels();
  static const Bf16Kernels table = {&gemm, shared.pack_transposed, shared.pack, shared.transpose, shared.store, &enter,
                                    &leave};
  return table;
}

const Bf16x3Kernels& bf16x3_kernels() {
  static const Bf16x3Kernels table = {
      &gemm, &split_along<false>, &split_across<true>, &split_across<false>, &split_along<true>, bf16_kernels()};
  return table;
}

}  // namespace dla_fast::cpu::DLA_ISA
