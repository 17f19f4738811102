// The launchers of the CUDA kernels: plain C++, so that what includes torch compiles apart from what nvcc compiles.
//
// Every launcher puts its kernels on the given stream of the current device and returns; a launch that fails throws
// std::runtime_error. Pointers are to device memory. Maps are (images, channels, pixels) contiguous or (images, pixels,
// channels) channels_last; offsets are 64-bit.

#pragma once

#include <cstdint>

namespace dla_fast::cuda {

enum class Type : int { kDouble, kFloat, kHalf, kBFloat16 };
// kAsk is no activation: a kernel compiled for it looks at what the call says.
enum class Act : int { kIdentity, kRelu, kLeakyRelu, kSilu, kHardswish, kAsk };

inline int64_t size_of(Type type) {
  return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
}

constexpr int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// A vector with a value per channel; null where the call has none.
struct Vector {
  const void* data = nullptr;
  Type type = Type::kFloat;
};

struct MutableVector {
  void* data = nullptr;
  Type type = Type::kFloat;
};

// y = act((z - mean) * gamma / sqrt(var + eps) + beta + residual). The vectors may be of any type each.
struct Norm {
  Vector mean, var, gamma, beta;
  double eps;
  Act act;
  double slope;
};

struct Map {
  Type type;
  bool channels_last;
  int64_t images, channels, pixels;

  int64_t values() const { return images * channels * pixels; }
  int64_t per_channel() const { return images * pixels; }
};

// Where the kernels run: a stream of the current device, and how many multiprocessors that has.
struct Stream {
  void* handle;
  int processors;
};

// The current device's compute capability, as 90 for 9.0.
int architecture();
int processors();

// How a pass over a map is cut into blocks: a group of `size` vectors of `width` values of each channel (pixels of
// channels_last maps, runs of pixels of contiguous ones). A reduction leaves one partial result per group and channel.
struct Groups {
  int width;
  int64_t count, size;
};

// `aligned`: every pointer of the pass is a multiple of 16 bytes. `act`: what the pass applies.
Groups groups_of(const Map& map, const Stream& stream, bool aligned, Act act = Act::kIdentity);

// mean and var (the biased variance) in the accumulation type; partial: 2 x groups x channels doubles. The running
// statistics move by `momentum` towards the batch's; bias is added to what the running mean moves towards.
void moments(const Stream& stream, const Map& map, const Groups& groups, const void* z, double* partial, void* mean,
             void* var, MutableVector running_mean, MutableVector running_var, double momentum);

void tail(const Stream& stream, const Map& map, const Groups& groups, const Norm& norm, const void* z,
          const void* residual, void* y);

// sum_dy = sum(g) and sum_dy_xhat = sum(g * x_hat), g the gradient before the activation; partial as above.
void tail_backward_reduce(const Stream& stream, const Map& map, const Groups& groups, const Norm& norm, const void* dy,
                          const void* z, const void* residual, double* partial, void* sum_dy, void* sum_dy_xhat);

// dz, and g as the residual's gradient where du is not null. Null sums stand for frozen statistics.
void tail_backward_apply(const Stream& stream, const Map& map, const Groups& groups, const Norm& norm, const void* dy,
                         const void* z, const void* residual, Vector sum_dy, Vector sum_dy_xhat, double inverse_count,
                         void* dz, void* du);

// Depthwise transposed convolution: kernel 2f, stride f, padding f / 2.
struct Upsampling {
  Type type;
  bool channels_last, aligned;
  int64_t images, channels, height, width, factor;

  int64_t large(int64_t side) const { return (side - 1) * factor - 2 * (factor / 2) + 2 * factor; }
  int64_t taps() const { return 4 * factor * factor; }
};

// y = upsample(x) + skip; skip may be null.
void upsample(const Stream& stream, const Upsampling& up, const void* x, const void* weight, const void* skip, void* y);

// Blocks whose sums of the weight's gradient are added up afterwards: partial holds blocks x channels x taps values of
// the accumulation type. 0 where the pass needs none.
int64_t upsample_backward_blocks(const Stream& stream, const Upsampling& up);

// dx and dweight, either may be null.
void upsample_backward(const Stream& stream, const Upsampling& up, const void* dy, const void* x, const void* weight,
                       void* partial, void* dx, void* dweight);

constexpr int kMaxInputs = 8;

// Pointers of the inputs and their channels, passed to the kernel by value.
struct Inputs {
  const void* data[kMaxInputs];
  int channels[kMaxInputs];
  int count;
};

// y = act(BN(sum of W_i x_i) + x_0); weight is (out_channels, sum of channels). float is multiplied as TF32.
void aggregate_inference(const Stream& stream, const Map& out, const Norm& norm, const Inputs& xs, const void* weight,
                         Vector conv_bias, bool residual, bool aligned, void* y);

}  // namespace dla_fast::cuda
