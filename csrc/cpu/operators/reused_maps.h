// Maps whose memory is kept when they are gone, for the next ones (../shared/reused.h).

#pragma once

#include "tensors.h"

namespace dla_fast::cpu {

// As empty_map. The tensor is an ordinary one; what it lies in comes back when its last owner is gone.
Tensor reused_map(const Tensor& like, at::IntArrayRef sizes, bool channels_last);

// Frees what is kept and not in use.
void release_maps();

}  // namespace dla_fast::cpu
