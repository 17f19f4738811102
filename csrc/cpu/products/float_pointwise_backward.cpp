// Backward of the 1x1 product in vector instructions. K = sum of the inputs' channels, N = output channels.
//
// Per pixel: reads dy and z (2N) and the inputs (K), writes their gradients (K); 4KN flops. dz is formed tile by tile
// in cache and feeds both dx_i = W_i^T dz and dW_i += dz x_i^T. Every thread sums its own dW over a fixed range of
// tiles; the sums are added in thread order, so results are the same from run to run.

#include "float_pointwise.h"
#include "through.h"

namespace dla_fast::cpu {
namespace {

constexpr int64_t kPad = 16;      // keeps the rows of a tile off the same cache sets
constexpr int64_t kDzPanel = 96;  // channels of dz that lie together where all of it is kept

// W_i in panels of kPanel input channels, [N][kPanel] each: the right-hand sides of dx_i.
template <class T>
class InputPanels {
  using A = acc_t<T>;

 public:
  InputPanels(const Inputs<T>& in, bool packed)
      : in_(in),
        begin_(begins(in)),
        packed_(packed ? begin_.back() * in.out_channels * kPanel : 0, in.in_channels != begin_.back() * kPanel) {
    if (!packed) return;
    const int64_t n = in.out_channels;
    parallel(count(), n * kPanel, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const auto [i, c] = (*this)[panel];
        kernels<T>().load({in.weight + in.xs[i].offset + c, in.in_channels},
                          {packed_.get() + panel * n * kPanel, kPanel}, n, std::min(kPanel, in.xs[i].channels - c));
      }
    });
  }

  int64_t count() const { return begin_.back(); }
  // The input that a panel belongs to, and its first channel there.
  std::pair<int64_t, int64_t> operator[](int64_t panel) const {
    const int64_t i = std::upper_bound(begin_.begin(), begin_.end(), panel) - begin_.begin() - 1;
    return {i, (panel - begin_[i]) * kPanel};
  }
  const A* weight(int64_t panel) const { return packed_.get() + panel * in_.out_channels * kPanel; }

 private:
  static std::vector<int64_t> begins(const Inputs<T>& in) {
    std::vector<int64_t> begin = {0};
    for (const Input<T>& x : in.xs) begin.push_back(begin.back() + divide_up(x.channels, kPanel));
    return begin;
  }

  const Inputs<T>& in_;
  std::vector<int64_t> begin_;
  Scratch<A> packed_;
};

template <class T>
struct Backward {
  using A = acc_t<T>;

  const Inputs<T>& in;
  const Gradient<T>& g;
  const std::vector<A*>& dw;  // a sum for every slice; none where it is not needed
  const Kernels<T>& k = kernels<T>();
  const FloatKernels<A>& products = float_kernels<A>();

  bool need_dw() const { return !dw.empty(); }

  int64_t widest() const {
    int64_t channels = 0;
    for (const Input<T>& x : in.xs) channels = std::max(channels, round_up(x.channels, kPad));
    return channels;
  }

  // A tile of an input, whose first value lies that far in the map; formed, where it is.
  void load(const Input<T>& x, const Shape& shape, int64_t channel, int64_t at, Strided<A> to) const {
    const int64_t ld = in.ld(x.channels);
    if (x.ending != nullptr) return x.ending->form(shape, channel, at, ld, to);
    k.load({x.data + at, ld}, to, shape.rows, shape.cols);
  }

  // Rows of an input as the GEMM may read them: in place where they are A and end on a vector, else in scratch.
  Strided<const A> operand(const Input<T>& x, int64_t first, int64_t rows, A* scratch) const {
    if constexpr (std::is_same_v<T, A>) {
      if (x.ending == nullptr && x.channels * sizeof(A) % 64 == 0) return {x.data + first * x.channels, x.channels};
    }
    const int64_t ld = round_up(x.channels, kPad);
    load(x, {rows, x.channels, false}, 0, first * x.channels, {scratch, ld});
    return {scratch, ld};
  }

  // Where a tile of dx lies.
  struct Place {
    int64_t input, group, channel, at;
  };

  // dx tile = (residual gradient, or what is carried) + product; written in place where dx is A and goes no further.
  void write_dx(const Place& to, Gemm<A> gemm, const A* du, int64_t ld_du, A* scratch, ThroughTiles<T>& through) const {
    const auto& [i, group, channel, at] = to;
    const int64_t ld = in.ld(in.xs[i].channels);
    const bool on = through.takes(i);
    gemm.c = scratch;
    gemm.ldc = gemm.n;
    if constexpr (std::is_same_v<T, A>) {
      if (!on) {
        gemm.c = g.dx[i] + at;
        gemm.ldc = ld;
      }
    }
    const T* const carried = i == 0 ? g.carried : nullptr;
    gemm.add = du != nullptr || carried != nullptr;
    if (carried != nullptr) k.load({carried + at, ld}, {gemm.c, gemm.ldc}, gemm.m, gemm.n);
    if (du != nullptr) {
      for (int64_t r = 0; r < gemm.m; ++r) std::copy_n(du + r * ld_du, gemm.n, gemm.c + r * gemm.ldc);
    }
    products.gemm(gemm);
    if (on) {
      through.put({gemm.m, gemm.n, !in.channels_last}, group, channel, at, ld, {scratch, gemm.n}, g.dx[i]);
    } else if constexpr (!std::is_same_v<T, A>) {
      k.store({scratch, gemm.n}, {g.dx[i] + at, ld}, gemm.m, gemm.n);
    }
  }

  // dz of a tile of channels_last pixels, in panels of `width` channels, and du where it is wanted.
  void form(int64_t first, int64_t rows, int64_t width, int64_t panel_size, Strided<A> dz, A* du) const {
    const int64_t n = in.out_channels;
    for (int64_t c = 0; c < n; c += width) {
      g.tail.form({rows, std::min(width, n - c), false}, c, first * n + c, n, {dz.data + c / width * panel_size, dz.ld},
                  {du == nullptr ? nullptr : du + c, n});
    }
    if (g.dresidual != nullptr) k.store({du, n}, {g.dresidual + first * n, n}, rows, n);
  }

  // A panel of dx of a tile of channels_last pixels.
  void input_gradient(const InputPanels<T>& panels, int64_t panel, int64_t group, int64_t first, int64_t rows,
                      int64_t width, int64_t panel_size, Strided<const A> dz, const A* du, A* dx_tile, Ahead& ahead,
                      ThroughTiles<T>& through) const {
    const int64_t n = in.out_channels;
    const auto [i, c] = panels[panel];
    if (g.dx[i] == nullptr) return;
    const int64_t channels = in.xs[i].channels;
    std::vector<Segment<A>> segments;
    for (int64_t at = 0; at < n; at += width) {
      segments.push_back({dz.data + at / width * panel_size, dz.ld, std::min(width, n - at)});
    }
    const Gemm<A> gemm = {rows,
                          std::min(kPanel, channels - c),
                          segments.data(),
                          static_cast<int64_t>(segments.size()),
                          false,
                          panels.weight(panel),
                          kPanel,
                          nullptr,
                          0,
                          false,
                          &ahead};
    write_dx({i, group, c, first * channels + c}, gemm, g.adds(i) ? du + c : nullptr, n, dx_tile, through);
  }

  // dz lives in a tile and feeds both products.
  void channels_last(int64_t slices) const {
    const int64_t total = in.total(), n = in.out_channels, depth = in.in_channels, ld = round_up(n, kPad) + kPad;
    const int64_t per_slice = divide_up(total, slices);
    const int64_t rows_max = round_up(divide_up(per_slice, divide_up(per_slice, 126)), 6);
    const InputPanels<T> panels(in, g.any_dx());
    ThroughTiles<T> through(g, slices);
    parallel_ranges(slices, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> dz(rows_max * ld), du(g.wants_du() ? rows_max * n : 0), wide(rows_max * widest(), true),
          dx_tile(rows_max * kPanel);
      A* const du_tile = g.wants_du() ? du.get() : nullptr;
      Ahead x_ahead;
      for (int64_t slice = begin; slice < end; ++slice) {
        const int64_t start = total * slice / slices, last = total * (slice + 1) / slices;
        for (int64_t first = start; first < last; first += rows_max) {
          const int64_t rows = std::min(rows_max, last - first);
          form(first, rows, n, 0, {dz.get(), ld}, du_tile);
          // x comes into the cache meanwhile, for dW.
          for (int64_t panel = 0; g.any_dx() && panel < panels.count(); ++panel) {
            const auto [i, c] = panels[panel];
            if (c == 0) {
              const int64_t channels = in.xs[i].channels;
              x_ahead = need_dw() || through.takes(i)
                            ? Ahead::of<const T>({in.xs[i].data + first * channels, channels}, rows, channels)
                            : Ahead{};
            }
            input_gradient(panels, panel, slice, first, rows, n, 0, {dz.get(), ld}, du_tile, dx_tile.get(), x_ahead,
                           through);
          }
          const Segment<A> across = {dz.get(), ld, rows};
          const int64_t next = first + rows, next_rows = std::min(rows_max, last - next);
          Ahead ahead[2] = {Ahead::of<const T>({g.tail.z + next * n, n}, next_rows, n),
                            Ahead::of<const T>({g.tail.dy + next * n, n}, next_rows, n)};
          for (size_t i = 0; need_dw() && i < in.xs.size(); ++i) {
            const int64_t channels = in.xs[i].channels;
            const Strided<const A> b = operand(in.xs[i], first, rows, wide.get());
            products.gemm({n, channels, &across, 1, true, b.data, b.ld, dw[slice] + in.xs[i].offset, depth,
                           first > start, &ahead[i % 2]});
          }
        }
      }
    });
    through.finish();
  }

  // With few pixels and many channels dz is kept for all pixels and dW computed from it at the end: a dW for every
  // thread, read and written once per tile, would cost more.
  void whole() const {
    constexpr int64_t depth_block = 256, block = 32;
    // Across all pixels the product for dW reads a few channels of every row of dz: in whole rows each is a page away.
    constexpr int64_t width = kDzPanel;
    const int64_t total = in.total(), n = in.out_channels, depth = in.in_channels;
    const int64_t dz_panels = divide_up(n, width), panel_size = total * width;
    const InputPanels<T> panels(in, g.any_dx());
    const Scratch<A> dz(dz_panels * panel_size), du(g.wants_du() ? total * n : 0);
    const auto du_at = [&](int64_t first) { return g.wants_du() ? du.get() + first * n : nullptr; };
    parallel_queue(divide_up(total, block), block * n, [&](const Take& take) {
      for (int64_t i = take(); i >= 0; i = take()) {
        const int64_t first = i * block;
        form(first, std::min(block, total - first), width, panel_size, {dz.get() + first * width, width}, du_at(first));
      }
    });
    const int64_t tile = tile_rows(total, n * depth, panels.count());
    const Tasks tasks(divide_up(total, tile), g.any_dx() ? panels.count() : 0);
    ThroughTiles<T> through(g, tasks.tiles);
    parallel_queue(tasks.count, tile * n * depth / tasks.groups / 16, [&](const Take& take) {
      const Scratch<A> dx_tile(tile * kPanel);
      for (int64_t task = take(); task >= 0; task = take()) {
        const int64_t first = tasks.tile(task) * tile, end = tasks.end(task);
        for (int64_t panel = tasks.begin(task); panel < end; ++panel) {
          const A* next = panels.weight(panel + 1 < end ? panel + 1 : tasks.begin(task));
          Ahead ahead = Ahead::of<const A>({next, kPanel}, n, kPanel);
          input_gradient(panels, panel, tasks.tile(task), first, std::min(tile, total - first), width, panel_size,
                         {dz.get() + first * width, width}, du_at(first), dx_tile.get(), ahead, through);
        }
      }
    });
    through.finish();
    parallel_queue(panels.count(), total * n * kPanel / 16, [&](const Take& take) {
      const Scratch<A> x_block(depth_block * kPanel, true);
      for (int64_t task = take(); task >= 0; task = take()) {
        const auto [i, c] = panels[task];
        const int64_t channels = in.xs[i].channels, cols = std::min(kPanel, channels - c);
        const T* x = in.xs[i].data + c;
        // Packed, since rows a power of two apart would evict each other from the cache.
        for (int64_t first = 0; first < total; first += depth_block) {
          const int64_t rows = std::min(depth_block, total - first);
          load(in.xs[i], {rows, cols, false}, c, first * channels + c, {x_block.get(), kPanel});
          Ahead next = Ahead::of<const T>({x + (first + rows) * channels, channels},
                                          std::min(depth_block, total - first - rows), cols);
          for (int64_t p = 0; p < dz_panels; ++p) {
            const Segment<A> across = {dz.get() + p * panel_size + first * width, width, rows};
            products.gemm({std::min(width, n - p * width), cols, &across, 1, true, x_block.get(), kPanel,
                           dw[0] + p * width * depth + in.xs[i].offset + c, depth, first > 0, &next});
          }
        }
      }
    });
  }

  void contiguous(int64_t slices) const {
    const int64_t n = in.out_channels, depth = in.in_channels, pixels = in.pixels();
    const int64_t ld = kPanel + kPad, ld_w = depth + kPad, tiles_per_image = divide_up(pixels, kPanel);
    const int64_t tiles = in.images * tiles_per_image;
    const Scratch<A> w(n * ld_w);
    k.load({in.weight, depth}, {w.get(), ld_w}, n, depth);
    ThroughTiles<T> through(g, slices);
    parallel_ranges(slices, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> dz(n * ld, true), du(g.wants_du() ? n * kPanel : 0), across(kPanel * widest(), true),
          dx_tile(widest() * kPanel);
      for (int64_t slice = begin; slice < end; ++slice) {
        for (int64_t tile = tiles * slice / slices; tile < tiles * (slice + 1) / slices; ++tile) {
          const int64_t image = tile / tiles_per_image, pixel = tile % tiles_per_image * kPanel;
          const int64_t cols = std::min(kPanel, pixels - pixel), at = image * n * pixels + pixel;
          g.tail.form({n, cols, true}, 0, at, pixels, {dz.get(), ld}, {g.wants_du() ? du.get() : nullptr, kPanel});
          if (g.dresidual != nullptr) k.store({du.get(), kPanel}, {g.dresidual + at, pixels}, n, cols);
          for (int64_t i = 0; i < in.count(); ++i) {
            const int64_t channels = in.xs[i].channels, x_at = image * channels * pixels + pixel;
            if (g.dx[i] != nullptr) {
              const Segment<A> segment = {w.get() + in.xs[i].offset, ld_w, n};
              // What comes into the cache meanwhile lies a page apart, row by row.
              Ahead x_ahead = need_dw() || through.takes(i)
                                  ? Ahead::of<const T>({in.xs[i].data + x_at, pixels}, channels, cols)
                                  : Ahead{};
              const Gemm<A> gemm = {channels, cols, &segment, 1, true, dz.get(), ld, nullptr, 0, false, &x_ahead};
              write_dx({i, slice, 0, x_at}, gemm, g.adds(i) ? du.get() : nullptr, kPanel, dx_tile.get(), through);
            }
            if (need_dw()) {
              const int64_t ld_x = round_up(channels, kPad);
              if (in.xs[i].ending == nullptr) {
                k.load_transposed({in.xs[i].data + x_at, pixels}, {across.get(), ld_x}, channels, cols);
              } else {
                load(in.xs[i], {channels, cols, true}, 0, x_at, {dx_tile.get(), kPanel});
                kernels<A>().load_transposed({dx_tile.get(), kPanel}, {across.get(), ld_x}, channels, cols);
              }
              const Segment<A> segment = {dz.get(), ld, cols};
              products.gemm({n, channels, &segment, 1, false, across.get(), ld_x, dw[slice] + in.xs[i].offset, depth,
                             tile > tiles * slice / slices});
            }
          }
        }
      }
    });
    through.finish();
  }
};

}  // namespace

template <class T>
void FloatPointwise<T>::backward(const Gradient<T>& gradient) const {
  const int64_t total = in_.total();
  const int64_t tiles = in_.channels_last ? total / 24 : in_.images * divide_up(in_.pixels(), kPanel);
  const int64_t slices = slices_of(tiles, total, weights());
  const bool whole = in_.channels_last && gradient.dw != nullptr && 2 * slices * in_.in_channels > 3 * total;
  const SlicedSums<T> sums(gradient.dw, weights(), whole ? 1 : slices);
  const Backward<T> run = {in_, gradient, sums.at};
  if (whole) {
    run.whole();
  } else if (in_.channels_last) {
    run.channels_last(slices);
  } else {
    run.contiguous(slices);
  }
  sums.add();
}

template void FloatPointwise<float>::backward(const Gradient<float>&) const;
template void FloatPointwise<double>::backward(const Gradient<double>&) const;
template void FloatPointwise<c10::BFloat16>::backward(const Gradient<c10::BFloat16>&) const;
template void FloatPointwise<c10::Half>::backward(const Gradient<c10::Half>&) const;

}  // namespace dla_fast::cpu
