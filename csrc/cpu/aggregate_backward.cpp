// Backward of the aggregation node, CPU. K = sum of the inputs' channels, N = output channels.
//
// Per pixel: reads dy and z (2N) and the inputs (K), writes their gradients (K); 4KN flops. dz is formed tile by tile
// in cache and feeds both dx_i = W_i^T dz and dW_i += dz x_i^T. Every thread sums its own dW over a fixed range of
// tiles; the sums are added in thread order, so results are the same from run to run.

#include <algorithm>

#include "aggregate.h"
#include "aggregate_bf16.h"
#include "aggregate_bf16x3.h"
#include "tail.h"

namespace dla_fast::cpu {
namespace {

constexpr int64_t kPad = 16;      // keeps the rows of a tile off the same cache sets
constexpr int64_t kDzPanel = 96;  // channels of dz that lie together where all of it is kept

template <class T, class A>
struct Backward {
  const AggregateInputs& in;
  const NormVectors<A>& norm;
  const std::vector<A>&m0, &m1;
  const T *dy, *z;
  bool residual;
  const std::vector<bool>& need_dx;
  bool need_dw;
  std::vector<Tensor>& dxs;
  const Kernels<T>& k = kernels<T>();

  T* dx(size_t i) const { return dxs[i].template mutable_data_ptr<T>(); }
  const T* x(size_t i) const { return in.xs[i].template const_data_ptr<T>(); }
  bool any_dx() const { return std::find(need_dx.begin(), need_dx.end(), true) != need_dx.end(); }

  // All of it in bfloat16 instructions, where there are such products for T.
  bool by_bf16([[maybe_unused]] const T* weight, [[maybe_unused]] T* dweight) const {
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      const Bf16Kernels* products = bf16_kernels();
      if (products == nullptr || in.total() == 0 || in.out_channels == 0) return false;
      Bf16Backward(in, *products, {norm, m0, m1, dy, z, weight, residual, need_dx, dxs, dweight}).run();
      return true;
    }
    return false;
  }

  // The same for floats in three parts.
  void by_bf16x3([[maybe_unused]] const Bf16x3Kernels& products, [[maybe_unused]] const T* weight,
                 [[maybe_unused]] const std::vector<A*>& dw, [[maybe_unused]] int64_t slices,
                 [[maybe_unused]] bool whole) const {
    if constexpr (std::is_same_v<T, float>) {
      const Bf16x3Backward run(in, products, {norm, m0, m1, dy, z, weight, residual, need_dx, dxs, dw});
      whole ? run.whole() : run.by_tiles(slices);
    }
  }

  // Rows of b as the GEMM may read them: in place where they are A and end on a vector, else widened into scratch.
  Strided<const A> operand(const T* data, int64_t rows, int64_t cols, A* scratch) const {
    if constexpr (std::is_same_v<T, A>) {
      if (cols * sizeof(A) % 64 == 0) return {data, cols};
    }
    const int64_t ld = round_up(cols, kPad);
    k.load({data, cols}, {scratch, ld}, rows, cols);
    return {scratch, ld};
  }

  // dx tile = (residual gradient) + product; written in place where dx is A.
  void write_dx(Gemm<A> g, const A* du, int64_t ld_du, T* to, int64_t ld, A* scratch) const {
    if constexpr (std::is_same_v<T, A>) {
      g.c = to;
      g.ldc = ld;
    } else {
      g.c = scratch;
      g.ldc = g.n;
    }
    g.add = du != nullptr;
    if (du != nullptr) {
      for (int64_t r = 0; r < g.m; ++r) std::copy_n(du + r * ld_du, g.n, g.c + r * g.ldc);
    }
    k.gemm(g);
    if constexpr (!std::is_same_v<T, A>) k.store({scratch, g.n}, {to, ld}, g.m, g.n);
  }

  // With few pixels and many channels (`whole`) dz is kept for all pixels and dW computed from it at the end: a dW for
  // every thread, read and written once per tile, would cost more. Else dz lives in a tile and feeds both products.
  void channels_last(const T* weight, const std::vector<A*>& dw, int64_t slices, bool whole) const {
    const int64_t total = in.total(), n = in.out_channels, depth = in.in_channels;
    const int64_t per_slice = divide_up(total, slices);
    const int64_t rows_max = round_up(divide_up(per_slice, divide_up(per_slice, 126)), 6);
    // Across all pixels the product for dW reads a few channels of every row of dz: in whole rows each is a page away.
    const int64_t width = whole ? kDzPanel : n, ld = whole ? kDzPanel : round_up(n, kPad) + kPad;
    const int64_t dz_panels = divide_up(n, width), panel_size = total * ld;
    // W_i in panels of kPanel input channels, [N][kPanel] each: the right-hand sides of dx_i.
    std::vector<int64_t> panel_at(in.xs.size() + 1, 0);
    int64_t widest = 0;
    for (size_t i = 0; i < in.xs.size(); ++i) {
      panel_at[i + 1] = panel_at[i] + divide_up(in.xs[i].size(1), kPanel);
      widest = std::max(widest, round_up(in.xs[i].size(1), kPad));
    }
    // The input that a panel belongs to, and its first channel there.
    const auto input_of = [&](int64_t panel) -> std::pair<int64_t, int64_t> {
      const int64_t i = std::upper_bound(panel_at.begin(), panel_at.end(), panel) - panel_at.begin() - 1;
      return {i, (panel - panel_at[i]) * kPanel};
    };
    const Scratch<A> packed(any_dx() ? panel_at.back() * n * kPanel : 0, depth != panel_at.back() * kPanel);
    if (any_dx()) {
      parallel(panel_at.back(), n * kPanel, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const auto [i, c] = input_of(panel);
          k.load({weight + in.offsets[i] + c, depth}, {packed.get() + panel * n * kPanel, kPanel}, n,
                 std::min(kPanel, in.xs[i].size(1) - c));
        }
      });
    }
    // dz of a tile of pixels, and of the residual du, as the left-hand side of dx.
    const auto tail_gradient = [&](int64_t first, int64_t rows, A* dz, A* du) {
      for (int64_t c = 0; c < n; c += width) {
        const int64_t at = first * n + c;
        k.apply(Shape{rows, std::min(width, n - c), false}, norm.from(c), m0.data() + c, m1.data() + c, {dy + at, n},
                {z + at, n}, {residual ? x(0) + at : nullptr, n}, {dz + c / width * panel_size, ld},
                {residual ? du + c : nullptr, n});
      }
    };
    // A panel of dx of a tile of pixels.
    const auto input_gradient = [&](int64_t first, int64_t rows, const A* dz, const A* du, int64_t panel, A* dx_tile,
                                    Ahead& ahead) {
      const auto [i, c] = input_of(panel);
      if (!need_dx[i]) return;
      const int64_t channels = in.xs[i].size(1);
      std::vector<Segment<A>> segments;
      for (int64_t p = 0; p < dz_panels; ++p) {
        segments.push_back({dz + p * panel_size, ld, std::min(width, n - p * width)});
      }
      const Gemm<A> g = {rows,
                         std::min(kPanel, channels - c),
                         segments.data(),
                         dz_panels,
                         false,
                         packed.get() + panel * n * kPanel,
                         kPanel,
                         nullptr,
                         0,
                         false,
                         &ahead};
      write_dx(g, residual && i == 0 ? du + c : nullptr, n, dx(i) + first * channels + c, channels, dx_tile);
    };
    if (whole) {
      constexpr int64_t depth_block = 256;
      const Scratch<A> dz(dz_panels * panel_size), du(residual ? total * n : 0);
      constexpr int64_t block = 32;
      parallel_queue(divide_up(total, block), block * n, [&](const auto& take) {
        for (int64_t i = take(); i >= 0; i = take()) {
          tail_gradient(i * block, std::min(block, total - i * block), dz.get() + i * block * ld,
                        du.get() + (residual ? i * block * n : 0));
        }
      });
      const int64_t tile = tile_rows(total, n * depth);
      const Tasks tasks(divide_up(total, tile), any_dx() ? panel_at.back() : 0);
      parallel_queue(tasks.count, tile * n * depth / tasks.groups / 16, [&](const auto& take) {
        const Scratch<A> dx_tile(tile * kPanel);
        for (int64_t task = take(); task >= 0; task = take()) {
          const int64_t first = task / tasks.groups * tile, end = tasks.end(task);
          for (int64_t panel = tasks.begin(task); panel < end; ++panel) {
            const A* next = packed.get() + (panel + 1 < end ? panel + 1 : tasks.begin(task)) * n * kPanel;
            Ahead ahead = Ahead::of<const A>({next, kPanel}, n, kPanel);
            input_gradient(first, std::min(tile, total - first), dz.get() + first * ld,
                           du.get() + (residual ? first * n : 0), panel, dx_tile.get(), ahead);
          }
        }
      });
      parallel_queue(panel_at.back(), total * n * kPanel / 16, [&](const auto& take) {
        const Scratch<A> x_block(depth_block * kPanel, true);
        for (int64_t task = take(); task >= 0; task = take()) {
          const auto [i, c] = input_of(task);
          const int64_t channels = in.xs[i].size(1);
          const int64_t cols = std::min(kPanel, channels - c);
          // Packed, since rows a power of two apart would evict each other from the cache.
          for (int64_t first = 0; first < total; first += depth_block) {
            const int64_t rows = std::min(depth_block, total - first);
            k.load({x(i) + first * channels + c, channels}, {x_block.get(), kPanel}, rows, cols);
            Ahead next = Ahead::of<const T>({x(i) + (first + rows) * channels + c, channels},
                                            std::min(depth_block, total - first - rows), cols);
            for (int64_t p = 0; p < dz_panels; ++p) {
              const Segment<A> across = {dz.get() + p * panel_size + first * ld, ld, rows};
              k.gemm({std::min(width, n - p * width), cols, &across, 1, true, x_block.get(), kPanel,
                      dw[0] + p * width * depth + in.offsets[i] + c, depth, first > 0, &next});
            }
          }
        }
      });
      return;
    }
    at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> dz(rows_max * ld), du(residual ? rows_max * n : 0), wide(rows_max * widest, true),
          dx_tile(rows_max * kPanel);
      Ahead x_ahead;
      for (int64_t slice = begin; slice < end; ++slice) {
        const int64_t start = total * slice / slices, last = total * (slice + 1) / slices;
        for (int64_t first = start; first < last; first += rows_max) {
          const int64_t rows = std::min(rows_max, last - first);
          tail_gradient(first, rows, dz.get(), du.get());
          // x comes into the cache meanwhile, for dW.
          for (int64_t panel = 0; any_dx() && panel < panel_at.back(); ++panel) {
            const auto [i, c] = input_of(panel);
            if (c == 0) {
              const int64_t channels = in.xs[i].size(1);
              x_ahead = need_dw ? Ahead::of<const T>({x(i) + first * channels, channels}, rows, channels) : Ahead{};
            }
            input_gradient(first, rows, dz.get(), du.get(), panel, dx_tile.get(), x_ahead);
          }
          const Segment<A> across = {dz.get(), ld, rows};
          const int64_t next = first + rows, next_rows = std::min(rows_max, last - next);
          Ahead ahead[2] = {Ahead::of<const T>({z + next * n, n}, next_rows, n),
                            Ahead::of<const T>({dy + next * n, n}, next_rows, n)};
          for (size_t i = 0; need_dw && i < in.xs.size(); ++i) {
            const int64_t channels = in.xs[i].size(1);
            const Strided<const A> b = operand(x(i) + first * channels, rows, channels, wide.get());
            k.gemm({n, channels, &across, 1, true, b.data, b.ld, dw[slice] + in.offsets[i], depth, first > start,
                    &ahead[i % 2]});
          }
        }
      }
    });
  }

  void contiguous(const T* weight, const std::vector<A*>& dw, int64_t slices) const {
    const int64_t n = in.out_channels, depth = in.in_channels, pixels = in.pixels;
    const int64_t ld = kPanel + kPad, ld_w = depth + kPad, tiles_per_image = divide_up(pixels, kPanel);
    const int64_t tiles = in.images * tiles_per_image;
    int64_t widest = 0;
    for (const Tensor& t : in.xs) widest = std::max(widest, round_up(t.size(1), kPad));
    const Scratch<A> w(n * ld_w);
    k.load({weight, depth}, {w.get(), ld_w}, n, depth);
    at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
      const Scratch<A> dz(n * ld, true), du(residual ? n * kPanel : 0), across(kPanel * widest, true),
          dx_tile(widest * kPanel);
      for (int64_t slice = begin; slice < end; ++slice) {
        for (int64_t tile = tiles * slice / slices; tile < tiles * (slice + 1) / slices; ++tile) {
          const int64_t image = tile / tiles_per_image, pixel = tile % tiles_per_image * kPanel;
          const int64_t cols = std::min(kPanel, pixels - pixel), at = image * n * pixels + pixel;
          k.apply(Shape{n, cols, true}, norm.from(0), m0.data(), m1.data(), {dy + at, pixels}, {z + at, pixels},
                  {residual ? x(0) + at : nullptr, pixels}, {dz.get(), ld}, {residual ? du.get() : nullptr, kPanel});
          for (size_t i = 0; i < in.xs.size(); ++i) {
            const int64_t channels = in.xs[i].size(1), x_at = image * channels * pixels + pixel;
            if (need_dx[i]) {
              const Segment<A> segment = {w.get() + in.offsets[i], ld_w, n};
              const Gemm<A> g = {channels, cols, &segment, 1, true, dz.get(), ld, nullptr, 0, false};
              write_dx(g, residual && i == 0 ? du.get() : nullptr, kPanel, dx(i) + x_at, pixels, dx_tile.get());
            }
            if (need_dw) {
              const int64_t ld_x = round_up(channels, kPad);
              k.load_transposed({x(i) + x_at, pixels}, {across.get(), ld_x}, channels, cols);
              const Segment<A> segment = {dz.get(), ld, cols};
              k.gemm({n, channels, &segment, 1, false, across.get(), ld_x, dw[slice] + in.offsets[i], depth,
                      tile > tiles * slice / slices});
            }
          }
        }
      }
    });
  }
};

}  // namespace

std::tuple<std::vector<Tensor>, Tensor> aggregate_backward(const Tensor& dy_in, at::TensorList xs, const Tensor& weight,
                                                           const Tensor& z_in, const Tensor& mean, const Tensor& var,
                                                           const OptionalTensor& bn_weight,
                                                           const OptionalTensor& bn_bias, const OptionalTensor& sum_dy,
                                                           const OptionalTensor& sum_dy_xhat, double count, double eps,
                                                           bool residual, std::string_view act, double slope,
                                                           const c10::List<bool>& need_dx_list, bool need_dw) {
  const std::vector<bool> need_dx = need_dx_list.vec();
  const AggregateInputs in(xs, weight);
  const auto format = format_of(in.channels_last);
  const Tensor dy = dy_in.contiguous(format), z = z_in.contiguous(format), w = weight.contiguous();
  const auto options = weight.options().memory_format(std::nullopt);
  std::vector<Tensor> dxs;
  for (size_t i = 0; i < in.xs.size(); ++i) {
    dxs.push_back(need_dx[i] ? empty_output(in.xs[i].sizes(), options.memory_format(format)) : at::empty({0}, options));
  }
  Tensor dweight = need_dw ? at::empty_like(weight) : at::empty({0}, options);
  want_huge_pages(dweight.mutable_data_ptr(), dweight.nbytes());
  const int64_t size = in.out_channels * in.in_channels;
  // A slice must be worth a thread, since it costs a private dW, and must have a tile, since its first one writes that.
  const int64_t tiles = in.channels_last ? in.total() / 24 : in.images * divide_up(in.pixels, kPanel);
  const int64_t slices = std::clamp<int64_t>(std::min(tiles, in.total() * size / (1 << 18)), 1, at::get_num_threads());
  DLA_DISPATCH_FLOATING(weight.scalar_type(), "aggregate_backward", [&] {
    using A = acc_t<scalar_t>;
    const NormVectors<A> norm(mean, var, std::nullopt, bn_weight, bn_bias, eps, act, slope);
    const std::vector<A> m0 = batch_term<A>(sum_dy, count, in.out_channels),
                         m1 = batch_term<A>(sum_dy_xhat, count, in.out_channels);
    const Backward<scalar_t, A> run = {
        in, norm, m0, m1, dy.const_data_ptr<scalar_t>(), z.const_data_ptr<scalar_t>(), residual, need_dx, need_dw, dxs};
    if (run.by_bf16(w.const_data_ptr<scalar_t>(), need_dw ? dweight.mutable_data_ptr<scalar_t>() : nullptr)) return;
    const Bf16x3Kernels* split = std::is_same_v<scalar_t, float> ? bf16x3_for(in) : nullptr;
    const bool whole =
        (in.channels_last || split != nullptr) && need_dw && 2 * slices * in.in_channels > 3 * in.total();
    const int64_t sums = whole ? 1 : slices;
    // The first sum is formed in its place where that holds A. A 1x1 weight's values lie in the same order in every
    // memory format it can have.
    constexpr bool in_place = std::is_same_v<scalar_t, A>;
    scalar_t* out = dweight.mutable_data_ptr<scalar_t>();
    const Scratch<A> scratch(need_dw ? (in_place ? sums - 1 : sums) * size : 0);
    std::vector<A*> dw;
    for (int64_t s = 0; need_dw && s < sums; ++s) dw.push_back(scratch.get() + (in_place ? s - 1 : s) * size);
    if (need_dw && in_place) dw[0] = reinterpret_cast<A*>(out);
    if (in.total() > 0 && in.out_channels > 0) {
      if (split != nullptr) {
        run.by_bf16x3(*split, w.const_data_ptr<scalar_t>(), dw, slices, whole);
      } else if (in.channels_last) {
        run.channels_last(w.const_data_ptr<scalar_t>(), dw, slices, whole);
      } else {
        run.contiguous(w.const_data_ptr<scalar_t>(), dw, slices);
      }
    }
    if (need_dw) {
      if (in.total() == 0) std::fill_n(dw[0], size, A(0));
      at::parallel_for(0, size, 16384, [&](int64_t begin, int64_t end) {
        for (int64_t s = 1; in.total() > 0 && s < sums; ++s) {
          for (int64_t i = begin; i < end; ++i) dw[0][i] += dw[s][i];
        }
        if constexpr (!in_place) run.k.store({dw[0] + begin, 0}, {out + begin, 0}, 1, end - begin);
      });
    }
  });
  return {std::move(dxs), dweight};
}

}  // namespace dla_fast::cpu
