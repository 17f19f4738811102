// Maps whose memory is kept when they are gone, for the next ones. Memory fresh from the system is faulted in page by
// page, which for a map that a fast kernel writes takes longer than writing it.

#pragma once

#include "tensors.h"

namespace dla_fast::cpu {

// As empty_map. The tensor is an ordinary one; what it lies in comes back when its last owner is gone.
Tensor reused_map(const Tensor& like, at::IntArrayRef sizes, bool channels_last);

// Frees what is kept and not in use.
void release_maps();

}  // namespace dla_fast::cpu
