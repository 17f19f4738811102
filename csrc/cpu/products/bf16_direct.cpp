// Forward of a convolution of any kernel in bfloat16 instructions (bf16_runs.h), finished in registers.
//
// The pixels that a block takes lie in cache as they lie in the map, with zeros beside it, and a row of taps is one run
// of values there. A 1x1 kernel reads the maps where they are.

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
  bool pointwise() const { return window_.kernel == 1; }
  // Of a row of taps: one of each input, or as many as it has taps, which a dilation keeps apart.
  int64_t runs() const { return window_.dilation == 1 ? 1 : window_.kernel; }
  int64_t panel_values() const { return (runs_.back().pairs_before + divide_up(runs_.back().length, 2)) * kRunPair; }
  int64_t rows() const { return window_.side(grid_.rows); }
  int64_t cols() const { return window_.side(grid_.cols); }
  void gather(const RowGrid::Block& block, BFloat16* patch) const;
  std::vector<RunSegment> segments(const RowGrid::Block& block, bool whole_map) const;
  // With a tail for what a panel's sums become, or an epilogue that is given them.
  void multiply(const Bf16Tail* tail, Epilogue<float> epilogue) const;

  int side_;               // of kRunSides: the one that fits the width of a block
  std::vector<Run> runs_;  // row of taps by row; base: from the patch on
};

// Half as large as floats, and sums that are finished at once need no memory: blocks of more rows, with less around
// them. A 1x1 kernel takes all pixels as one row.
RowGrid blocks_of(const Inputs<BFloat16>& in) {
  const Window window(in);
  const int64_t inputs = divide_up(in.in_channels, 2), outputs = divide_up(std::min(in.out_channels, kPanel), 4);
  if (in.kernel == 1) return {1, 1, in.total(), 1, 1, inputs, outputs};
  return {in.images, in.height, in.width, in.stride, window.span(), inputs, outputs};
}

Bf16Direct::Bf16Direct(const Inputs<BFloat16>& in) : Direct<BFloat16>(in) {
  grid_ = blocks_of(in);
  side_ = round_up(grid_.cols, kRunSides[0]) <= round_up(grid_.cols, kRunSides[1]) ? 0 : 1;
  int64_t pairs = 0;
  for (int64_t tap = 0; tap < window_.kernel * runs(); ++tap) {
    for (const Input<BFloat16>& x : in.xs) {
      const int64_t pixel = window_.dilation * (tap / runs() * cols() + tap % runs()),
                    length = window_.kernel / runs() * x.channels;
      const BFloat16* const map = pointwise() ? x.data : nullptr;
      runs_.push_back({map, grid_.together * rows() * cols() * x.offset + pixel * x.channels, x.channels, length, pairs});
      pairs += divide_up(length, 2);
    }
  }
}

void Bf16Direct::pack(void* to) const {
  const int64_t taps = in_.taps(), row = taps * in_.in_channels;
  parallel(divide_up(in_.out_channels, kRunPanel), panel_values(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kRunPanel; n < std::min(end * kRunPanel, in_.out_channels); ++n) {
      BFloat16* const panel = static_cast<BFloat16*>(to) + n / kRunPanel * panel_values() + n % kRunPanel * 2;
      for (int64_t r = 0; r < static_cast<int64_t>(runs_.size()); ++r) {
        const Input<BFloat16>& x = in_.xs[r % in_.count()];
        for (int64_t i = 0; i < runs_[r].length; ++i) {
          const int64_t tap = r / in_.count() * (window_.kernel / runs()) + i / x.channels,
                        channel = x.offset + i % x.channels;
          panel[(runs_[r].pairs_before + i / 2) * kRunPair + i % 2] =
              in_.weight[n * row + (in_.taps_first ? tap * in_.in_channels + channel : channel * taps + tap)];
        }
      }
    }
  });
}

void Bf16Direct::gather(const RowGrid::Block& block, BFloat16* patch) const {
  const int64_t h = block.h * window_.stride - window_.padding(), w = block.w * window_.stride - window_.padding();
  for (size_t i = 0; i < maps_.size(); ++i) {
    const Map<BFloat16>& map = maps_[i];
    const int64_t begin = std::clamp<int64_t>(-w, 0, cols()), end = std::clamp<int64_t>(map.width - w, begin, cols());
    for (int64_t q = 0; q < block.images; ++q) {
      BFloat16* to = patch + grid_.together * rows() * cols() * in_.xs[i].offset + q * rows() * cols() * map.channels;
      for (int64_t r = h; r < h + window_.side(block.height); ++r, to += cols() * map.channels) {
        if (r < 0 || r >= map.height) continue;  // nobody reads it
        std::fill_n(to, begin * map.channels, BFloat16(0));
        std::memcpy(to + begin * map.channels,
                    map.data + (((block.image + q) * map.height + r) * map.width + w + begin) * map.channels,
                    (end - begin) * map.channels * sizeof(BFloat16));
        std::fill_n(to + end * map.channels, (cols() - end) * map.channels, BFloat16(0));
      }
    }
  }
}

// whole_map: where their pixels lie in the whole output, or else in the block.
std::vector<RunSegment> Bf16Direct::segments(const RowGrid::Block& block, bool whole_map) const {
  const int64_t side = kRunSides[side_], stride = window_.stride, dilation = window_.dilation;
  const int64_t per_row = static_cast<int64_t>(runs_.size()) / window_.kernel;
  std::vector<RunSegment> segments;
  for (int64_t r = 0; r < block.height; ++r) {
    // Rows of taps above the map and below it meet zeros alone.
    const int64_t top = (block.h + r) * stride - window_.padding(), height = maps_[0].height;
    const int64_t first = top < 0 ? std::min(divide_up(-top, dilation), window_.kernel) : 0,
                  last = std::clamp(divide_up(height - top, dilation), first, window_.kernel);
    for (int64_t q = 0; q < block.images; ++q) {
      for (int64_t w = 0; w < block.width; w += side) {
        const int64_t begin = std::max<int64_t>(std::min(w, block.width - side), 0);
        const int64_t from = pointwise() ? block.w + begin : (q * rows() + r * stride) * cols() + begin * stride;
        const int64_t to = whole_map ? ((block.image + q) * grid_.height + block.h + r) * grid_.width + block.w
                                     : (q * block.height + r) * block.width;
        segments.push_back({from, to + begin, first * per_row, last * per_row});
      }
    }
  }
  return segments;
}

void Bf16Direct::multiply(const Bf16Tail* tail, Epilogue<float> epilogue) const {
  const int64_t n = in_.out_channels, side = kRunSides[side_];
  const int64_t area = grid_.together * rows() * cols(), most = grid_.together * grid_.rows * grid_.cols;
  const PackedWeight<BFloat16> packed(*this, in_);
  const Tasks tasks(grid_.count(), divide_up(n, kRunPanel));
  const int64_t cost = most * in_.taps() * in_.in_channels * divide_up(n, tasks.groups) / 32;
  parallel_queue(tasks.count, cost, [&](const Take& take) {
    // A segment may be longer than a row.
    const Scratch<BFloat16> patch(pointwise() ? 0 : (area + side * window_.stride) * in_.in_channels);
    const Scratch<float> z(tail == nullptr ? most * kRunPanel : 0);
    std::vector<Run> runs = runs_;
    if (!pointwise()) {
      for (Run& run : runs) run.base = patch.get() + run.at;
    }
    for (int64_t task = take(); task >= 0; task = take()) {
      const RowGrid::Block block = grid_[task / tasks.groups];
      if (!pointwise()) gather(block, patch.get());
      const std::vector<RunSegment> cut = segments(block, tail != nullptr);
      for (int64_t panel = tasks.begin(task); panel < tasks.end(task); ++panel) {
        const int64_t channel = panel * kRunPanel, count = std::min(kRunPanel, n - channel);
        Bf16Tail part = {};
        if (tail != nullptr) part = tail->from(channel);
        avx512_bf16::multiply_runs({cut.data(), static_cast<int64_t>(cut.size()), side_, std::min(side, block.width),
                                    window_.stride, runs.data(), packed.get() + panel * panel_values(), count, z.get(),
                                    tail == nullptr ? nullptr : &part});
        if (tail != nullptr) continue;
        const int64_t pieces = block.images * (whole() ? 1 : block.height),
                      pixels = block.images * block.height * block.width / pieces;
        for (int64_t r = 0; r < pieces; ++r) {
          const int64_t image = block.image + (whole() ? r : r / block.height),
                        h = block.h + (whole() ? 0 : r % block.height),
                        at = ((image * grid_.height + h) * grid_.width + block.w) * n + channel;
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
