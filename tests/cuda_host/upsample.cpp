#include "../../csrc/cuda/upsample.cu"
