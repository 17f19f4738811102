// Forward of the 1x1 product in bfloat16 instructions. K = sum of the inputs' channels, N = output channels.
//
// channels_last: z is a tile's pixels times the weight, which is packed into pairs (2KN bytes, once a call); pixels are
// read where they lie. contiguous: z is the weight times a tile's pixels, which are packed (2K bytes a pixel, in
// cache); the weight is read where it lies. What has an odd number of channels is copied, padded with zeros, first.

#include "bf16_pointwise.h"

#include <cstring>

namespace dla_fast::cpu {
namespace {

using c10::BFloat16;

// A piece of z, 32 KB: kPart pixels (a tile's last part takes a small rest along) by kPieceChannels, or the other way
// about.
constexpr int64_t kPart = 64, kPieceChannels = 128;
constexpr int64_t kPieceRows = kPart + kBf16Block;
// Bytes of x in a tile: with the part of the weight that it meets, they fit a second-level cache.
constexpr int64_t kTileBytes = 768 * 1024;
constexpr int64_t kTileColumns = 256;

void copy_padded(Strided<const BFloat16> src, Strided<BFloat16> dst, int64_t rows, int64_t cols, int64_t padded_rows) {
  const int64_t width = round_up(cols, kBf16Step);
  for (int64_t r = 0; r < padded_rows; ++r) {
    BFloat16* to = dst.data + r * dst.ld;
    const int64_t n = r < rows ? cols : 0;
    if (n > 0) std::memcpy(to, src.data + r * src.ld, n * sizeof(BFloat16));
    std::fill(to + n, to + width, BFloat16(0));
  }
}

int64_t parts_of(int64_t rows) {
  return std::max<int64_t>(1, rows / kPart + (rows % kPart >= kBf16Block ? 1 : 0));
}

}  // namespace

Bf16Pointwise::Bf16Pointwise(const Inputs<BFloat16>& in, const Bf16Kernels& kernels)
    : in_(in), kernels_(kernels), total_steps_(0) {
  for (const Input<BFloat16>& x : in.xs) {
    steps_.push_back(total_steps_);
    total_steps_ += divide_up(x.channels, kBf16Step);
  }
  steps_.push_back(total_steps_);
  const int64_t bytes = std::max<int64_t>(total_steps_, 1) * kBf16Step * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t balanced = divide_up(in.total(), 4 * thread_count());
  if (in.channels_last) {
    tile_pixels_ = round_up(std::clamp(balanced, kPart, std::max(kPart, kTileBytes / bytes)), kPart);
    tiles_ = divide_up(in.total(), tile_pixels_);
    parts_ = in.total() == 0 ? 0 : first_part(tiles_ - 1) + parts_of(in.total() - (tiles_ - 1) * tile_pixels_);
  } else {
    // Tiles of about the same size: a rest of a few pixels costs as much as a panel.
    const int64_t most = std::clamp(kTileBytes / bytes / kBf16Panel * kBf16Panel, 2 * kBf16Panel, kTileColumns);
    const int64_t wanted = std::min(most, round_up(std::max<int64_t>(balanced, 1), 2 * kBf16Panel));
    tile_pixels_ = round_up(divide_up(in.total(), std::max<int64_t>(1, divide_up(in.total(), wanted))), kBf16Panel);
    tile_pixels_ = std::max(tile_pixels_, kBf16Panel);
    tiles_ = divide_up(in.total(), tile_pixels_);
    parts_ = in.total() == 0 ? 0 : first_part(tiles_);
  }
}

// Of a contiguous tensor: every tile begins a part, and so does every image that begins inside a tile.
int64_t Bf16Pointwise::first_part(int64_t tile) const {
  if (in_.channels_last) return tile * parts_of(tile_pixels_);
  const int64_t begin = std::min(tile * tile_pixels_, in_.total());
  int64_t both = 0;  // images that begin with a tile
  for (int64_t t = 1; t < tile; ++t) both += t * tile_pixels_ % in_.pixels() == 0 ? 1 : 0;
  const int64_t images_begun = begin == 0 ? 0 : (begin - 1) / in_.pixels();
  return tile + images_begun - both;
}

void Bf16Pointwise::forward_channels_last(Epilogue<float> epilogue) const {
  const int64_t total = in_.total(), depth = in_.in_channels, threads = thread_count();
  const int64_t panels = divide_up(in_.out_channels, kBf16Panel), panel_values = total_steps_ * kBf16PanelStep;
  constexpr int64_t piece_panels = kPieceChannels / kBf16Panel;
  const int64_t groups = std::clamp<int64_t>(divide_up(4 * threads, tiles_), 1, panels);
  // Where every panel meets one tile alone it is packed by whoever multiplies it, straight into cache.
  const bool packed_apart = tiles_ > 1 || panels < 2 * threads;
  const auto pack = [&](int64_t panel, size_t input, BFloat16* to) {
    const int64_t channel = panel * kBf16Panel;
    kernels_.pack_transposed({in_.weight + channel * depth + in_.xs[input].offset, depth},
                             std::min(kBf16Panel, in_.out_channels - channel), in_.xs[input].channels,
                             to + steps_[input] * kBf16PanelStep);
  };
  const int64_t inputs = in_.count();
  const Scratch<BFloat16> packed(packed_apart ? panels * panel_values : 0);
  if (packed_apart) {
    parallel(panels * inputs, panel_values / inputs, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i / inputs, i % inputs, packed.get() + i / inputs * panel_values);
    });
  }
  bool padded = total % tile_pixels_ != 0 && total % tile_pixels_ < kBf16Block;
  for (const Input<BFloat16>& x : in_.xs) padded = padded || x.channels % kBf16Step != 0;
  const int64_t width = total_steps_ * kBf16Step;
  parallel_queue(
      tiles_ * groups, tile_pixels_ * depth * divide_up(in_.out_channels, groups) / 64, [&](const Take& take) {
        const Bf16Thread thread(kernels_);
        const Scratch<float> z(kPieceRows * kPieceChannels);
        const Scratch<BFloat16> rows_padded(padded ? std::max(tile_pixels_, kBf16Block) * width : 0);
        const Scratch<BFloat16> own(packed_apart ? 0 : piece_panels * panel_values);
        std::vector<Bf16Segment> tile_segments(inputs), segments(inputs);
        for (int64_t task = take(); task >= 0; task = take()) {
          const int64_t tile = task / groups, group = task % groups;
          const int64_t begin = tile * tile_pixels_, rows = std::min(tile_pixels_, total - begin);
          for (int64_t i = 0; i < inputs; ++i) {
            const int64_t channels = in_.xs[i].channels;
            const BFloat16* x = in_.xs[i].data + begin * channels;
            if (channels % kBf16Step == 0 && rows >= kBf16Block) {
              tile_segments[i] = {x, channels, channels / kBf16Step};
            } else {
              BFloat16* to = rows_padded.get() + steps_[i] * kBf16Step;
              copy_padded({x, channels}, {to, width}, rows, channels, std::max(rows, kBf16Block));
              tile_segments[i] = {to, width, steps_[i + 1] - steps_[i]};
            }
          }
          const int64_t panel_end = panels * (group + 1) / groups;
          for (int64_t panel = panels * group / groups; panel < panel_end; panel += piece_panels) {
            const int64_t channel = panel * kBf16Panel, last = std::min(panel_end, panel + piece_panels);
            const int64_t cols = std::min(last * kBf16Panel, in_.out_channels) - channel;
            const BFloat16* b = packed.get() + panel * panel_values;
            if (!packed_apart) {
              for (int64_t p = panel; p < last; ++p) {
                for (int64_t i = 0; i < inputs; ++i) pack(p, i, own.get() + (p - panel) * panel_values);
              }
              b = own.get();
            }
            const int64_t parts = parts_of(rows);
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t row = part * kPart, n = part + 1 < parts ? kPart : rows - row;
              for (int64_t i = 0; i < inputs; ++i) {
                segments[i] = {tile_segments[i].a + row * tile_segments[i].lda, tile_segments[i].lda,
                               tile_segments[i].steps};
              }
              kernels_.gemm({n, cols, segments.data(), inputs, b, panel_values, z.get(), kPieceChannels});
              epilogue({{n, cols, false}, first_part(tile) + part, channel, (begin + row) * in_.out_channels + channel},
                       Strided<const float>{z.get(), kPieceChannels});
            }
          }
        }
      });
}

void Bf16Pointwise::forward_contiguous(Epilogue<float> epilogue) const {
  const int64_t total = in_.total(), depth = in_.in_channels, width = total_steps_ * kBf16Step;
  const int64_t inputs = in_.count(), out_channels = in_.out_channels;
  const int64_t panel_values = total_steps_ * kBf16PanelStep;
  constexpr int64_t piece_channels = kPart;
  const int64_t pieces = divide_up(out_channels, piece_channels);
  const int64_t groups = std::clamp<int64_t>(divide_up(4 * thread_count(), tiles_), 1, pieces);
  bool padded = out_channels % piece_channels != 0 && out_channels % piece_channels < kBf16Block;
  for (const Input<BFloat16>& x : in_.xs) padded = padded || x.channels % kBf16Step != 0;
  const int64_t padded_channels = round_up(out_channels, kBf16Block);
  const Scratch<BFloat16> weight_padded(padded ? padded_channels * width : 0);
  if (padded) {
    for (int64_t i = 0; i < inputs; ++i) {
      copy_padded({in_.weight + in_.xs[i].offset, depth}, {weight_padded.get() + steps_[i] * kBf16Step, width},
                  out_channels, in_.xs[i].channels, padded_channels);
    }
  }
  const Strided<const BFloat16> w =
      padded ? Strided<const BFloat16>{weight_padded.get(), width} : Strided<const BFloat16>{in_.weight, depth};
  parallel_queue(tiles_ * groups, tile_pixels_ * depth * divide_up(out_channels, groups) / 64, [&](const Take& take) {
    const Bf16Thread thread(kernels_);
    const Scratch<float> z(piece_channels * tile_pixels_);
    const Scratch<BFloat16> packed(tile_pixels_ / kBf16Panel * panel_values);
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = task / groups, group = task % groups;
      const int64_t begin = tile * tile_pixels_, end = std::min(begin + tile_pixels_, total);
      for (int64_t i = 0; i < inputs; ++i) {
        const int64_t channels = in_.xs[i].channels;
        for (int64_t at = begin, next = begin; at < end; at = next) {
          const int64_t image = at / in_.pixels();
          next = std::min(end, (image + 1) * in_.pixels());
          const BFloat16* x = in_.xs[i].data + image * channels * in_.pixels() + at % in_.pixels();
          kernels_.pack({x, in_.pixels()}, channels,
                        {packed.get() + steps_[i] * kBf16PanelStep, panel_values, at - begin, next - at, next == end});
        }
      }
      const int64_t piece_end = pieces * (group + 1) / groups;
      for (int64_t piece = pieces * group / groups; piece < piece_end; ++piece) {
        const int64_t channel = piece * piece_channels, rows = std::min(piece_channels, out_channels - channel);
        const Bf16Segment segment = {w.data + channel * w.ld, w.ld, total_steps_};
        kernels_.gemm({rows, end - begin, &segment, 1, packed.get(), panel_values, z.get(), tile_pixels_});
        int64_t part = first_part(tile);
        for (int64_t at = begin, next = begin; at < end; at = next, ++part) {
          const int64_t image = at / in_.pixels();
          next = std::min(end, (image + 1) * in_.pixels());
          epilogue({{rows, next - at, true}, part, channel, in_.at(out_channels, image, at % in_.pixels(), channel)},
                   Strided<const float>{z.get() + (at - begin), tile_pixels_});
        }
      }
    }
  });
}

void Bf16Pointwise::forward(float* /*out*/, Epilogue<float> epilogue) const {
  in_.channels_last ? forward_channels_last(epilogue) : forward_contiguous(epilogue);
}

ProductOf<BFloat16> bf16_pointwise(const Inputs<BFloat16>& in) {
  const Bf16Kernels* kernels = bf16_kernels();
  return kernels == nullptr ? nullptr : std::make_unique<Bf16Pointwise>(in, *kernels);
}

}  // namespace dla_fast::cpu
