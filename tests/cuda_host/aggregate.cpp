#include "../../csrc/cuda/aggregate.cu"
