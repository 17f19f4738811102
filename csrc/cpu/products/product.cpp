#include "product.h"

#include <type_traits>

namespace dla_fast::cpu {

// Where the processor has instructions for bfloat16 they serve it, and where those are so fast that six products of
// theirs take less than one of float, they serve float; else everything is multiplied as float or double. A 3x3 kernel
// takes 8KN flops a pixel by Winograd's algorithm, where a sum of products takes 18KN.
template <class T>
ProductOf<T> product_of(const Inputs<T>& in) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (ProductOf<T> product = in.kernel == 1 ? bf16_pointwise(in) : bf16_convolution(in)) return product;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (in.kernel == 1) {
      if (ProductOf<T> product = bf16x3_pointwise(in)) return product;
    }
  }
  return in.kernel == 1 ? float_pointwise(in) : winograd(in);
}

template ProductOf<float> product_of(const Inputs<float>&);
template ProductOf<double> product_of(const Inputs<double>&);
template ProductOf<c10::BFloat16> product_of(const Inputs<c10::BFloat16>&);
template ProductOf<c10::Half> product_of(const Inputs<c10::Half>&);

}  // namespace dla_fast::cpu
