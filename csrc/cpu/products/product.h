// A product of a node: z = sum_i W_i x_i with a kernel of any odd size, and its gradients, in one arithmetic. Without
// torch.
//
// A new product is a file beside those that are here, and a line in product.cpp, which picks one.

#pragma once

#include <c10/util/FunctionRef.h>

#include <memory>
#include <vector>

#include "../shared/norm.h"
#include "../shared/scratch.h"

namespace dla_fast::cpu {

// One input: a dense map, in the layout of all of them.
template <class T>
struct Input {
  const T* data;
  int64_t channels, offset;  // offset: of its channels in the weight
  int64_t height, width;
  int64_t factor = 1;            // what it is upsampled by on the way
  const T* up_weight = nullptr;  // [channels][2f][2f], where that is not 1
  // Where data is z of the unit before: what is multiplied is formed of it on load (forms_on_load).
  const Ending<T>* ending = nullptr;
  // Where data is null: what forms it on load, as the gradient of z.
  const TailGradient<T>* gradient = nullptr;
};

// The inputs and the weight of a node. Products of a 1x1 kernel know no stride and no dilation: they are given the
// pixels that it takes.
template <class T>
struct Inputs {
  bool channels_last;
  int64_t images, height, width;  // of the output
  int64_t in_channels, out_channels, kernel;
  std::vector<Input<T>> xs;
  const T* weight;  // [out][in] and of a larger kernel [k][k] behind that, or between the two where taps_first
  bool taps_first;
  int64_t stride = 1, dilation = 1;
  const void* packed = nullptr;  // the weight as Product::pack left it, where that was done before

  int64_t taps() const { return kernel * kernel; }
  int64_t pixels() const { return height * width; }
  int64_t total() const { return images * height * width; }
  int64_t count() const { return static_cast<int64_t>(xs.size()); }
  // Where a pixel's channel lies in a map of so many channels, and how far apart its rows are.
  int64_t at(int64_t channels, int64_t image, int64_t pixel, int64_t channel) const {
    return channels_last ? (image * pixels() + pixel) * channels + channel
                         : (image * channels + channel) * pixels() + pixel;
  }
  int64_t ld(int64_t channels) const { return channels_last ? channels : pixels(); }
};

// A piece of z, in cache: where its first value lies in the output, and its group. Those of a group hold the same
// pixels, and moments are taken group by group.
struct Piece {
  Shape shape;
  int64_t group, channel, at;
};

// Called with every piece of z and its values.
template <class A>
using Epilogue = c10::function_ref<void(const Piece&, Strided<const A>)>;

// The input whose gradient is to go on through the ending of the unit before: dx is dy', and its sums are taken.
template <class T>
struct Through {
  int64_t input;
  const Ending<T>& ending;
  acc_t<T>*sum_dy, *sum_dy_xhat;  // of dy' and of dy' * x_hat, a value a channel
};

// What a backward is given, and where its results go: null for what is not needed.
template <class T>
struct Gradient {
  const TailGradient<T>& tail;
  int64_t residual_input;  // whose gradient is that of what is activated besides, or -1
  std::vector<T*> dx;      // at the size of the output
  T* dw;                   // laid out like the weight
  T* dresidual;
  // For products that do not form dz themselves: dz (null where they form_dz_on_load) and, where there is a residual
  // input, du; the inputs at the size of the output, where dw is needed.
  const T *dz = nullptr, *du = nullptr;
  std::vector<const T*> full = {};
  const Through<T>* through = nullptr;  // where the product goes_through()
  const T* carried = nullptr;           // what is added to dx[0], of products that say so

  // What dz is formed by on load, or null.
  const TailGradient<T>* dz_on_load() const { return dz == nullptr ? &tail : nullptr; }
  bool any_dx() const {
    for (const T* d : dx) {
      if (d != nullptr) return true;
    }
    return false;
  }
  // Whether input i takes du.
  bool adds(int64_t i) const { return i == residual_input; }
  // Whether du is wanted at all.
  bool wants_du() const { return dresidual != nullptr || (residual_input >= 0 && dx[residual_input] != nullptr); }
};

template <class T>
class Product {
 public:
  using A = acc_t<T>;

  virtual ~Product() = default;
  // The weight as forward reads it, which a caller may keep: how much memory it takes, 64-byte aligned and zeroed; and
  // into that. Nothing where forward takes the weight as it is.
  virtual int64_t packed_bytes() const { return 0; }
  virtual void pack(void* /*to*/) const {}
  // Whether sums are those of the values themselves. Of values that are transformed or multiplied in parts they are
  // not: infinity turns into NaN, and what is not finite may reach taps that no pixel takes.
  virtual bool plain() const { return true; }
  // Groups that pieces fall into.
  virtual int64_t groups() const = 0;
  // Whether z is better written to its place in the output also where the tail follows.
  virtual bool in_place() const { return false; }
  // Where `out` is not null a product may write z there, and calls epilogue with that memory.
  virtual void forward(A* out, Epilogue<A> epilogue) const = 0;
  // y = act((z - center) * scale + shift + residual), of a product that finishes its sums in registers; else false, and
  // nothing is done.
  virtual bool infer(const Norm<A>& /*norm*/, const T* /*residual*/, T* /*y*/) const { return false; }
  // Whether backward forms dz itself, in cache.
  virtual bool forms_dz() const = 0;
  // Whether one that does adds what is carried; others are given that as du.
  virtual bool adds_carried() const { return false; }
  virtual void backward(const Gradient<T>& gradient) const = 0;
};

template <class T>
using ProductOf = std::unique_ptr<Product<T>>;

// A weight that forward reads: the one that was packed before, or one packed for this call.
template <class V>
class PackedWeight {
  static constexpr int64_t kWidest = 64;  // output channels of a panel: fewer leave some of it to be zeroed

 public:
  template <class T>
  PackedWeight(const Product<T>& product, const Inputs<T>& in)
      : made_(in.packed == nullptr ? product.packed_bytes() / static_cast<int64_t>(sizeof(V)) : 0,
              in.out_channels % kWidest != 0),
        data_(static_cast<const V*>(in.packed)) {
    if (data_ == nullptr) {
      product.pack(made_.get());
      data_ = made_.get();
    }
  }
  const V* get() const { return data_; }

 private:
  Scratch<V> made_;
  const V* data_;
};

// The ways to multiply there are. Those of a name serve one layout of the tensors, or both.
enum class Arithmetic : int {
  float_pointwise,
  few_pixels,
  winograd,
  direct,
  bf16_pointwise,
  bf16_convolution,
  bf16x3_pointwise,
  bf16x3_winograd,
  bf16x3_direct,
  bf16_direct
};

// Whether its products form inputs on load: those of contiguous maps that are turned into rows of channels, without a
// residual, which would have to be turned beside them.
template <class T>
bool forms_on_load(const Inputs<T>& in, Arithmetic arithmetic, bool residual);
// Whether they form dz on load, and no map of it is needed; where that is the faster way.
template <class T>
bool forms_dz_on_load(const Inputs<T>& in, Arithmetic arithmetic);
// Whether they take gradients through what inputs are formed by.
template <class T>
bool goes_through(const Inputs<T>& in, Arithmetic arithmetic);

// The one that serves a node on this processor. kept: its weight is packed once for many calls.
template <class T>
Arithmetic arithmetic_of(const Inputs<T>& in, bool kept);

// A product of a node. `in` has to outlive it, and neither pixels nor output channels may be zero.
template <class T>
ProductOf<T> product_of(const Inputs<T>& in, Arithmetic arithmetic);

template <class T>
ProductOf<T> float_pointwise(const Inputs<T>& in);
// Of float and double; null for the others.
template <class T>
ProductOf<T> few_pixels(const Inputs<T>& in);
template <class T>
ProductOf<T> winograd(const Inputs<T>& in);
template <class T>
ProductOf<T> direct(const Inputs<T>& in);
// Null where the processor has no such instructions.
ProductOf<c10::BFloat16> bf16_pointwise(const Inputs<c10::BFloat16>& in);
ProductOf<c10::BFloat16> bf16_convolution(const Inputs<c10::BFloat16>& in);
// Of maps that are not upsampled, channels_last, where the instruction set is avx512_bf16.
ProductOf<c10::BFloat16> bf16_direct(const Inputs<c10::BFloat16>& in);
ProductOf<float> bf16x3_pointwise(const Inputs<float>& in);
ProductOf<float> bf16x3_winograd(const Inputs<float>& in);
ProductOf<float> bf16x3_direct(const Inputs<float>& in);

// Whether few_pixels is the faster way to a 1x1 product whose weight serves one call.
template <class T>
bool few_pixels_pay(const Inputs<T>& in);

// Whether products in bfloat16 parts are the faster way, where the processor has them.
bool bf16x3_pays(const Inputs<float>& in);

}  // namespace dla_fast::cpu
