// Products of float and double matrices for any processor.

#include "float_gemm.h"

#define DLA_ISA generic
#define DLA_VECTOR_BYTES 16
#include "float_gemm_isa_inl.h"
