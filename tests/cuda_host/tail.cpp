#include "../../csrc/cuda/tail.cu"
