#include "product.h"

#include <algorithm>
#include <type_traits>

#include "bf16_gemm.h"
#include "bf16x3_gemm.h"
#include "float_gemm.h"

namespace dla_fast::cpu {
namespace {

// Winograd's algorithm takes 8KN flops a pixel where the sum of products takes 18KN, but has a weight of 16KN values to
// form, which so few pixels are not worth, and transforms that so few channels do not pay for. From what
// transforming, packing and either sum took a core of a Zen 4.
constexpr int64_t kFewPixels = 128;

template <class T>
bool winograd_pays(const Inputs<T>& in, bool kept) {
  constexpr int64_t channels = 32;
  if (in.kernel != 3 || in.stride != 1 || in.dilation != 1) return false;
  for (const Input<T>& x : in.xs) {
    if (x.factor > 1) return true;  // it alone upsamples on the way
  }
  return std::min(in.in_channels, in.out_channels) >= channels && (kept || in.total() >= kFewPixels);
}

}  // namespace

namespace {

bool chains(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::float_pointwise:
    case Arithmetic::winograd:
    case Arithmetic::direct:
    case Arithmetic::bf16x3_winograd:
      return true;
    default:
      return false;
  }
}

}  // namespace

template <class T>
bool forms_on_load(const Inputs<T>& in, Arithmetic arithmetic, bool residual) {
  return chains(arithmetic) && (in.channels_last || arithmetic == Arithmetic::float_pointwise || !residual);
}

// dW reads dz once for every 64 channels of an input, dx once. Formed as often as that it takes as long as a pass that
// writes it, and a reading of what that has written.
template <class T>
bool forms_dz_on_load(const Inputs<T>& in, Arithmetic arithmetic) {
  constexpr int64_t together = 64, most = 2;
  int64_t times = 0;
  for (const Input<T>& x : in.xs) times += (x.channels + together - 1) / together;
  return chains(arithmetic) && in.kernel > 1 && in.channels_last && times <= most;
}

// Pixels of a contiguous map that lie a stride apart are no rows, and a pass over the map takes less than to gather and
// scatter them.
template <class T>
bool goes_through(const Inputs<T>& in, Arithmetic arithmetic) {
  return chains(arithmetic) && (in.channels_last || in.stride == 1);
}

// Where the processor has instructions for bfloat16 they serve it, and where those are so fast that six products of
// theirs take less than one of float, they serve float; else everything is multiplied as float or double.
template <class T>
Arithmetic arithmetic_of(const Inputs<T>& in, bool kept) {
  const bool plain = in.stride == 1 && in.dilation == 1;
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (bf16_kernels() != nullptr) {
      if (in.kernel == 1) return Arithmetic::bf16_pointwise;
      if (in.kernel == 3 && plain) return Arithmetic::bf16_convolution;
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    if (bf16x3_kernels() != nullptr && bf16x3_pays(in)) {
      if (in.kernel == 1) return Arithmetic::bf16x3_pointwise;
      // Few pixels read the weight at memory's speed, and in parts it is half as large again.
      if (winograd_pays(in, kept) && in.total() >= kFewPixels) return Arithmetic::bf16x3_winograd;
      if ((in.kernel != 3 || !plain) && in.total() >= kFewPixels) return Arithmetic::bf16x3_direct;
    }
  }
  if (in.kernel == 1) {
    if (!kept && few_pixels_pay(in)) return Arithmetic::few_pixels;
    // A panel of pixels is of one contiguous image. Where an image does not fill one, all of them as one matrix, pixels
    // turned into rows, are the faster way.
    const bool small = !in.channels_last && in.pixels() < kPanel;
    return small ? Arithmetic::direct : Arithmetic::float_pointwise;
  }
  return winograd_pays(in, kept) ? Arithmetic::winograd : Arithmetic::direct;
}

template <class T>
ProductOf<T> product_of(const Inputs<T>& in, Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::bf16_pointwise:
      if constexpr (std::is_same_v<T, c10::BFloat16>) return bf16_pointwise(in);
      break;
    case Arithmetic::bf16_convolution:
      if constexpr (std::is_same_v<T, c10::BFloat16>) return bf16_convolution(in);
      break;
    case Arithmetic::bf16_direct:
      if constexpr (std::is_same_v<T, c10::BFloat16>) return bf16_direct(in);
      break;
    case Arithmetic::bf16x3_pointwise:
      if constexpr (std::is_same_v<T, float>) return bf16x3_pointwise(in);
      break;
    case Arithmetic::bf16x3_winograd:
      if constexpr (std::is_same_v<T, float>) return bf16x3_winograd(in);
      break;
    case Arithmetic::bf16x3_direct:
      if constexpr (std::is_same_v<T, float>) return bf16x3_direct(in);
      break;
    case Arithmetic::few_pixels:
      return few_pixels(in);
    case Arithmetic::winograd:
      return winograd(in);
    case Arithmetic::direct:
      return direct(in);
    default:
      break;
  }
  return float_pointwise(in);
}

#define DLA_INSTANTIATE(T)                                         \
  template bool forms_on_load(const Inputs<T>&, Arithmetic, bool); \
  template bool forms_dz_on_load(const Inputs<T>&, Arithmetic);    \
  template bool goes_through(const Inputs<T>&, Arithmetic);        \
  template Arithmetic arithmetic_of(const Inputs<T>&, bool);       \
  template ProductOf<T> product_of(const Inputs<T>&, Arithmetic);

DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(c10::BFloat16)
DLA_INSTANTIATE(c10::Half)

}  // namespace dla_fast::cpu
