// The IDA node, CPU. K = sum of the inputs' channels, N = output channels.
//
// Per output pixel: inference reads K (an input that is upsampled on the way counts C / f^2) and writes N; the training
// stage the same, and the tail moves 2N more; 18KN flops for a 3x3 kernel. A task takes a tile of output rows: the
// patches of the inputs that it needs are gathered (or upsampled) into scratch memory with their halo, one product per
// input and kernel row accumulates into z, and the tail or the moments follow while it is in cache. So neither the
// concat nor the upsampled map exists.

#include "merge.h"

#include <algorithm>
#include <array>

#include "aggregate.h"
#include "upsample.h"

namespace dla_fast::cpu {

MergeInputs::MergeInputs(at::TensorList inputs, at::TensorList up_weights, at::IntArrayRef factors_in,
                         const Tensor& weight)
    : channels_last(is_channels_last(weight)), out_channels(weight.size(0)), factors(factors_in.vec()) {
  TORCH_CHECK_VALUE(!inputs.empty() && inputs.size() == factors.size(), "xs: expected one factor per input");
  bool all = true;
  for (const Tensor& x : inputs) all = all && is_channels_last(x);
  channels_last = channels_last || all;
  images = inputs[0].size(0);
  height = factors[0] > 1 ? upsampled(inputs[0].size(2), factors[0]) : inputs[0].size(2);
  width = factors[0] > 1 ? upsampled(inputs[0].size(3), factors[0]) : inputs[0].size(3);
  in_channels = 0;
  size_t up = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    xs.push_back(inputs[i].contiguous(format_of(channels_last)));
    offsets.push_back(in_channels);
    in_channels += inputs[i].size(1);
    TORCH_CHECK_VALUE(factors[i] == 1 || up < up_weights.size(), "up_weights: expected one per upsampled input");
    ups.push_back(factors[i] > 1 ? up_weights[up++] : Tensor());
  }
  TORCH_CHECK_VALUE(in_channels == weight.size(1), "weight: expected ", in_channels, " input channels, got ",
                    weight.size(1));
}

Tensor MergeInputs::full(size_t i) const {
  return factors[i] > 1 ? upsample(xs[i], ups[i], factors[i]) : xs[i];
}

std::vector<Tensor> MergeInputs::all_full() const {
  std::vector<Tensor> out;
  for (size_t i = 0; i < xs.size(); ++i) out.push_back(full(i));
  return out;
}

Tensor MergeInputs::output(const Tensor& weight) const {
  return at::empty({images, out_channels, height, width}, weight.options().memory_format(format_of(channels_last)));
}

namespace {

constexpr int64_t kTaps = 3;
constexpr int64_t kOutBlock = 96;  // output channels of a contiguous tile

// Tiles of rows x cols output pixels; every output row of a tile is a group of the moments.
struct Tiles {
  int64_t cols, chunks, rows, row_blocks, panels, groups, images;

  Tiles(const MergeInputs& in) : images(in.images) {
    const int64_t widest = in.channels_last ? 48 : kPanel, threads = at::get_num_threads();
    chunks = divide_up(in.width, widest);
    cols = in.channels_last ? std::min(round_up(divide_up(in.width, chunks), 6), widest) : widest;
    chunks = divide_up(in.width, cols);
    constexpr int64_t patch = 1 << 17;  // values, of all inputs together
    rows = std::clamp<int64_t>(patch / ((cols + 2) * std::max<int64_t>(in.in_channels, 1)) - 2, 1, 8);
    rows = std::clamp<int64_t>(images * in.height * chunks / (4 * threads), 1, rows);
    row_blocks = divide_up(in.height, rows);
    panels = divide_up(in.out_channels, in.channels_last ? kPanel : kOutBlock);
    groups = std::clamp<int64_t>(divide_up(2 * threads, images * row_blocks * chunks), 1, panels);
  }
  int64_t count() const { return images * row_blocks * chunks * groups; }
};

template <class T>
class Forward {
  using A = acc_t<T>;

 public:
  Forward(const MergeInputs& in, const Tensor& weight)
      : in_(in),
        tiles_(in),
        packed_(in.channels_last ? tiles_.panels * kTaps * kTaps * in.in_channels * kPanel : 0,
                in.out_channels % kPanel != 0) {
    const auto type = c10::CppTypeToScalarType<A>::value;
    if (in.channels_last) {
      // Per panel of output channels, input and tap: [C_i][kPanel].
      const Tensor w = weight.permute({2, 3, 1, 0}).to(type).contiguous();
      const A* from = w.const_data_ptr<A>();
      const int64_t n = in.out_channels, depth = in.in_channels;
      parallel(tiles_.panels * kTaps * kTaps, depth * kPanel, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t panel = task / (kTaps * kTaps), tap = task % (kTaps * kTaps);
          for (size_t i = 0; i < in.xs.size(); ++i) {
            const int64_t channels = in.xs[i].size(1);
            kernels<A>().load({from + (tap * depth + in.offsets[i]) * n + panel * kPanel, n},
                              {packed(panel, i, tap), kPanel}, channels, std::min(kPanel, n - panel * kPanel));
          }
        }
      });
    } else {
      flat_ = weight.permute({2, 3, 0, 1}).to(type).contiguous();
    }
    for (size_t i = 0; i < in.xs.size(); ++i) {
      ups_.push_back(in.factors[i] > 1 ? pack_up_weight<T, A>(in.ups[i], in.factors[i], in.channels_last)
                                       : Scratch<A>(0));
    }
  }

  // Calls epilogue(shape, moment group, offset in the output, channel, z) for every row of every tile of z, which lies
  // where target(offset, channel, scratch) says.
  template <class Target, class Epilogue>
  void run(const Target& target, const Epilogue& epilogue) const {
    const int64_t depth = in_.in_channels, rows = tiles_.rows, cols = tiles_.cols;
    const int64_t ld = in_.channels_last ? cols + 2 : round_up(cols + 2, 16);
    const int64_t cost = rows * cols * kTaps * kTaps * depth * divide_up(in_.out_channels, tiles_.groups) / 16;
    parallel_queue(tiles_.count(), cost, [&](const auto& take) {
      const Scratch<A> patch(depth * (rows + 2) * ld, true), z(std::max(rows, kOutBlock) * kPanel * cols);
      std::vector<Work> work;
      for (size_t i = 0; i < in_.xs.size(); ++i) work.emplace_back(in_, i);
      for (int64_t task = take(); task >= 0; task = take()) {
        const int64_t group = task % tiles_.groups, tile = task / tiles_.groups;
        const int64_t w0 = tile % tiles_.chunks * cols, h0 = tile / tiles_.chunks % tiles_.row_blocks * rows;
        const int64_t image = tile / tiles_.chunks / tiles_.row_blocks;
        const int64_t h_count = std::min(rows, in_.height - h0), w_count = std::min(cols, in_.width - w0);
        for (size_t i = 0; i < in_.xs.size(); ++i) {
          gather(i, image, h0, w0, h_count, w_count, ld, patch.get() + in_.offsets[i] * (rows + 2) * ld, work[i]);
        }
        const int64_t last = tiles_.panels * (group + 1) / tiles_.groups;
        for (int64_t panel = tiles_.panels * group / tiles_.groups; panel < last; ++panel) {
          const int64_t width = in_.channels_last ? kPanel : kOutBlock, channel = panel * width;
          const int64_t channels = std::min(width, in_.out_channels - channel);
          const auto place = [&](int64_t r) {
            return target(offset(image, h0 + r, w0, channel),
                          Strided<A>{z.get() + r * width * cols, in_.channels_last ? kPanel : cols});
          };
          for (size_t i = 0; i < in_.xs.size(); ++i) {
            for (int64_t dy = 0; dy < kTaps; ++dy) {
              for (int64_t r = 0; r < h_count; ++r) {
                product(patch.get() + in_.offsets[i] * (rows + 2) * ld, ld, i, dy, r, panel, channels, w_count,
                        place(r), i > 0 || dy > 0);
              }
            }
          }
          for (int64_t r = 0; r < h_count; ++r) {
            const Strided<A> at = place(r);
            const Shape shape = in_.channels_last ? Shape{w_count, channels, false} : Shape{channels, w_count, true};
            const int64_t moment_group = (image * in_.height + h0 + r) * tiles_.chunks + w0 / cols;
            epilogue(shape, moment_group, offset(image, h0 + r, w0, channel), channel,
                     Strided<const A>{at.data, at.ld});
          }
        }
      }
    });
  }

  int64_t moment_groups() const { return in_.images * in_.height * tiles_.chunks; }
  int64_t ld() const { return in_.channels_last ? in_.out_channels : in_.height * in_.width; }

 private:
  // Widened rows of one input, and what its upsampling needs.
  struct Work {
    Scratch<A> near, far, scratch;
    Work(const MergeInputs& in, size_t i)
        : near(row(in, i)),
          far(row(in, i)),
          scratch(in.factors[i] == 1 ? 0
                  : in.channels_last ? in.xs[i].size(1)
                                     : plane_scratch(in.xs[i].size(3), in.factors[i]),
                  true) {}
    static int64_t row(const MergeInputs& in, size_t i) {
      if (in.factors[i] == 1 || std::is_same_v<T, A>) return 0;
      return in.xs[i].size(3) * (in.channels_last ? in.xs[i].size(1) : 1);
    }
  };

  A* packed(int64_t panel, size_t i, int64_t tap) const {
    const int64_t channels = in_.xs[i].size(1);
    return packed_.get() +
           (panel * kTaps * kTaps * in_.in_channels + kTaps * kTaps * in_.offsets[i] + tap * channels) * kPanel;
  }

  int64_t offset(int64_t image, int64_t h, int64_t w, int64_t channel) const {
    const int64_t pixel = h * in_.width + w, pixels = in_.height * in_.width;
    return in_.channels_last ? (image * pixels + pixel) * in_.out_channels + channel
                             : (image * in_.out_channels + channel) * pixels + pixel;
  }

  // Rows h0 - 1 .. h0 + h_count and columns w0 - 1 .. w0 + w_count of input i, zero outside the map:
  // [row][column][channel], or [channel][row][column].
  void gather(size_t i, int64_t image, int64_t h0, int64_t w0, int64_t h_count, int64_t w_count, int64_t ld, A* patch,
              const Work& work) const {
    const int64_t channels = in_.xs[i].size(1), depth = in_.channels_last ? channels : 1;
    const int64_t begin = std::max<int64_t>(w0 - 1, 0), end = std::min(w0 + w_count + 1, in_.width);
    for (int64_t plane = 0; plane < channels / depth; ++plane) {
      for (int64_t r = 0; r < h_count + 2; ++r) {
        const int64_t h = h0 - 1 + r;
        A* to = patch + (plane * (tiles_.rows + 2) + r) * ld * depth;
        if (h < 0 || h >= in_.height) {
          std::fill_n(to, (w_count + 2) * depth, A(0));
          continue;
        }
        std::fill_n(to, (begin - (w0 - 1)) * depth, A(0));
        std::fill_n(to + (end - (w0 - 1)) * depth, (w0 + w_count + 1 - end) * depth, A(0));
        fill_row(i, in_.channels_last ? image : image * channels + plane, plane, h, begin, end, depth,
                 to + (begin - (w0 - 1)) * depth, work);
      }
    }
  }

  void fill_row(size_t i, int64_t plane, int64_t channel, int64_t h, int64_t begin, int64_t end, int64_t depth, A* to,
                const Work& work) const {
    const T* x = in_.xs[i].template const_data_ptr<T>();
    const int64_t f = in_.factors[i], height = in_.xs[i].size(2), width = in_.xs[i].size(3), row = width * depth;
    if (f == 1) {
      const int64_t values = (end - begin) * depth;
      kernels<T>().load({x + (plane * height + h) * row + begin * depth, values}, {to, values}, 1, values);
      return;
    }
    const int64_t source = (h + f / 2) / f, ky = (h + f / 2) % f;
    const A* taps = ups_[i].get() + (in_.channels_last ? 0 : channel * 4 * f * f);
    const T* image = x + plane * height * row;
    UpRow<A> u = {};
    u.near = row_of<T, A>(source < height ? image + source * row : nullptr, row, work.near.get());
    u.far = row_of<T, A>(source > 0 ? image + (source - 1) * row : nullptr, row, work.far.get());
    u.weight_near = taps + ky * 2 * f * depth;
    u.weight_far = taps + (ky + f) * 2 * f * depth;
    u.out = to;
    u.width = width;
    u.channels = depth;
    u.factor = f;
    u.begin = begin;
    u.end = end;
    u.scratch = work.scratch.get();
    in_.channels_last ? kernels<T>().up_row(u) : kernels<T>().up_row_plane(u);
  }

  // Kernel row dy of input i into row r of the tile.
  void product(const A* patch, int64_t ld, size_t i, int64_t dy, int64_t r, int64_t panel, int64_t channels,
               int64_t w_count, Strided<A> z, bool add) const {
    const int64_t depth = in_.xs[i].size(1);
    std::array<Segment<A>, kTaps> segments;
    Gemm<A> g = {w_count, channels, segments.data(), kTaps, false, nullptr, kPanel, z.data, z.ld, add};
    for (int64_t dx = 0; dx < kTaps; ++dx) {
      if (in_.channels_last) {
        segments[dx] = {patch + ((r + dy) * ld + dx) * depth, depth, depth, packed(panel, i, dy * kTaps + dx)};
      } else {
        const A* w = flat_.template const_data_ptr<A>() + (dy * kTaps + dx) * in_.out_channels * in_.in_channels;
        segments[dx] = {w + panel * kOutBlock * in_.in_channels + in_.offsets[i], in_.in_channels, depth,
                        patch + (r + dy) * ld + dx};
      }
    }
    if (!in_.channels_last) {
      g.m = channels;
      g.n = w_count;
      g.ldb = (tiles_.rows + 2) * ld;
    }
    kernels<T>().gemm(g);
  }

  const MergeInputs& in_;
  Tiles tiles_;
  Scratch<A> packed_;
  Tensor flat_;
  std::vector<Scratch<A>> ups_;
};

}  // namespace

Tensor merge_inference(at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
                       const OptionalTensor& conv_bias, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                       const Tensor& running_mean, const Tensor& running_var, at::IntArrayRef factors, double eps,
                       std::string_view act, double slope) {
  const MergeInputs in(xs, up_weights, factors, weight);
  if (weight.size(2) == 1) {
    return aggregate_inference(in.all_full(), weight, conv_bias, bn_weight, bn_bias, running_mean, running_var, eps,
                               false, act, slope);
  }
  Tensor y = in.output(weight);
  if (in.empty()) return y;
  DLA_DISPATCH_FLOATING(weight.scalar_type(), "merge_inference", [&] {
    using A = acc_t<scalar_t>;
    const NormVectors<A> norm(running_mean, running_var, conv_bias, bn_weight, bn_bias, eps, act, slope);
    const Forward<scalar_t> forward(in, weight);
    scalar_t* out = y.mutable_data_ptr<scalar_t>();
    forward.run([](int64_t, Strided<A> tile) { return tile; },
                [&](const Shape& shape, int64_t, int64_t offset, int64_t channel, Strided<const A> z) {
                  kernels<scalar_t>().tail_accumulated(shape, norm.from(channel), z, {nullptr, 0},
                                                       {out + offset, forward.ld()});
                });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> merge_stage(at::TensorList xs, at::TensorList up_weights, const Tensor& weight,
                                               const OptionalTensor& conv_bias, const OptionalTensor& running_mean,
                                               const OptionalTensor& running_var, at::IntArrayRef factors,
                                               double momentum, bool moments) {
  const MergeInputs in(xs, up_weights, factors, weight);
  if (weight.size(2) == 1) {
    return aggregate_stage(in.all_full(), weight, conv_bias, running_mean, running_var, momentum, moments);
  }
  Tensor z = in.output(weight);
  const auto options = weight.options().memory_format(std::nullopt).dtype(accumulation_type(weight.scalar_type()));
  const int64_t channels = moments ? in.out_channels : 0;
  Tensor mean = at::empty({channels}, options), var = at::empty({channels}, options);
  DLA_DISPATCH_FLOATING(weight.scalar_type(), "merge_stage", [&] {
    using A = acc_t<scalar_t>;
    const auto& k = kernels<scalar_t>();
    if (in.empty()) {
      if (moments) MomentPartials<A>(0, channels).finalise(mean, var);
      return;
    }
    const Forward<scalar_t> forward(in, weight);
    MomentPartials<A> partials(moments ? forward.moment_groups() : 0, channels);
    scalar_t* out = z.mutable_data_ptr<scalar_t>();
    const auto in_place = [&](int64_t offset, auto tile) {
      if constexpr (std::is_same_v<scalar_t*, decltype(tile.data)>) tile = {out + offset, forward.ld()};
      return tile;
    };
    forward.run(in_place,
                [&](const Shape& shape, int64_t group, int64_t offset, int64_t channel, Strided<const A> acc) {
                  const Strided<scalar_t> to = {out + offset, forward.ld()};
                  if constexpr (!std::is_same_v<scalar_t, A>) k.store(acc, to, shape.rows, shape.cols);
                  if (!moments) return;
                  const int64_t at = group * channels + channel;
                  k.moments(shape, {to.data, to.ld}, &partials.mean[at], &partials.m2[at], &partials.delta[at]);
                  if (channel == 0) partials.count[group] = shape.channels_are_rows ? shape.cols : shape.rows;
                });
    if (moments) partials.finalise(mean, var);
  });
  if (moments) {
    update_running(running_mean, running_var, mean, var, conv_bias, momentum, in.images * in.height * in.width);
  }
  return {z, mean, var};
}

}  // namespace dla_fast::cpu
