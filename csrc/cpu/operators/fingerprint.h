// Whether tensors still are what they were, at a small part of the cost of comparing them.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensors.h"

namespace dla_fast::cpu {

// A number of where the tensors lie, their dtypes, shapes, strides and versions, and of their values: all of a
// vector's, and of anything larger evenly spread ones, 64 or more and at least one for every index of the first
// dimension. It differs as soon as one of these does, but for a chance of 2^-64; a change of one value of those that
// are read alone is certain to show. Reads, of tensors of up to 64 values an index, a cache line each.
//
// 0 where one is not a dense tensor in the CPU's memory that this library knows (another device, a subclass).
int64_t fingerprint(const std::vector<OptionalTensor>& tensors);

// A number of a call of inference that reads tensors of that fingerprint: of the dtype, shapes and strides of its
// inputs and its residual (a tensor, or the number of an input, or -1). 0 where one of them is no dense tensor in the
// CPU's memory, or has another dtype.
int64_t kind_of_call(int64_t mark, at::ScalarType dtype, const std::vector<Tensor>& xs, const OptionalTensor& residual,
                     int64_t residual_input);

}  // namespace dla_fast::cpu
