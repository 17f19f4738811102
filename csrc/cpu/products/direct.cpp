// Forward of the direct convolution (direct.h).

#include "direct.h"

namespace dla_fast::cpu {

RowGrid::RowGrid(int64_t images, int64_t height, int64_t width, int64_t stride, int64_t span, int64_t inputs,
                 int64_t outputs, bool rowwise)
    : images(images), height(height), width(width), together(1) {
  // What a block reads and writes is to stay in the second-level cache, beside its part of the weight.
  constexpr int64_t read = 5 << 14, written = 1 << 14, few = 96;
  const int64_t pixels = written / std::min(outputs, kPanel);
  const auto side = [&](int64_t n) { return (n - 1) * stride + span; };
  const auto fitting = [&](int64_t other, int64_t most) {
    int64_t n = most;
    while (n > 1 && side(n) * other * inputs > read) n = divide_up(n, 2);
    return std::max<int64_t>(n, 1);
  };
  cols = fitting(span, std::min(width, pixels));
  cols = divide_up(width, divide_up(width, cols));
  col_blocks = divide_up(width, cols);
  // The weight passes by with every row, and has to be near for that.
  by_rows = rowwise && outputs <= kPanel && cols >= few && span * span * inputs * outputs <= written;
  rows = fitting(side(cols), by_rows ? height : std::clamp<int64_t>(pixels / cols, 1, height));
  // Enough of them for every thread, and as many pixels as are worth passing the weight by.
  const int64_t least = divide_up(few, cols), wanted = divide_up(4 * thread_count(), images * col_blocks);
  rows = std::clamp<int64_t>(height / wanted, std::min(rows, least), rows);
  rows = divide_up(height, divide_up(height, rows));
  row_blocks = divide_up(height, rows);
  if (row_blocks * col_blocks == 1) {
    const int64_t fit = 4 * read / std::max<int64_t>(side(rows) * side(cols) * inputs, 1);
    together =
        std::clamp<int64_t>(few / (rows * cols), 1, std::max<int64_t>(std::min(fit, images / thread_count()), 1));
  }
}

RowGrid::Block RowGrid::operator[](int64_t i) const {
  const int64_t w = i % col_blocks * cols, h = i / col_blocks % row_blocks * rows,
                image = i / col_blocks / row_blocks * together;
  return {image, h, w, std::min(together, images - image), std::min(rows, height - h), std::min(cols, width - w)};
}

template <class T>
Direct<T>::Direct(const Inputs<T>& in, bool rowwise)
    : in_(in),
      window_(in),
      grid_(in.images, in.height, in.width, in.stride, window_.span(), in.in_channels, in.out_channels, rowwise) {
  for (const Input<T>& x : in.xs) {
    maps_.push_back({x.data, x.channels, x.height, x.width, in.channels_last, x.ending});
  }
}

template <class T>
int64_t Direct<T>::packed_bytes() const {
  return divide_up(in_.out_channels, kPanel) * width() * in_.taps() * in_.in_channels * static_cast<int64_t>(sizeof(A));
}

// Panel by panel [input][tap][channel][width()].
template <class T>
void Direct<T>::pack(void* to) const {
  const auto& k = kernels<T>();
  const int64_t taps = in_.taps(), depth = taps * in_.in_channels, inputs = in_.count(), ld = width();
  A* const packed = static_cast<A*>(to);
  parallel(divide_up(in_.out_channels, kPanel) * inputs, depth * ld / inputs, [&](int64_t begin, int64_t end) {
    const Scratch<A> work(in_.taps_first ? 0 : depth * ld);
    for (int64_t task = begin; task < end; ++task) {
      const Input<T>& x = in_.xs[task % inputs];
      const int64_t n = task / inputs * kPanel, cols = std::min(kPanel, in_.out_channels - n);
      A* const panel = packed + (task / inputs * depth + taps * x.offset) * ld;
      if (in_.taps_first) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          k.load_transposed({in_.weight + n * depth + tap * in_.in_channels + x.offset, depth},
                            {panel + tap * x.channels * ld, ld}, cols, x.channels);
        }
        continue;
      }
      k.load_transposed({in_.weight + n * depth + x.offset * taps, depth}, {work.get(), ld}, cols, x.channels * taps);
      for (int64_t c = 0; c < x.channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          std::copy_n(work.get() + (c * taps + tap) * ld, cols, panel + (tap * x.channels + c) * ld);
        }
      }
    }
  });
}

// The rows that what comes after this part takes besides.
template <class T>
Ahead Direct<T>::below(const RowGrid::Block& part) const {
  const Map<T>& x = maps_[0];
  const int64_t h = part.h * window_.stride - window_.padding() + window_.side(part.height), row = x.width * x.channels;
  if (!x.channels_last || h >= x.height) return {};
  return Ahead::of<const T>({x.data + (part.image * x.height + h) * row, 0}, 1,
                            std::min(part.height * window_.stride, x.height - h) * row);
}

template <class T>
void Direct<T>::multiply(A* out, const Finish<A>* finish, Epilogue<A> epilogue) const {
  const int64_t kernel = window_.kernel, dilation = window_.dilation, stride = window_.stride, ld = width();
  const int64_t depth = in_.taps() * in_.in_channels, n = in_.out_channels;
  const int64_t rows = window_.side(grid_.rows), cols = window_.side(grid_.cols), area = rows * cols,
                most = grid_.together * (grid_.by_rows ? 1 : grid_.rows) * grid_.cols;
  const bool direct = out != nullptr && this->in_place();
  const PackedWeight<A> packed(*this, in_);
  const Tasks tasks(grid_.count(), divide_up(n, kPanel));
  const auto loop = [&](const Take& take) {
    const Scratch<A> patch(grid_.together * area * in_.in_channels), z(direct ? 0 : most * ld),
        transposed(in_.channels_last ? 0 : most * ld);
    std::vector<Segment<A>> segments;
    // `first`: of the block's rows. Those above it have been computed, so that some of its pixels are there.
    const auto compute = [&](int64_t task, const RowGrid::Block& part, int64_t first) {
      const int64_t there = first == 0 ? 0 : std::max<int64_t>(window_.span() - stride, 0);
      segments.clear();
      for (size_t i = 0; i < maps_.size(); ++i) {
        const int64_t channels = maps_[i].channels, row = cols * channels;
        A* const at = patch.get() + grid_.together * area * in_.xs[i].offset + first * stride * row;
        for (int64_t q = 0; q < part.images; ++q) {
          maps_[i].gather(part.image + q, part.h * stride - window_.padding() + there,
                          part.w * stride - window_.padding(), window_.side(part.height) - there, cols, 0, channels,
                          at + q * area * channels + there * row);
        }
        for (int64_t y = 0; y < kernel; ++y) {
          // A row of taps that lie side by side is one run of values.
          const int64_t runs = dilation == 1 ? 1 : kernel;
          for (int64_t x = 0; x < runs; ++x) {
            segments.push_back({at + y * dilation * row + x * dilation * channels, stride * channels,
                                kernel / runs * channels, nullptr, stride * row, area * channels});
          }
        }
      }
      const int64_t lines = part.images * part.height, m = lines * part.width, panel_end = tasks.end(task);
      for (int64_t panel = tasks.begin(task); panel < panel_end; ++panel) {
        const int64_t channel = panel * kPanel, count = std::min(kPanel, n - channel);
        const int64_t next = panel + 1 < panel_end ? panel + 1 : tasks.begin(task);
        Ahead ahead =
            grid_.by_rows ? below(part) : Ahead::of<const A>({packed.get() + next * depth * ld, ld}, depth, count);
        const Strided<A> to = direct ? Strided<A>{out + in_.at(n, part.image, part.h * in_.width + part.w, 0), n}
                                     : Strided<A>{z.get(), ld};
        Gemm<A> gemm = {m,
                        count,
                        segments.data(),
                        static_cast<int64_t>(segments.size()),
                        false,
                        packed.get() + panel * depth * ld,
                        ld,
                        to.data,
                        to.ld,
                        false,
                        &ahead,
                        !grid_.by_rows,
                        lines > 1 ? part.width : 0,
                        part.height};
        if (finish != nullptr) {
          const Finish<A> here = finish->from(channel, in_.at(n, part.image, part.h * in_.width + part.w, channel));
          gemm.finish = &here;
          float_kernels<A>().gemm(gemm);
          continue;
        }
        float_kernels<A>().gemm(gemm);
        const int64_t pieces = part.images * (whole() ? 1 : part.height), pixels = m / pieces;
        for (int64_t r = 0; r < pieces; ++r) {
          const A* const from = to.data + r * pixels * to.ld;
          const int64_t image = part.image + (whole() ? r : r / part.height),
                        h = part.h + (whole() ? 0 : r % part.height),
                        at = in_.at(n, image, h * in_.width + part.w, channel),
                        group = tasks.tile(task) * this->pieces() + first + r;
          if (in_.channels_last) {
            epilogue({{pixels, count, false}, group, channel, at}, Strided<const A>{from, to.ld});
          } else {
            kernels<A>().load_transposed({from, ld}, {transposed.get(), pixels}, pixels, count);
            epilogue({{count, pixels, true}, group, channel, at}, Strided<const A>{transposed.get(), pixels});
          }
        }
      }
    };
    for (int64_t task = take(); task >= 0; task = take()) {
      const RowGrid::Block block = grid_[tasks.tile(task)];
      if (!grid_.by_rows) {
        compute(task, block, 0);
        continue;
      }
      for (int64_t r = 0; r < block.height; ++r) {
        compute(task, {block.image, block.h + r, block.w, 1, 1, block.width}, r);
      }
    }
  };
  parallel_queue(tasks.count, grid_.together * grid_.rows * grid_.cols * depth * divide_up(n, tasks.groups) / 16, loop);
}

template <class T>
bool Direct<T>::infer(const Norm<A>& norm, const T* residual, T* y) const {
  if constexpr (std::is_same_v<T, A>) {
    if (!finishes_pieces() || !Finish<A>::serves(norm)) return false;
    const Finish<A> finish = Finish<A>::of(norm, residual, y, in_.out_channels);
    multiply(nullptr, &finish, [](const Piece&, Strided<const A>) {});
    return true;
  }
  return false;
}

template <class T>
ProductOf<T> direct(const Inputs<T>& in) {
  return std::make_unique<Direct<T>>(in);
}

#define DLA_INSTANTIATE(T)                                                                         \
  template Direct<T>::Direct(const Inputs<T>&, bool);                                              \
  template int64_t Direct<T>::packed_bytes() const;                                                \
  template void Direct<T>::pack(void*) const;                                                      \
  template void Direct<T>::multiply(acc_t<T>*, const Finish<acc_t<T>>*, Epilogue<acc_t<T>>) const; \
  template bool Direct<T>::infer(const Norm<acc_t<T>>&, const T*, T*) const;                       \
  template ProductOf<T> direct(const Inputs<T>&);

DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(c10::BFloat16)
DLA_INSTANTIATE(c10::Half)

}  // namespace dla_fast::cpu
