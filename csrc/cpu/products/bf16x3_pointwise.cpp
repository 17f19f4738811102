// Forward of the 1x1 product of floats in bfloat16 instructions. K = sum of the inputs' channels, N = output channels.
//
// The weight is split once a call, or where it is packed (6KN bytes), the pixels tile by tile (6K bytes a pixel, in
// cache); with few pixels the other way about.

#include "bf16x3_pointwise.h"

namespace dla_fast::cpu {
namespace {

std::vector<int64_t> steps_of(const Inputs<float>& in) {
  std::vector<int64_t> steps = {0};
  for (const Input<float>& x : in.xs) steps.push_back(steps.back() + divide_up(x.channels, kBf16Step));
  return steps;
}

}  // namespace

PixelTiles::PixelTiles(const Inputs<float>& in, int64_t most, int64_t unit, int64_t shares)
    : images(in.channels_last ? 1 : in.images),
      pixels(in.channels_last ? in.total() : in.pixels()),
      channels_last(in.channels_last) {
  const int64_t wanted = round_up(divide_up(pixels, most), divide_up(shares, images));
  size = round_up(divide_up(pixels, wanted), unit);
  per_image = divide_up(pixels, size);
}

namespace {

constexpr int64_t kMostPixels = 128;

// With its part of the weight a tile fits a second-level cache; the last ones of a call keep every thread busy.
int64_t most_pixels(const Inputs<float>& in, int64_t steps, bool few) {
  constexpr int64_t bytes = 768 * 1024, least = 64;
  if (few) return kMostPixels;
  const int64_t fitting = bytes / (std::max<int64_t>(steps, 1) * kBf16x3Step / kBf16Block * 2);
  const int64_t balanced = divide_up(in.total(), 8 * thread_count());
  return std::clamp(std::min(fitting, balanced), least, kMostPixels) / kBf16Block * kBf16Block;
}

}  // namespace

Bf16x3Pointwise::Bf16x3Pointwise(const Inputs<float>& in, const Bf16x3Kernels& kernels)
    : in_(in),
      kernels_(kernels),
      steps_(steps_of(in)),
      stride_(Bf16x3Side::stride_of(steps_.back())),
      few_(in.total() <= 2 * kMostPixels),
      tiles_(in, most_pixels(in, steps_.back(), few_), kBf16Block) {}

int64_t Bf16x3Pointwise::packed_bytes() const {
  return Bf16x3Side::values(in_.out_channels, steps_.back()) * static_cast<int64_t>(sizeof(c10::BFloat16));
}

void Bf16x3Pointwise::pack(void* to) const {
  const int64_t inputs = in_.count(), panels = divide_up(in_.out_channels, kPanel);
  const Bf16x3Side weight = {static_cast<c10::BFloat16*>(to), stride_};
  parallel(panels * inputs, kPanel * in_.in_channels / inputs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i / inputs * kPanel;
      split_weight(channel, i % inputs, weight.at(channel / kBf16Block, 0));
    }
  });
}

void Bf16x3Pointwise::forward(float* out, Epilogue<float> epilogue) const {
  // What the other side meets but a few times is split by whoever multiplies it, straight into cache.
  if (few_) {
    by_panels(out, epilogue);
  } else {
    by_tiles(out, epilogue);
  }
}

// A panel of output channels.
void Bf16x3Pointwise::split_weight(int64_t channel, int64_t input, Bf16x3Side to) const {
  const auto split = in_.channels_last ? kernels_.right_transposed : kernels_.left;
  split({in_.weight + channel * in_.in_channels + in_.xs[input].offset, in_.in_channels},
        std::min(kPanel, in_.out_channels - channel), in_.xs[input].channels, to.at(0, steps_[input]));
}

void Bf16x3Pointwise::split_pixels(int64_t tile, int64_t input, Bf16x3Side to) const {
  const int64_t channels = in_.xs[input].channels;
  const auto split = in_.channels_last ? kernels_.left : kernels_.right;
  split(tiles_.in_map(in_.xs[input].data, channels, tiles_[tile]), tiles_[tile].count, channels,
        to.at(0, steps_[input]));
}

void Bf16x3Pointwise::piece(int64_t tile, int64_t channel, Bf16x3Side pixels, Bf16x3Side weight, float* scratch,
                            Ahead* ahead, float* out, Epilogue<float> epilogue) const {
  const PixelTiles::Tile at = tiles_[tile];
  const int64_t first = in_.at(in_.out_channels, at.image, at.pixel, channel);
  const Shape shape = tiles_.shape(at, std::min(kPanel, in_.out_channels - channel));
  const Strided<float> to = out == nullptr ? Strided<float>{scratch, in_.channels_last ? kPanel : tiles_.size}
                                           : Strided<float>{out + first, in_.ld(in_.out_channels)};
  const auto [left, right] = in_.channels_last ? std::pair(pixels, weight) : std::pair(weight, pixels);
  kernels_.gemm({shape.rows, shape.cols, steps_.back(), left, right, to.data, to.ld, false, ahead});
  epilogue({shape, tile, channel, first}, Strided<const float>{to.data, to.ld});
}

void Bf16x3Pointwise::by_tiles(float* out, Epilogue<float> epilogue) const {
  const int64_t depth = in_.in_channels, n = in_.out_channels;
  const int64_t inputs = in_.count(), panels = divide_up(n, kPanel);
  const PackedWeight<c10::BFloat16> weight_parts(*this, in_);
  const Bf16x3Side weight_side = {const_cast<c10::BFloat16*>(weight_parts.get()), stride_};
  const Tasks tasks(tiles_.count(), panels);
  parallel_queue(tasks.count, tiles_.size * depth * divide_up(n, tasks.groups) / 32, [&](const Take& take) {
    const Bf16Thread thread(kernels_.thread);
    const Scratch<c10::BFloat16> pixel_parts(Bf16x3Side::values(tiles_.size, steps_.back()));
    const Scratch<float> z(tiles_.size * kPanel);
    const Bf16x3Side pixels = {pixel_parts.get(), stride_};
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = tasks.tile(task);
      for (int64_t i = 0; i < inputs; ++i) split_pixels(tile, i, pixels);
      for (int64_t panel = tasks.begin(task); panel < tasks.end(task); ++panel) {
        // The next tile comes into the cache meanwhile, an input at a time.
        const int64_t input = panel - tasks.begin(task), channel = panel * kPanel;
        Ahead ahead;
        if (input < inputs && tile + 1 < tiles_.count()) {
          const int64_t channels = in_.xs[input].channels;
          ahead = tiles_.ahead(in_.xs[input].data, channels, tiles_[tile + 1], 0, channels);
        }
        piece(tile, channel, pixels, weight_side.at(channel / kBf16Block, 0), z.get(), &ahead, out, epilogue);
      }
    }
  });
}

void Bf16x3Pointwise::by_panels(float* out, Epilogue<float> epilogue) const {
  const int64_t depth = in_.in_channels, inputs = in_.count();
  const int64_t tile_values = Bf16x3Side::values(tiles_.size, steps_.back());
  const Scratch<c10::BFloat16> pixel_parts(tiles_.count() * tile_values);
  const auto pixels = [&](int64_t tile) { return Bf16x3Side{pixel_parts.get() + tile * tile_values, stride_}; };
  parallel(tiles_.count() * inputs, tiles_.size * depth / inputs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) split_pixels(i / inputs, i % inputs, pixels(i / inputs));
  });
  const Tasks tasks(divide_up(in_.out_channels, kPanel), tiles_.count());
  parallel_queue(tasks.count, in_.total() / tasks.groups * depth * kPanel / 32, [&](const Take& take) {
    const Bf16Thread thread(kernels_.thread);
    const bool kept = in_.packed != nullptr;
    const Scratch<c10::BFloat16> weight_parts(kept ? 0 : Bf16x3Side::values(kPanel, steps_.back()));
    const Scratch<float> z(tiles_.size * kPanel);
    Bf16x3Side weight_side = {weight_parts.get(), stride_};
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t channel = tasks.tile(task) * kPanel;
      if (kept) {
        const Bf16x3Side all = {static_cast<c10::BFloat16*>(const_cast<void*>(in_.packed)), stride_};
        weight_side = all.at(channel / kBf16Block, 0);
      }
      for (int64_t i = 0; !kept && i < inputs; ++i) split_weight(channel, i, weight_side);
      for (int64_t tile = tasks.begin(task); tile < tasks.end(task); ++tile) {
        piece(tile, channel, pixels(tile), weight_side, z.get(), nullptr, out, epilogue);
      }
    }
  });
}

ProductOf<float> bf16x3_pointwise(const Inputs<float>& in) {
  return std::make_unique<Bf16x3Pointwise>(in, *bf16x3_kernels());
}

bool bf16x3_pays(const Inputs<float>& in) {
  // What it costs to split a value must pay on every side, and inputs of few channels fill their steps with zeros
  // (measured on a Xeon with AMX: 64 to 64 channels of a 1x1 kernel break even, 32 to 64 lose a tenth).
  constexpr int64_t least = 48, products = 64 * 64;
  if (std::min(in.in_channels, in.out_channels) < least || in.in_channels * in.out_channels < products) return false;
  const bool winograd = in.kernel == 3 && in.stride == 1 && in.dilation == 1;
  const int64_t steps = winograd ? divide_up(in.in_channels, kBf16Step) : steps_of(in).back();
  return 2 * steps * kBf16Step <= 3 * in.in_channels;
}

}  // namespace dla_fast::cpu
