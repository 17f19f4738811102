// Backward of the direct convolution (direct.h): dx is a direct sum over dz, one for each way that an input's pixel can
// lie between the outputs' strides; dW sums products of the inputs' pixels with dz.

#include "direct.h"
#include "through.h"

namespace dla_fast::cpu {
namespace {

// Which outputs an input's pixels go into, along one axis. Pixel stride * q + phase goes through tap t into output
// q + offset, where that is whole.
struct Phase {
  struct Tap {
    int64_t tap, offset;
  };
  std::vector<Tap> taps;

  Phase(const Window& window, int64_t phase) {
    for (int64_t t = 0; t < window.kernel; ++t) {
      const int64_t at = phase + window.padding() - t * window.dilation;
      const int64_t whole = (at % window.stride + window.stride) % window.stride;
      if (whole == 0) taps.push_back({t, at / window.stride});
    }
  }
};

// Of all phases of an axis: the offsets they reach.
struct Phases {
  std::vector<Phase> of;
  int64_t first = 0, last = 0;

  explicit Phases(const Window& window) {
    for (int64_t phase = 0; phase < window.stride; ++phase) {
      of.emplace_back(window, phase);
      for (const Phase::Tap& tap : of.back().taps) {
        first = std::min(first, tap.offset);
        last = std::max(last, tap.offset);
      }
    }
  }
  int64_t span() const { return last - first + 1; }
};

// Panel by panel [tap][output channel][kPanel input channels].
template <class T>
Scratch<acc_t<T>> adjoint_weight(const Inputs<T>& in, const std::vector<Panel>& panels) {
  using A = acc_t<T>;
  const auto& k = kernels<T>();
  const int64_t taps = in.taps(), n = in.out_channels, depth = in.in_channels;
  Scratch<A> packed(static_cast<int64_t>(panels.size()) * taps * n * kPanel, true);
  parallel(static_cast<int64_t>(panels.size()) * n, taps * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Panel& panel = panels[task / n];
      const T* const row = in.weight + task % n * taps * depth;
      const Strided<A> to = {packed.get() + (task / n * taps * n + task % n) * kPanel, n * kPanel};
      if (in.taps_first) {
        k.load({row + panel.channel, depth}, to, taps, panel.count);
      } else {
        k.load_transposed({row + panel.channel * taps, taps}, to, panel.count, taps);
      }
    }
  });
  return packed;
}

// Pixels of one panel into a map: `step` pixels apart along its rows, du added where it is not null.
template <class T>
void put(const Inputs<T>& in, const Input<T>& x, Strided<const acc_t<T>> z, int64_t pixels, int64_t count,
         int64_t image, int64_t h, int64_t w, int64_t step, int64_t channel, const T* du, T* dx) {
  using A = acc_t<T>;
  const int64_t area = x.height * x.width, pixel = h * x.width + w;
  const int64_t at =
      in.channels_last ? (image * area + pixel) * x.channels + channel : (image * x.channels + channel) * area + pixel;
  const int64_t across = in.channels_last ? step * x.channels : step, down = in.channels_last ? 1 : area;
  if (in.channels_last && du == nullptr) return kernels<T>().store(z, {dx + at, across}, pixels, count);
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t to = at + i * across + c * down;
      dx[to] = static_cast<T>(z.data[i * z.ld + c] + (du == nullptr ? A(0) : static_cast<A>(du[to])));
    }
  }
}

// The same through the ending of the unit before. turned: of a contiguous map, as many values.
template <class T>
void put_through(const Inputs<T>& in, const Input<T>& x, ThroughTiles<T>& through, int64_t group,
                 Strided<const acc_t<T>> dy, int64_t pixels, int64_t count, int64_t image, int64_t h, int64_t w,
                 int64_t step, int64_t channel, acc_t<T>* turned, T* dx) {
  const int64_t area = x.height * x.width, pixel = h * x.width + w;
  if (in.channels_last) {
    through.put({pixels, count, false}, group, channel, (image * area + pixel) * x.channels + channel,
                step * x.channels, dy, dx);
    return;
  }
  kernels<acc_t<T>>().load_transposed(dy, {turned, pixels}, pixels, count);
  through.put({count, pixels, true}, group, channel, (image * x.channels + channel) * area + pixel, area,
              {turned, pixels}, dx);
}

}  // namespace

template <class T>
void Direct<T>::input_gradients(const Gradient<T>& g) const {
  std::vector<Panel> panels;
  for (int64_t i = 0; i < in_.count(); ++i) {
    if (g.dx[i] != nullptr) Panel::add(panels, in_.xs[i].offset, in_.xs[i].channels);
  }
  if (panels.empty()) return;
  const Scratch<A> packed = adjoint_weight(in_, panels);
  const Phases phases(window_);
  const int64_t stride = window_.stride, n = in_.out_channels, taps = in_.taps();
  const int64_t height = in_.xs[0].height, width = in_.xs[0].width;
  const RowGrid grid(in_.images, divide_up(height, stride), divide_up(width, stride), 1, phases.span(), n,
                     in_.in_channels);
  const int64_t rows = grid.rows + phases.span() - 1, cols = grid.cols + phases.span() - 1, area = rows * cols * n,
                most = grid.together * grid.rows * grid.cols;
  const Map<T> dz = {g.dz, n, in_.height, in_.width, in_.channels_last, nullptr, g.dz_on_load()};
  const Tasks tasks(grid.count(), static_cast<int64_t>(panels.size()));
  ThroughTiles<T> through(g, tasks.tiles);
  parallel_queue(
      tasks.count, most * taps * n * divide_up(tasks.panels, tasks.groups) * kPanel / 16, [&](const Take& take) {
        const Scratch<A> patch(grid.together * area), z(most * kPanel);
        const Scratch<A> turned(in_.channels_last ? 0 : grid.cols * kPanel);
        std::vector<Segment<A>> segments;
        for (int64_t task = take(); task >= 0; task = take()) {
          const RowGrid::Block block = grid[tasks.tile(task)];
          for (int64_t q = 0; q < block.images; ++q) {
            dz.gather(block.image + q, block.h + phases.first, block.w + phases.first, rows, cols, 0, n,
                      patch.get() + q * area);
          }
          for (int64_t p = tasks.begin(task); p < tasks.end(task); ++p) {
            int64_t i = in_.count() - 1;
            while (in_.xs[i].offset > panels[p].channel) --i;
            const Input<T>& x = in_.xs[i];
            for (int64_t phase = 0; phase < stride * stride; ++phase) {
              const int64_t y0 = phase / stride, x0 = phase % stride;
              const int64_t high = std::min(block.height, divide_up(height - y0, stride) - block.h),
                            wide = std::min(block.width, divide_up(width - x0, stride) - block.w);
              if (high <= 0 || wide <= 0) continue;
              segments.clear();
              for (const Phase::Tap& v : phases.of[y0].taps) {
                for (const Phase::Tap& u : phases.of[x0].taps) {
                  segments.push_back({patch.get() + ((v.offset - phases.first) * cols + u.offset - phases.first) * n, n,
                                      n, packed.get() + (p * taps + v.tap * window_.kernel + u.tap) * n * kPanel,
                                      cols * n, area});
                }
              }
              float_kernels<A>().gemm({block.images * high * wide, panels[p].count, segments.data(),
                                       static_cast<int64_t>(segments.size()), false, nullptr, kPanel, z.get(), kPanel,
                                       false, nullptr, true, wide, high});
              for (int64_t r = 0; r < block.images * high; ++r) {
                const Strided<const A> from = {z.get() + r * wide * kPanel, kPanel};
                const int64_t image = block.image + r / high, h = (block.h + r % high) * stride + y0,
                              w = block.w * stride + x0, channel = panels[p].channel - x.offset;
                if (through.takes(i)) {
                  put_through<T>(in_, x, through, tasks.tile(task), from, wide, panels[p].count, image, h, w, stride,
                                 channel, turned.get(), g.dx[i]);
                  continue;
                }
                put<T>(in_, x, from, wide, panels[p].count, image, h, w, stride, channel, g.adds(i) ? g.du : nullptr,
                       g.dx[i]);
              }
            }
          }
        }
      });
  through.finish();
}

template <class T>
void Direct<T>::weight_gradient(const Gradient<T>& g) const {
  // What is summed at a time stays in the second-level cache while the map passes by.
  constexpr int64_t deep = 64, wide = 128;
  const int64_t kernel = window_.kernel, dilation = window_.dilation, stride = window_.stride, taps = in_.taps();
  const RowGrid grid(in_.images, in_.height, in_.width, stride, window_.span(), std::min(deep, in_.in_channels),
                     std::min(wide, in_.out_channels));
  const WeightSums<T> sums(in_, g.dw, grid.count(), deep, wide);
  std::vector<Map<T>> maps;
  for (int64_t i = 0; i < in_.count(); ++i) {
    maps.push_back(
        {g.full[i], in_.xs[i].channels, in_.xs[i].height, in_.xs[i].width, in_.channels_last, in_.xs[i].ending});
  }
  const Map<T> dz = {g.dz, in_.out_channels, in_.height, in_.width, in_.channels_last, nullptr, g.dz_on_load()};
  const int64_t rows = window_.side(grid.rows), cols = window_.side(grid.cols),
                most = grid.together * grid.rows * grid.cols;
  parallel_queue(sums.tasks(), sums.blocks_per_task() * most * taps * deep * wide / 16, [&](const Take& take) {
    const Scratch<A> x(grid.together * rows * cols * deep), dy(most * wide, true), sum(taps * deep * wide),
        ordered(in_.taps_first ? 0 : taps * deep * wide);
    std::vector<Segment<A>> segments;
    for (int64_t task = take(); task >= 0; task = take()) {
      const auto& [input, channel, depth, out, width] = sums.piece(task);
      const int64_t row = cols * depth, area = rows * row, ld = round_up(width, 16);
      for (int64_t b = sums.first_block(task); b < sums.last_block(task); ++b) {
        const RowGrid::Block block = grid[b];
        for (int64_t q = 0; q < block.images; ++q) {
          maps[input].gather(block.image + q, block.h * stride - window_.padding(),
                             block.w * stride - window_.padding(), window_.side(block.height), cols, channel, depth,
                             x.get() + q * area);
          for (int64_t r = 0; r < block.height; ++r) {
            A* const to = dy.get() + (q * block.height + r) * block.width * ld;
            dz.gather_row(block.image + q, block.h + r, block.w, block.width, out, width, {to, ld});
          }
        }
        const int64_t runs = dilation == 1 ? 1 : kernel, m = kernel / runs * depth;
        for (int64_t run = 0; run < kernel * runs; ++run) {
          const int64_t y = run / runs, step = run % runs;
          segments.clear();
          for (int64_t r = 0; r < block.images * block.height; ++r) {
            segments.push_back({x.get() + r / block.height * area + (r % block.height * stride + y * dilation) * row +
                                    step * dilation * depth,
                                stride * depth, block.width, dy.get() + r * block.width * ld});
          }
          float_kernels<A>().gemm({m, width, segments.data(), static_cast<int64_t>(segments.size()), true, dy.get(), ld,
                                   sum.get() + run * m * wide, wide, b > sums.first_block(task)});
        }
      }
      const A* in_order = sum.get();
      if (!in_.taps_first) {
        for (int64_t i = 0; i < taps * depth; ++i) {
          std::copy_n(sum.get() + i * wide, width, ordered.get() + (i % depth * taps + i / depth) * wide);
        }
        in_order = ordered.get();
      }
      sums.store(task, in_order, depth * wide);
    }
  });
  sums.add();
}

template <class T>
void Direct<T>::backward(const Gradient<T>& gradient) const {
  input_gradients(gradient);
  if (gradient.dw != nullptr) weight_gradient(gradient);
}

#define DLA_INSTANTIATE(T) template void Direct<T>::backward(const Gradient<T>&) const;

DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(c10::BFloat16)
DLA_INSTANTIATE(c10::Half)

}  // namespace dla_fast::cpu
