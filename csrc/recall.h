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

// facts: of a unit's modules. tensors: its weight, bias and the norm's four, None for what there is not.
// The output of a call whose kind is among `calls` (number to PackedCall); None where it is not, or facts have changed.
pybind11::object recall(const pybind11::tuple& modules, const pybind11::tuple& facts, const pybind11::tuple& tensors,
                        const pybind11::dict& calls, const pybind11::sequence& xs, const pybind11::object& residual);

}  // namespace dla_fast
