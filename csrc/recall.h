// Calls of frozen units that were checked before: one function looks whether all is as it was then, and runs them.

#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "cpu/operators/packed.h"

namespace dla_fast {

// Whether facts hold of modules. They are threes in a row: a dict, a key, and what it holds there, or ... for nothing;
// a dict, a number, and ...: so many entries; the number of a module, its class, and ...; the number of a module, and a
// key and what is held there by its __dict__.
bool unchanged(const pybind11::tuple& modules, const pybind11::tuple& facts);

// A number of the kind of a call whose tensors have that fingerprint, or 0 where it is none of inference of plain
// tensors. residual: None, a tensor, or the number of an input.
int64_t kind_of(int64_t mark, const pybind11::tuple& tensors, const pybind11::sequence& xs,
                const pybind11::object& residual);

// The output of units that follow each other: (number of the convolution, of the norm, facts of the two, tensors, calls
// by kind) each, tensors being the weight, the bias and the norm's four, None for what there is not. The first one
// reads xs, and the last one adds the residual. None where facts of the modules or of a unit do not hold, or a call is
// of no kind that is known.
pybind11::object recall(const pybind11::tuple& modules, const pybind11::tuple& facts, const pybind11::tuple& units,
                        const pybind11::sequence& xs, const pybind11::object& residual);

}  // namespace dla_fast
