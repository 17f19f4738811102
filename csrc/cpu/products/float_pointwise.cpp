// Forward of the 1x1 product in vector instructions. K = sum of the inputs' channels, N = output channels.
//
// Per pixel: reads K and writes N values where the epilogue does; 2KN flops. A task takes one tile of pixels: every
// input is accumulated in registers. Inference of floats with ReLU applies the tail there, too; else the sums go into a
// tile of z that stays in cache, where the tail is applied (inference) or the moments are taken (training).

#include "float_pointwise.h"

namespace dla_fast::cpu {

// Panel by panel of kPanel output channels the weight transposed, [K][kPanel]; of contiguous tensors as it is, but
// wide.
template <class T>
int64_t FloatPointwise<T>::packed_bytes() const {
  const int64_t values = in_.in_channels * static_cast<int64_t>(sizeof(A));
  if (in_.channels_last) return round_up(in_.out_channels, kPanel) * values;
  return std::is_same_v<T, A> ? 0 : in_.out_channels * values;
}

template <class T>
void FloatPointwise<T>::pack(void* to) const {
  A* const packed = static_cast<A*>(to);
  const int64_t depth = in_.in_channels, n = in_.out_channels;
  if (!in_.channels_last) {
    if (!std::is_same_v<T, A>) kernels<T>().load({in_.weight, depth}, {packed, depth}, n, depth);
    return;
  }
  const int64_t blocks = divide_up(depth, kPanel);
  parallel(divide_up(n, kPanel) * blocks, kPanel * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i / blocks * kPanel, k = i % blocks * kPanel;
      kernels<T>().load_transposed({in_.weight + channel * depth + k, depth},
                                   {packed + (i / blocks * depth + k) * kPanel, kPanel}, std::min(kPanel, n - channel),
                                   std::min(kPanel, depth - k));
    }
  });
}

template <class T>
void FloatPointwise<T>::load(const Input<T>& x, const Shape& shape, int64_t at, Strided<A> to) const {
  const int64_t ld = in_.ld(x.channels);
  if (x.ending != nullptr) return x.ending->form(shape, 0, at, ld, to);
  kernels<T>().load({x.data + at, ld}, to, shape.rows, shape.cols);
}

template <class T>
void FloatPointwise<T>::forward_channels_last(A* out, const Finish<A>* finish, Epilogue<A> epilogue) const {
  const int64_t total = in_.total(), rows_max = rows(), depth = in_.in_channels, n = in_.out_channels;
  const Tasks tasks(divide_up(total, rows_max), divide_up(n, kPanel));
  const PackedWeight<A> packed(*this, in_);
  // Inputs that are no floats, or are formed on load, have to be written before they are multiplied.
  const auto written = [](const Input<T>& x) { return !std::is_same_v<T, A> || x.ending != nullptr; };
  const bool whole = std::any_of(in_.xs.begin(), in_.xs.end(), written);
  parallel_queue(tasks.count, rows_max * depth * divide_up(n, tasks.groups) / 16, [&](const Take& take) {
    const Scratch<A> z(out == nullptr ? rows_max * kPanel : 0), wide(whole ? rows_max * depth : 0);
    std::vector<Segment<A>> segments(in_.xs.size());
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = tasks.tile(task);
      const int64_t first = tile * rows_max, rows = std::min(rows_max, total - first);
      for (size_t i = 0; i < in_.xs.size(); ++i) {
        const int64_t channels = in_.xs[i].channels;
        const T* x = in_.xs[i].data + first * channels;
        A* const to = wide.get() + in_.xs[i].offset;
        if (written(in_.xs[i])) {
          load(in_.xs[i], {rows, channels, false}, first * channels, {to, depth});
          segments[i] = {to, depth, channels};
        } else if constexpr (std::is_same_v<T, A>) {
          segments[i] = {x, channels, channels};
        }
      }
      const int64_t panel_begin = tasks.begin(task), panel_end = tasks.end(task);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        const int64_t channel = panel * kPanel, cols = std::min(kPanel, n - channel), at = first * n + channel;
        const Strided<A> to = out == nullptr ? Strided<A>{z.get(), kPanel} : Strided<A>{out + at, n};
        const int64_t next = panel + 1 < panel_end ? panel + 1 : panel_begin;
        Ahead ahead = Ahead::of<const A>({packed.get() + next * depth * kPanel, kPanel}, depth, kPanel);
        Gemm<A> gemm = {rows,
                        cols,
                        segments.data(),
                        static_cast<int64_t>(segments.size()),
                        false,
                        packed.get() + panel * depth * kPanel,
                        kPanel,
                        to.data,
                        to.ld,
                        false,
                        &ahead,
                        true};
        if (finish != nullptr) {
          const Finish<A> here = finish->from(channel, at);
          gemm.finish = &here;
          float_kernels<A>().gemm(gemm);
          continue;
        }
        float_kernels<A>().gemm(gemm);
        epilogue({{rows, cols, false}, tile, channel, at}, Strided<const A>{to.data, to.ld});
      }
    }
  });
}

// The same for contiguous tensors: a tile is kPanel pixels of one image, whose inputs are packed side by side.
template <class T>
void FloatPointwise<T>::forward_contiguous(A* out, Epilogue<A> epilogue) const {
  constexpr int64_t block = 96;
  const int64_t depth = in_.in_channels, n = in_.out_channels, pixels = in_.pixels(),
                tiles_per_image = divide_up(pixels, kPanel);
  const Tasks tasks(in_.images * tiles_per_image, divide_up(n, block));
  const PackedWeight<A> wide(*this, in_);
  const A* w = wide.get();
  if constexpr (std::is_same_v<T, A>) w = in_.weight;
  parallel_queue(tasks.count, kPanel * depth * divide_up(n, tasks.groups) / 16, [&](const Take& take) {
    const Scratch<A> z(block * kPanel), x_panel(depth * kPanel, pixels % kPanel != 0);
    for (int64_t task = take(); task >= 0; task = take()) {
      const int64_t tile = tasks.tile(task);
      const int64_t image = tile / tiles_per_image, pixel = tile % tiles_per_image * kPanel;
      const int64_t cols = std::min(kPanel, pixels - pixel);
      for (const Input<T>& x : in_.xs) {
        load(x, {x.channels, cols, true}, image * x.channels * pixels + pixel,
             {x_panel.get() + x.offset * kPanel, kPanel});
      }
      for (int64_t b = tasks.begin(task); b < tasks.end(task); ++b) {
        const int64_t channel = b * block, rows = std::min(block, n - channel);
        const Segment<A> segment = {w + channel * depth, depth, depth};
        const int64_t at = (image * n + channel) * pixels + pixel;
        const Strided<A> to = out == nullptr ? Strided<A>{z.get(), kPanel} : Strided<A>{out + at, pixels};
        float_kernels<A>().gemm({rows, cols, &segment, 1, false, x_panel.get(), kPanel, to.data, to.ld, false});
        epilogue({{rows, cols, true}, tile, channel, at}, Strided<const A>{to.data, to.ld});
      }
    }
  });
}

template <class T>
void FloatPointwise<T>::forward(A* out, Epilogue<A> epilogue) const {
  in_.channels_last ? forward_channels_last(out, nullptr, epilogue) : forward_contiguous(out, epilogue);
}

template <class T>
bool FloatPointwise<T>::infer(const Norm<A>& norm, const T* residual, T* y) const {
  if constexpr (std::is_same_v<T, A>) {
    if (!in_.channels_last || !Finish<A>::serves(norm)) return false;
    const Finish<A> finish = Finish<A>::of(norm, residual, y, in_.out_channels);
    forward_channels_last(nullptr, &finish, [](const Piece&, Strided<const A>) {});
    return true;
  }
  return false;
}

template <class T>
ProductOf<T> float_pointwise(const Inputs<T>& in) {
  return std::make_unique<FloatPointwise<T>>(in);
}

#define DLA_INSTANTIATE(T)                                                           \
  template void FloatPointwise<T>::forward(acc_t<T>*, Epilogue<acc_t<T>>) const;     \
  template bool FloatPointwise<T>::infer(const Norm<acc_t<T>>&, const T*, T*) const; \
  template ProductOf<T> float_pointwise(const Inputs<T>&);

DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(c10::BFloat16)
DLA_INSTANTIATE(c10::Half)

}  // namespace dla_fast::cpu
