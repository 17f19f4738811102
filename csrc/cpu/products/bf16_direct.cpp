// Forward of a convolution of any kernel in bfloat16 instructions (bf16_runs.h), finished in registers.
//
// A row of taps is one run of values in the map, and is read there. The pixels of segments at the map's sides are
// copied, with zeros beside it; rows of taps above it and below it are left out.

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
  class Cut;
  // Of a row of taps: one of each input, or as many as it has taps, which a dilation keeps apart.
  int64_t runs() const { return window_.dilation == 1 ? 1 : window_.kernel; }
  int64_t side() const { return kRunSides[side_]; }
  int64_t panel_values() const { return (runs_.back().pairs_before + divide_up(runs_.back().length, 2)) * kRunPair; }
  // A segment's pixels as they are copied.
  int64_t rows() const { return window_.side(grid_.rows); }
  int64_t cols() const { return window_.side(side()); }
  int64_t copied() const { return grid_.together * rows() * cols() * in_.in_channels; }
  // The column of the map where a segment's first run begins, and whether all of them lie inside it.
  int64_t left(int64_t column) const { return column * window_.stride - window_.padding(); }
  bool inside(int64_t column) const { return left(column) >= 0 && left(column) + cols() <= maps_[0].width; }
  std::vector<Run> runs_in(int64_t width, const BFloat16* copies) const;
  void copy(const RowGrid::Block& block, int64_t column, BFloat16* to) const;
  // With what a panel's sums become, or an epilogue that is given them.
  void multiply(const Finish<BFloat16>* finish, Epilogue<float> epilogue) const;

  int side_;               // of kRunSides: the one that fits the width of a block
  std::vector<Run> runs_;  // row of taps by row, in the maps
};

// Half as large as floats, and sums that are finished at once need no memory: blocks of more pixels. A 1x1 kernel takes
// all pixels as one row.
RowGrid blocks_of(const Inputs<BFloat16>& in) {
  const Window window(in);
  const int64_t inputs = divide_up(in.in_channels, 2), outputs = divide_up(std::min(in.out_channels, kPanel), 4);
  if (in.kernel == 1) return {1, 1, in.total(), 1, 1, inputs, outputs};
  return {in.images, in.height, in.width, in.stride, window.span(), inputs, outputs};
}

Bf16Direct::Bf16Direct(const Inputs<BFloat16>& in) : Direct<BFloat16>(in) {
  grid_ = blocks_of(in);
  if (in.kernel == 1) {
    for (Map<BFloat16>& map : maps_) map = {map.data, map.channels, 1, in.total(), true};
  }
  side_ = round_up(grid_.cols, kRunSides[0]) <= round_up(grid_.cols, kRunSides[1]) ? 0 : 1;
  runs_ = runs_in(maps_[0].width, nullptr);
}

// copies: of all inputs, one behind the other, in place of the maps. There are no maps where a weight is packed.
std::vector<Run> Bf16Direct::runs_in(int64_t width, const BFloat16* copies) const {
  std::vector<Run> found;
  int64_t pairs = 0;
  for (int64_t tap = 0; tap < window_.kernel * runs(); ++tap) {
    const int64_t pixel = window_.dilation * (tap / runs() * width + tap % runs());
    for (const Input<BFloat16>& x : in_.xs) {
      const BFloat16* const map = copies == nullptr ? x.data : copies + copied() / in_.in_channels * x.offset;
      const int64_t length = window_.kernel / runs() * x.channels;
      found.push_back({map == nullptr ? nullptr : map + pixel * x.channels, x.channels, length, pairs});
      pairs += divide_up(length, 2);
    }
  }
  return found;
}

void Bf16Direct::pack(void* to) const {
  const int64_t taps = in_.taps(), row = taps * in_.in_channels;
  parallel(divide_up(in_.out_channels, kRunPanel), panel_values(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kRunPanel; n < std::min(end * kRunPanel, in_.out_channels); ++n) {
      BFloat16* const panel = static_cast<BFloat16*>(to) + n / kRunPanel * panel_values() + n % kRunPanel * 2;
      for (int64_t r = 0; r < static_cast<int64_t>(runs_.size()); ++r) {
        const Input<BFloat16>& x = in_.xs[r % in_.count()];
        if (runs_[r].length % 2 != 0) panel[(runs_[r].pairs_before + runs_[r].length / 2) * kRunPair + 1] = BFloat16(0);
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

void Bf16Direct::copy(const RowGrid::Block& block, int64_t column, BFloat16* to) const {
  const int64_t h = block.h * window_.stride - window_.padding(), w = left(column);
  for (const Map<BFloat16>& map : maps_) {
    const int64_t begin = std::clamp<int64_t>(-w, 0, cols()), end = std::clamp<int64_t>(map.width - w, begin, cols());
    for (int64_t q = 0; q < grid_.together; ++q) {
      for (int64_t r = h; r < h + rows(); ++r, to += cols() * map.channels) {
        if (q >= block.images || r < 0 || r >= map.height) continue;  // nobody reads it
        std::fill_n(to, begin * map.channels, BFloat16(0));
        std::memcpy(to + begin * map.channels,
                    map.data + (((block.image + q) * map.height + r) * map.width + w + begin) * map.channels,
                    (end - begin) * map.channels * sizeof(BFloat16));
        std::fill_n(to + end * map.channels, (cols() - end) * map.channels, BFloat16(0));
      }
    }
  }
}

// What a thread multiplies with: the segments of a block, and copies of those at the map's sides.
class Bf16Direct::Cut {
 public:
  explicit Cut(const Bf16Direct& product) : p_(product), copies_(sides(product) * product.copied()) {
    for (int64_t i = 0; i < sides(product); ++i) {
      beside_.push_back(product.runs_in(product.cols(), copies_.get() + i * product.copied()));
    }
  }

  // whole_map: where pixels lie in the whole output, or else in the block.
  const std::vector<RunSegment>& of(const RowGrid::Block& block, bool whole_map) {
    std::vector<int64_t> columns;
    for (int64_t w = 0; w < block.width; w += p_.side()) {
      columns.push_back(block.w + std::max<int64_t>(std::min(w, block.width - p_.side()), 0));
    }
    segments_.clear();
    // Neighbours in this order that share their runs are multiplied together: at the sides those of a column.
    size_t sides = 0;
    for (const int64_t column : columns) {
      if (p_.inside(column)) continue;
      p_.copy(block, column, copies_.get() + p_.copied() * static_cast<int64_t>(sides));
      const Run* const runs = beside_[sides++].data();
      for (int64_t r = 0; r < block.height; ++r) add_row(block, r, {column}, runs, whole_map);
    }
    columns.erase(std::remove_if(columns.begin(), columns.end(), [&](int64_t column) { return !p_.inside(column); }),
                  columns.end());
    for (int64_t r = 0; r < block.height; ++r) add_row(block, r, columns, p_.runs_.data(), whole_map);
    return segments_;
  }

 private:
  void add_row(const RowGrid::Block& block, int64_t r, const std::vector<int64_t>& columns, const Run* runs,
               bool whole_map) {
    const Window& window = p_.window_;
    const int64_t per_row = static_cast<int64_t>(p_.runs_.size()) / window.kernel;
    // Rows of taps above the map and below it meet zeros alone.
    const int64_t top = (block.h + r) * window.stride - window.padding(), height = p_.maps_[0].height;
    const int64_t first = top < 0 ? std::min(divide_up(-top, window.dilation), window.kernel) : 0,
                  last = std::clamp(divide_up(height - top, window.dilation), first, window.kernel);
    for (int64_t q = 0; q < block.images; ++q) {
      const int64_t image = block.image + q, row = (image * p_.grid_.height + block.h + r) * p_.grid_.width;
      for (const int64_t column : columns) {
        segments_.push_back({runs == p_.runs_.data() ? (image * height + top) * p_.maps_[0].width + p_.left(column)
                                                     : (q * p_.rows() + r * window.stride) * p_.cols(),
                             whole_map ? row + column : (q * block.height + r) * block.width + column - block.w,
                             runs + first * per_row, runs + last * per_row});
      }
    }
  }
  // Segments of a row that do not lie inside of the map, at most.
  static int64_t sides(const Bf16Direct& product) {
    int64_t most = 0;
    for (int64_t w = 0; w < product.grid_.width; w += product.grid_.cols) {
      const int64_t width = std::min(product.grid_.cols, product.grid_.width - w);
      int64_t count = 0;
      for (int64_t c = 0; c < width; c += product.side()) {
        count += product.inside(w + std::max<int64_t>(std::min(c, width - product.side()), 0)) ? 0 : 1;
      }
      most = std::max(most, count);
    }
    return most;
  }

  const Bf16Direct& p_;
  Scratch<BFloat16> copies_;
  std::vector<std::vector<Run>> beside_;
  std::vector<RunSegment> segments_;
};

void Bf16Direct::multiply(const Finish<BFloat16>* finish, Epilogue<float> epilogue) const {
  const int64_t n = in_.out_channels, most = grid_.together * grid_.rows * grid_.cols;
  const PackedWeight<BFloat16> packed(*this, in_);
  const Tasks tasks(grid_.count(), divide_up(n, kRunPanel));
  const int64_t cost = most * in_.taps() * in_.in_channels * divide_up(n, tasks.groups) / 32;
  parallel_queue(tasks.count, cost, [&](const Take& take) {
    Cut cut(*this);
    const Scratch<float> z(finish == nullptr ? most * kRunPanel : 0);
    for (int64_t task = take(); task >= 0; task = take()) {
      const RowGrid::Block block = grid_[tasks.tile(task)];
      const std::vector<RunSegment>& segments = cut.of(block, finish != nullptr);
      for (int64_t panel = tasks.begin(task); panel < tasks.end(task); ++panel) {
        const int64_t channel = panel * kRunPanel, count = std::min(kRunPanel, n - channel);
        Finish<BFloat16> part = {};
        if (finish != nullptr) part = finish->from(channel, channel);
        avx512_bf16::multiply_runs({segments.data(), static_cast<int64_t>(segments.size()), side_,
                                    std::min(side(), block.width), window_.stride,
                                    packed.get() + panel * panel_values(), count, z.get(),
                                    finish == nullptr ? nullptr : &part});
        if (finish != nullptr) continue;
        const int64_t pieces = block.images * (whole() ? 1 : block.height),
                      pixels = block.images * block.height * block.width / pieces;
        for (int64_t r = 0; r < pieces; ++r) {
          const int64_t image = block.image + (whole() ? r : r / block.height),
                        h = block.h + (whole() ? 0 : r % block.height),
                        at = ((image * grid_.height + h) * grid_.width + block.w) * n + channel;
          epilogue({{pixels, count, false}, tasks.tile(task) * this->pieces() + r, channel, at},
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
  if (!Finish<BFloat16>::serves(norm)) return false;
  const Finish<BFloat16> finish = Finish<BFloat16>::of(norm, residual, y, in_.out_channels);
  multiply(&finish, [](const Piece&, Strided<const float>) {});
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
