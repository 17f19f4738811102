// Memory for weights that are packed once, many of them together.

#pragma once

#include "tensors.h"

namespace dla_fast::cpu {

// So many bytes, 64-byte aligned, as a tensor. A network reads all of its weights in every pass, and in pages of 4 KB
// each of which is looked up anew: on huge pages a whole network took 3 % less time. Most weights are smaller than one
// of those, so they share blocks, which are freed when the last one goes.
Tensor packed_memory(int64_t bytes);

}  // namespace dla_fast::cpu
