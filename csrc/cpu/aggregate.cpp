// Forward of the aggregation node, CPU. K = sum of the inputs' channels, N = output channels, b bytes a value.
//
// Per pixel: inference reads K and writes N values; the training stage reads K and writes N (the tail moves 2N more);
// 2KN flops. A task takes one tile of pixels: every input is accumulated in registers into a tile of z that stays in
// cache, where the tail is applied (inference) or the moments are taken (training).

#include "aggregate.h"

#include <algorithm>

#include "aggregate_bf16.h"
#include "aggregate_bf16x3.h"

namespace dla_fast::cpu {

AggregateInputs::AggregateInputs(at::TensorList inputs, const Tensor& weight)
    : channels_last(is_channels_last(weight)), out_channels(weight.size(0)) {
  TORCH_CHECK_VALUE(!inputs.empty(), "xs: expected at least one input, got none");
  bool all = true;
  for (const Tensor& x : inputs) all = all && is_channels_last(x);
  channels_last = channels_last || all;
  images = inputs[0].size(0);
  pixels = inputs[0].size(2) * inputs[0].size(3);
  in_channels = 0;
  for (const Tensor& x : inputs) {
    xs.push_back(x.contiguous(format_of(channels_last)));
    offsets.push_back(in_channels);
    in_channels += x.size(1);
  }
  TORCH_CHECK_VALUE(in_channels == weight.size(1), "weight: expected ", in_channels, " input channels, got ",
                    weight.size(1));
}

int64_t tile_rows(int64_t total, int64_t weights) {
  // Every tile reads all weights. Those that no cache near the core holds want few and tall tiles; threads then share
  // the panels of a tile.
  constexpr int64_t tallest = 108, cached = 1 << 18;
  if (weights > cached) return std::max<int64_t>(round_up(divide_up(total, divide_up(total, tallest)), 6), 6);
  const int64_t wanted = divide_up(total, 8 * static_cast<int64_t>(at::get_num_threads()));
  return std::clamp<int64_t>(round_up(wanted, 6), 24, 96);
}

Tasks::Tasks(int64_t tiles, int64_t panels) : panels(panels) {
  const int64_t threads = at::get_num_threads();
  groups = tiles == 0 ? 1 : std::clamp<int64_t>(divide_up(4 * threads, tiles), 1, std::max<int64_t>(panels, 1));
  count = tiles * groups;
}

std::vector<int64_t> AggregateInputs::output_sizes() const {
  return {images, out_channels, xs[0].size(2), xs[0].size(3)};
}

namespace {

// The weight transposed into panels of kPanel output channels: panel j holds [K][kPanel].
template <class T, class A>
Scratch<A> pack_weight(const T* weight, int64_t out_channels, int64_t in_channels) {
  const int64_t panels = divide_up(out_channels, kPanel);
  Scratch<A> packed(panels * in_channels * kPanel, out_channels % kPanel != 0);
  const int64_t blocks = divide_up(in_channels, kPanel);
  parallel(panels * blocks, kPanel * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks * kPanel, k = i % blocks * kPanel;
      kernels<T>().load_transposed({weight + n * in_channels + k, in_channels},
                                   {packed.get() + (i / blocks * in_channels + k) * kPanel, kPanel},
                                   std::min(kPanel, out_channels - n), std::min(kPanel, in_channels - k));
    }
  });
  return packed;
}

// Calls epilogue(shape, tile, first, channel, z tile) for every tile of z = sum_i W_i x_i. The tile lies where
// target(first, channel, scratch) says: in scratch memory, or at its place in the output.
template <class T, class Target, class Epilogue>
void forward_channels_last(const AggregateInputs& in, const T* weight, const Target& target, const Epilogue& epilogue) {
  using A = acc_t<T>;
  const auto& k = kernels<T>();
  const int64_t total = in.total(), rows_max = tile_rows(total, in.in_channels * in.out_channels),
                depth = in.in_channels;
  const Tasks tasks(divide_up(total, rows_max), divide_up(in.out_channels, kPanel));
  const Scratch<A> packed = pack_weight<T, A>(weight, in.out_channels, depth);
  parallel_queue(tasks.count, rows_max * depth * divide_up(in.out_channels, tasks.groups) / 16, [&](const auto& take) {
    const Scratch<A> z(rows_max * kPanel), wide(std::is_same_v<T, A> ? 0 : rows_max * depth);
    std::vector<Segment<A>> segments(in.xs.size());
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = task / tasks.groups;
      const int64_t first = tile * rows_max, rows = std::min(rows_max, total - first);
      for (size_t i = 0; i < in.xs.size(); ++i) {
        const int64_t channels = in.xs[i].size(1);
        const T* x = in.xs[i].template const_data_ptr<T>() + first * channels;
        if constexpr (std::is_same_v<T, A>) {
          segments[i] = {x, channels, channels};
        } else {
          A* to = wide.get() + in.offsets[i];
          k.load({x, channels}, {to, depth}, rows, channels);
          segments[i] = {to, depth, channels};
        }
      }
      const int64_t panel_begin = tasks.begin(task), panel_end = tasks.end(task);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const int64_t channel = panel * kPanel, cols = std::min(kPanel, in.out_channels - channel);
        const Strided<A> to = target(first, channel, Strided<A>{z.get(), kPanel});
        const int64_t next = panel + 1 < panel_end ? panel + 1 : panel_begin;
        Ahead ahead = Ahead::of<const A>({packed.get() + next * depth * kPanel, kPanel}, depth, kPanel);
        k.gemm({rows, cols, segments.data(), static_cast<int64_t>(segments.size()), false,
                packed.get() + panel * depth * kPanel, kPanel, to.data, to.ld, false, &ahead});
        epilogue(Shape{rows, cols, false}, tile, first, channel, Strided<const A>{to.data, to.ld});
      }
    }
  });
}

// The same for contiguous tensors: a tile is kPanel pixels of one image, whose inputs are packed side by side.
template <class T, class Target, class Epilogue>
void forward_contiguous(const AggregateInputs& in, const T* weight, const Target& target, const Epilogue& epilogue) {
  using A = acc_t<T>;
  constexpr int64_t block = 96;
  const auto& k = kernels<T>();
  const int64_t depth = in.in_channels, tiles_per_image = divide_up(in.pixels, kPanel);
  const Tasks tasks(in.images * tiles_per_image, divide_up(in.out_channels, block));
  const Scratch<A> wide(std::is_same_v<T, A> ? 0 : in.out_channels * depth);
  const A* w;
  if constexpr (std::is_same_v<T, A>) {
    w = weight;
  } else {
    k.load({weight, depth}, {wide.get(), depth}, in.out_channels, depth);
    w = wide.get();
  }
  parallel_queue(tasks.count, kPanel * depth * divide_up(in.out_channels, tasks.groups) / 16, [&](const auto& take) {
    const Scratch<A> z(block * kPanel), x_panel(depth * kPanel, in.pixels % kPanel != 0);
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = task / tasks.groups;
      const int64_t image = tile / tiles_per_image, pixel = tile % tiles_per_image * kPanel;
      const int64_t cols = std::min(kPanel, in.pixels - pixel);
      for (size_t i = 0; i < in.xs.size(); ++i) {
        const int64_t channels = in.xs[i].size(1);
        const T* x = in.xs[i].template const_data_ptr<T>() + image * channels * in.pixels + pixel;
        k.load({x, in.pixels}, {x_panel.get() + in.offsets[i] * kPanel, kPanel}, channels, cols);
      }
      for (int64_t b = tasks.begin(task); b < tasks.end(task); ++b) {
        const int64_t channel = b * block, rows = std::min(block, in.out_channels - channel);
        const Segment<A> segment = {w + channel * depth, depth, depth};
        const int64_t first = image * in.out_channels * in.pixels + pixel;
        const Strided<A> to = target(first, channel, Strided<A>{z.get(), kPanel});
        k.gemm({rows, cols, &segment, 1, false, x_panel.get(), kPanel, to.data, to.ld, false});
        epilogue(Shape{rows, cols, true}, tile, first, channel, Strided<const A>{to.data, to.ld});
      }
    }
  });
}

// The bfloat16 products that serve T, or null.
template <class T>
const Bf16Kernels* units() {
  return std::is_same_v<T, c10::BFloat16> ? bf16_kernels() : nullptr;
}

// Those that serve floats in three parts, or null.
template <class T>
const Bf16x3Kernels* split_units(const AggregateInputs& in) {
  return std::is_same_v<T, float> ? bf16x3_for(in) : nullptr;
}

// How many tiles epilogue is called with.
template <class T>
int64_t tile_count(const AggregateInputs& in) {
  if (units<T>() != nullptr) return Bf16Forward(in, *units<T>()).parts();
  if (const Bf16x3Kernels* split = split_units<T>(in)) return Bf16x3Forward(in, *split).tiles();
  return in.channels_last ? divide_up(in.total(), tile_rows(in.total(), in.in_channels * in.out_channels))
                          : in.images * divide_up(in.pixels, kPanel);
}

template <class T, class Target, class Epilogue>
void forward(const AggregateInputs& in, const Tensor& weight, const Target& target, const Epilogue& epilogue) {
  if (in.total() == 0 || in.out_channels == 0) return;
  const Tensor w = weight.contiguous();
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (units<T>() != nullptr) return Bf16Forward(in, *units<T>()).run(w.const_data_ptr<T>(), epilogue);
  }
  if constexpr (std::is_same_v<T, float>) {
    if (const Bf16x3Kernels* split = split_units<T>(in)) {
      return Bf16x3Forward(in, *split).run(w.const_data_ptr<T>(), target, epilogue);
    }
  }
  if (in.channels_last) {
    forward_channels_last<T>(in, w.const_data_ptr<T>(), target, epilogue);
  } else {
    forward_contiguous<T>(in, w.const_data_ptr<T>(), target, epilogue);
  }
}

// The part of an (N, C, H, W) tensor that a tile covers; `first` is the pixel (channels_last) or the offset of the
// image plus the pixel (contiguous).
template <class T>
Strided<T> tile_of(T* data, const AggregateInputs& in, int64_t first, int64_t channel) {
  if (in.channels_last) return {data + first * in.out_channels + channel, in.out_channels};
  return {data + first + channel * in.pixels, in.pixels};
}

}  // namespace

Tensor aggregate_inference(at::TensorList xs, const Tensor& weight, const OptionalTensor& conv_bias,
                           const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const Tensor& running_mean,
                           const Tensor& running_var, double eps, bool residual, std::string_view act, double slope) {
  const AggregateInputs in(xs, weight);
  Tensor y = empty_output(in.output_sizes(), weight.options().memory_format(format_of(in.channels_last)));
  DLA_DISPATCH_FLOATING(weight.scalar_type(), "aggregate_inference", [&] {
    using A = acc_t<scalar_t>;
    const NormVectors<A> norm(running_mean, running_var, conv_bias, bn_weight, bn_bias, eps, act, slope);
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    const scalar_t* skip = residual ? in.xs[0].const_data_ptr<scalar_t>() : nullptr;
    const auto scratch = [](int64_t, int64_t, Strided<A> tile) { return tile; };
    forward<scalar_t>(
        in, weight, scratch, [&](const Shape& shape, int64_t, int64_t first, int64_t channel, Strided<const A> z) {
          const Strided<const scalar_t> r =
              residual ? tile_of(skip, in, first, channel) : Strided<const scalar_t>{nullptr, 0};
          kernels<scalar_t>().tail_accumulated(shape, norm.from(channel), z, r, tile_of(out, in, first, channel));
        });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> aggregate_stage(at::TensorList xs, const Tensor& weight,
                                                   const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var, double momentum, bool moments) {
  const AggregateInputs in(xs, weight);
  Tensor z = empty_output(in.output_sizes(), weight.options().memory_format(format_of(in.channels_last)));
  const auto options = weight.options().memory_format(std::nullopt).dtype(accumulation_type(weight.scalar_type()));
  const int64_t channels = moments ? in.out_channels : 0;
  Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  DLA_DISPATCH_FLOATING(weight.scalar_type(), "aggregate_stage", [&] {
    using A = acc_t<scalar_t>;
    const auto& k = kernels<scalar_t>();
    MomentPartials<A> partials(tile_count<scalar_t>(in), channels);
    scalar_t* out = z.mutable_data_ptr<scalar_t>();
    const auto in_place = [&](int64_t first, int64_t channel, auto tile) {
      if constexpr (std::is_same_v<scalar_t*, decltype(tile.data)>) tile = tile_of(out, in, first, channel);
      return tile;
    };
    forward<scalar_t>(in, weight, in_place,
                      [&](const Shape& shape, int64_t tile, int64_t first, int64_t channel, Strided<const A> acc) {
                        const Strided<scalar_t> to = tile_of(out, in, first, channel);
                        if constexpr (!std::is_same_v<scalar_t, A>) k.store(acc, to, shape.rows, shape.cols);
                        if (!moments) return;
                        const int64_t at = tile * channels + channel;
                        k.moments(shape, {to.data, to.ld}, &partials.mean[at], &partials.m2[at], &partials.delta[at]);
                        if (channel == 0) partials.count[tile] = shape.channels_are_rows ? shape.cols : shape.rows;
                      });
    if (moments) partials.finalise(mean, var);
  });
  if (moments) update_running(running_mean, running_var, mean, var, conv_bias, momentum, in.total());
  return {z, mean, var};
}

}  // namespace dla_fast::cpu
