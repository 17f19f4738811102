// Launch of the aggregation node's kernel.

#include "aggregate_kernels.h"
#include "dispatch.h"

namespace dla_fast::cuda {

void aggregate_inference(const Stream& stream, const Map& out, const Norm& norm, const Inputs& xs, const void* weight,
                         Vector conv_bias, bool residual, bool aligned, void* y) {
  if (out.values() == 0) return;
  NodeShape shape{out.images, out.pixels, out.channels, 0};
  const int wide = static_cast<int>(16 / size_of(out.type));
  bool fits = aligned && (out.channels_last || out.pixels % 4 == 0);
  for (int i = 0; i < xs.count; ++i) {
    shape.depth += xs.channels[i];
    // Rows of the weight start at multiples of the depth, and those of an input at multiples of its channels.
    fits = fits && xs.channels[i] % wide == 0;
  }
  const dim3 grid = grid_of(out.images * divide_up(out.pixels, kTile), divide_up(out.channels, kTile));
  with_type(out.type, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 8) {
      throw std::runtime_error("dla_fast: no CUDA kernel of aggregate_inference for float64");
    } else {
      with_bool(out.channels_last, [&](auto cl) {
        with_bool(fits, [&](auto fit) {
          DLA_LAUNCH((aggregate_inference_kernel<T, cl.value, fit.value>), grid, kThreads, 0, stream, shape, norm, xs,
                     static_cast<const T*>(weight), conv_bias, residual, static_cast<T*>(y));
        });
      });
    }
  });
  check_launch("aggregate_inference_kernel");
}

}  // namespace dla_fast::cuda
