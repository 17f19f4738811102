// The Python module dla_fast._C, and the kernels of the operators whose schemas dla_fast/ops defines.

#if defined(__GNUC__) && !defined(__clang__)
// A sanitizer changes what is inlined, and gcc then takes a vector of pybind11's for uninitialised.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "cpu/operators/conv_norm_act.h"
#include "cpu/operators/fingerprint.h"
#include "cpu/operators/packed.h"
#include "cpu/operators/reused_maps.h"
#include "cpu/operators/tail.h"
#include "cpu/operators/upsample.h"
#include "cpu/shared/isa.h"
#include "direct.h"
#include "recall.h"

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
  // Functions and no operators: they serve inference alone, of plain tensors, whose calls they are to cost little
  // beside.
  const pybind11::call_guard<pybind11::gil_scoped_release> released;
  m.def("conv_norm_act_way", &dla_fast::cpu::conv_norm_act_way, released, "See csrc/cpu/operators/packed.h.");
  m.def("conv_norm_act_pack", &dla_fast::cpu::conv_norm_act_pack, released, "See csrc/cpu/operators/packed.h.");
  m.def("conv_norm_act_packed", &dla_fast::cpu::conv_norm_act_packed, released, "See csrc/cpu/operators/packed.h.");
  using Call = dla_fast::cpu::PackedCall;
  pybind11::class_<Call>(m, "PackedCall", "See csrc/cpu/operators/packed.h.")
      .def(pybind11::init([](const at::Tensor& weight, const at::Tensor& packed, int64_t way, const at::Tensor& scale,
                             const at::Tensor& shift, const std::vector<int64_t>& factors, int64_t stride,
                             int64_t dilation, int64_t groups, int64_t residual_input, int64_t added_input,
                             const std::string& act, double slope) {
        return Call{weight, packed,         way,         scale, shift, factors, stride, dilation,
                    groups, residual_input, added_input, act,   slope};
      }));
  m.def("unchanged", &dla_fast::unchanged, "See csrc/recall.h.");
  m.def("kind_of_call", &dla_fast::kind_of, "See csrc/recall.h.");
  m.def("recall", &dla_fast::recall, "See csrc/recall.h.");
  dla_fast::define_direct<&dla_fast::cpu::conv_norm_act_inference>(m, "conv_norm_act_inference");
  dla_fast::define_direct<&dla_fast::cpu::conv_norm_act_stage>(m, "conv_norm_act_stage");
  dla_fast::define_direct<&dla_fast::cpu::conv_norm_act_backward>(m, "conv_norm_act_backward");
  dla_fast::define_direct<&dla_fast::cpu::tail>(m, "tail");
  dla_fast::define_direct<&dla_fast::cpu::tail_backward_reduce>(m, "tail_backward_reduce");
  m.def("release_maps", &dla_fast::cpu::release_maps, "Free the memory that is kept for maps.");
}
