// The tile kernels for any processor.

#include "../shared/kernels.h"

#define DLA_ISA generic
#define DLA_VECTOR_BYTES 16
#include "tile_kernels_inl.h"
