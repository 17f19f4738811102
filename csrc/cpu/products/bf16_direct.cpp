// Forward of the direct convolution (direct.h) of one bfloat16 map in bfloat16 instructions (bf16_runs.h).
//
// The pixels that a block takes lie in cache as they lie in the map, with zeros around it, and a row of taps is one run
// of values there.

#include <cstring>

#include "bf16_runs.h"
#include "direct.h"

namespace dla_fast::cpu {

#if defined(DLA_WITH_AVX512_BF16)
namespace {

using c10::BFloat16;

class Bf16Direct : public Direct<BFloat16> {
 public:
  explicit Bf16Direct(const Inputs<BFloat16>& in);
  int64_t packed_bytes() const override {
    return divide_up(in_.out_channels, kRunPanel) * panel_values() * static_cast<int64_t>(sizeof(BFloat16));
  }
  void pack(void* to) const override;
  void forward(float* out, Epilogue<float> epilogue) const override;
  bool infer(const Norm<float>& norm, const BFloat16* residual, BFloat16* y) const override;

 private:
  // Of a row of taps: one, or as many as it has taps, which a dilation keeps apart.
  int64_t runs() const { return window_.dilation == 1 ? 1 : window_.kernel; }
  int64_t length() const { return window_.kernel / runs() * in_.in_channels; }
  int64_t panel_values() const { return window_.kernel * runs() * divide_up(length(), 2) * kRunPair; }
  void gather(const RowGrid::Block& block, BFloat16* patch) const;
  std::vector<RunSegment> segments(const RowGrid::Block& block, bool whole_map) const;
  // With a tail for what a panel's sums become, or an epilogue that is given them.
  void multiply(const Bf16Tail* tail, Epilogue<float> epilogue) const;

  int side_;  // of kRunSides: the one that fits the width of a block
};

Bf16Direct::Bf16Direct(const Inputs<BFloat16>& in) : Direct<BFloat16>(in) {
  side_ = round_up(grid_.cols, kRunSides[0]) <= round_up(grid_.cols, kRunSides[1]) ? 0 : 1;
}

void Bf16Direct::pack(void* to) const {
  const int64_t taps = in_.taps(), channels = in_.in_channels, count = length();
  parallel(divide_up(in_.out_channels, kRunPanel), panel_values(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kRunPanel; n < std::min(end * kRunPanel, in_.out_channels); ++n) {
      BFloat16* const panel = static_cast<BFloat16*>(to) + n / kRunPanel * panel_values() + n % kRunPanel * 2;
      const BFloat16* const from = in_.weight + n * taps * channels;
      for (int64_t i = 0; i < taps * channels; ++i) {
        const int64_t tap = i / channels, c = i % channels, in_run = i % count;
        panel[(i / count * divide_up(count, 2) + in_run / 2) * kRunPair + in_run % 2] =
            from[in_.taps_first ? i : c * taps + tap];
      }
    }
  });
}

void Bf16Direct::gather(const RowGrid::Block& block, BFloat16* patch) const {
  const Map<BFloat16>& map = maps_[0];
  const int64_t h = block.h * window_.stride - window_.padding(), w = block.w * window_.stride - window_.padding();
  const int64_t rows = window_.side(block.height), cols = window_.side(grid_.cols);
  const int64_t begin = std::clamp<int64_t>(-w, 0, cols), end = std::clamp<int64_t>(map.width - w, begin, cols);
  for (int64_t q = 0; q < block.images; ++q) {
    for (int64_t r = h; r < h + rows; ++r, patch += cols * map.channels) {
      if (r < 0 || r >= map.height) {
        std::fill_n(patch, cols * map.channels, BFloat16(0));
        continue;
      }
      std::fill_n(patch, begin * map.channels, BFloat16(0));
      std::memcpy(patch + begin * map.channels,
                  map.data + (((block.image + q) * map.height + r) * map.width + w + begin) * map.channels,
                  (end - begin) * map.channels * sizeof(BFloat16));
      std::fill(patch + end * map.channels, patch + cols * map.channels, BFloat16(0));
    }
    patch += (window_.side(grid_.rows) - rows) * cols * map.channels;
  }
}

// `whole_map`: where their pixels lie in the whole output, or else in the block.
std::vector<RunSegment> Bf16Direct::segments(const RowGrid::Block& block, bool whole_map) const {
  const int64_t side = kRunSides[side_], stride = window_.stride, dilation = window_.dilation;
  const int64_t cols = window_.side(grid_.cols), rows = window_.side(grid_.rows);
  std::vector<RunSegment> segments;
  for (int64_t r = 0; r < block.height; ++r) {
    // Rows of taps above the map and below it meet zeros alone.
    const int64_t top = (block.h + r) * stride - window_.padding(), height = maps_[0].height;
    const int64_t first = std::min(top < 0 ? divide_up(-top, dilation) : 0, window_.kernel),
                  last = std::clamp(divide_up(height - top, dilation), first, window_.kernel);
    for (int64_t q = 0; q < block.images; ++q) {
      for (int64_t w = 0; w < block.width; w += side) {
        const int64_t begin = std::max<int64_t>(std::min(w, block.width - side), 0);
        const int64_t to = whole_map ? ((block.image + q) * in_.height + block.h + r) * in_.width + block.w
                                     : (q * block.height + r) * block.width;
        segments.push_back({((q * rows + r * stride) * cols + begin * stride) * in_.in_channels, to + begin,
                            first * runs(), last * runs()});
      }
    }
  }
  return segments;
}

void Bf16Direct::multiply(const Bf16Tail* tail, Epilogue<float> epilogue) const {
  const int64_t n = in_.out_channels, channels = in_.in_channels, side = kRunSides[side_];
  const int64_t row = window_.side(grid_.cols) * channels, image = window_.side(grid_.rows) * row,
                most = grid_.together * grid_.rows * grid_.cols;
  std::vector<int64_t> offsets;
  for (int64_t run = 0; run < window_.kernel * runs(); ++run) {
    offsets.push_back(window_.dilation * (run / runs() * row + run % runs() * channels));
  }
  const PackedWeight<BFloat16> packed(*this, in_);
  const Tasks tasks(grid_.count(), divide_up(n, kRunPanel));
  const int64_t cost = most * in_.taps() * channels * divide_up(n, tasks.groups) / 32;
  parallel_queue(tasks.count, cost, [&](const Take& take) {
    // A segment may be longer than a row.
    const Scratch<BFloat16> patch(grid_.together * image + side * window_.stride * channels, true);
    const Scratch<float> z(tail == nullptr ? most * kRunPanel : 0);
    for (int64_t task = take(); task >= 0; task = take()) {
      const RowGrid::Block block = grid_[task / tasks.groups];
      gather(block, patch.get());
      const std::vector<RunSegment> cut = segments(block, tail != nullptr);
      for (int64_t panel = tasks.begin(task); panel < tasks.end(task); ++panel) {
        const int64_t channel = panel * kRunPanel, count = std::min(kRunPanel, n - channel);
        Bf16Tail part = {};
        if (tail != nullptr) {
          part = {tail->center + channel,
                  tail->scale + channel,
                  tail->shift + channel,
                  tail->relu,
                  tail->residual == nullptr ? nullptr : tail->residual + channel,
                  tail->y + channel,
                  n};
        }
        avx512_bf16::multiply_runs({cut.data(), static_cast<int64_t>(cut.size()), side_, std::min(side, block.width),
                                    window_.stride * channels, offsets.data(), length(), patch.get(),
                                    packed.get() + panel * panel_values(), count, z.get(),
                                    tail == nullptr ? nullptr : &part});
        if (tail != nullptr) continue;
        const int64_t pieces = block.images * (whole() ? 1 : block.height),
                      pixels = block.images * block.height * block.width / pieces;
        for (int64_t r = 0; r < pieces; ++r) {
          const int64_t at = in_.at(n, block.image + (whole() ? r : r / block.height),
                                    (block.h + (whole() ? 0 : r % block.height)) * in_.width + block.w, channel);
          epilogue({{pixels, count, false}, task / tasks.groups * this->pieces() + r, channel, at},
                   Strided<const float>{z.get() + r * pixels * kRunPanel, kRunPanel});
        }
      }
    }
  });
}

void Bf16Direct::forward(float* /*out*/, Epilogue<float> epilogue) const {
  multiply(nullptr, epilogue);
}

bool Bf16Direct::infer(const Norm<float>& norm, const BFloat16* residual, BFloat16* y) const {
  if (norm.act != Act::relu && norm.act != Act::identity) return false;
  const Bf16Tail tail = {norm.center, norm.scale, norm.shift, norm.act == Act::relu, residual, y, in_.out_channels};
  multiply(&tail, [](const Piece&, Strided<const float>) {});
  return true;
}

}  // namespace

ProductOf<BFloat16> bf16_direct(const Inputs<BFloat16>& in) {
  return std::make_unique<Bf16Direct>(in);
}
#else
ProductOf<c10::BFloat16> bf16_direct(const Inputs<c10::BFloat16>& in) {
  return direct(in);
}
#endif

}  // namespace dla_fast::cpu
