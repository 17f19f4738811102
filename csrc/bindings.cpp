// The Python module dla_fast._C, and the kernels of the operators whose schemas dla_fast/ops defines.

#if defined(__GNUC__) && !defined(__clang__)
// A sanitizer changes what is inlined, and gcc then takes a vector of pybind11's for uninitialised.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "cpu/operators/conv_norm_act.h"
#include "cpu/operators/fingerprint.h"
#include "cpu/operators/tail.h"
#include "cpu/operators/upsample.h"
#include "cpu/shared/isa.h"

namespace dla_fast {

TORCH_LIBRARY_IMPL(dla_fast_cpu, CPU, m) {
  m.impl("moments", &cpu::moments);
  m.impl("tail", &cpu::tail);
  m.impl("tail_backward_reduce", &cpu::tail_backward_reduce);
  m.impl("tail_backward_apply", &cpu::tail_backward_apply);
  m.impl("conv_norm_act_inference", &cpu::conv_norm_act_inference);
  m.impl("conv_norm_act_stage", &cpu::conv_norm_act_stage);
  m.impl("conv_norm_act_backward", &cpu::conv_norm_act_backward);
  m.impl("upsample", &cpu::upsample);
  m.impl("upsample_add", &cpu::upsample_add);
  m.impl("upsample_backward", &cpu::upsample_backward);
}

}  // namespace dla_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of dla_fast";
  m.def(
      "cpu_isa", [] { return dla_fast::cpu::isa_name(dla_fast::cpu::current_isa()); },
      "The instruction set the CPU kernels use: generic, avx2, avx512, avx512_bf16 or amx.");
  m.def("fingerprint", &dla_fast::cpu::fingerprint,
        "A number of where tensors lie, what they are and what is in them (of large ones of some values), or 0.");
}
