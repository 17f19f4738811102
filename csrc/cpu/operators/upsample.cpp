// The learned upsampling and its backward, CPU.
//
// Per low-resolution value: forward reads 1 and writes f^2 (upsample_add reads f^2 more), 8f^2 flops; backward reads
// 1 + f^2 and writes 1, 16f^2 flops. Every output is a sum of 2 x 2 products, so all of it is bound by memory. A task
// is a row (channels_last) or a plane (contiguous), whole where the factor allows; in the backward the rows of dy that
// a row of x went into give its dx and their part of dw while they are in cache.

#include "upsample.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../shared/parallel.h"
#include "../shared/upsampling.h"

namespace dla_fast::cpu {
namespace {

template <class T>
struct Maps {
  const T *x, *dy_or_skip;
  T* out;
  int64_t images, channels, height, width, out_height, out_width, factor;

  int64_t planes(bool channels_last) const { return channels_last ? images : images * channels; }
  int64_t depth(bool channels_last) const { return channels_last ? channels : 1; }
};

template <class T>
void forward(const Maps<T>& m, const T* weight, bool channels_last) {
  using A = acc_t<T>;
  const auto& k = kernels<T>();
  const int64_t f = m.factor, depth = m.depth(channels_last), in_row = m.width * depth, out_row = m.out_width * depth;
  const Scratch<A> w = pack_up_weight<T, A>(weight, m.channels, f, channels_last);
  const int64_t weight_row = 2 * f * depth;
  // Rows of one channel are too short to be taken one by one.
  const int64_t rows = m.planes(channels_last) * m.out_height, each = channels_last ? 1 : m.out_height;
  parallel_queue(rows / each, 2 * out_row * each, [&](const Take& take) {
    const Scratch<A> near(in_row), far(in_row), skip(out_row), out(out_row),
        work(channels_last ? depth : plane_scratch(m.width, f), true);
    const auto write_row = [&](int64_t row) {
      const int64_t plane = row / m.out_height, o = row % m.out_height;
      const int64_t i = (o + f / 2) / f, ky = (o + f / 2) % f;
      const T* x = m.x + plane * m.height * in_row;
      const A* taps = w.get() + (channels_last ? 0 : plane % m.channels * 4 * f * f);
      const int64_t at = (plane * m.out_height + o) * out_row;
      UpRow<A> u = {};
      u.near = row_of<T, A>(i < m.height ? x + i * in_row : nullptr, in_row, near.get());
      u.far = row_of<T, A>(i > 0 ? x + (i - 1) * in_row : nullptr, in_row, far.get());
      u.weight_near = taps + ky * weight_row;
      u.weight_far = taps + (ky + f) * weight_row;
      u.skip = row_of<T, A>(m.dy_or_skip == nullptr ? nullptr : m.dy_or_skip + at, out_row, skip.get());
      if constexpr (std::is_same_v<T, A>) {
        u.out = m.out + at;
      } else {
        u.out = out.get();
      }
      u.width = m.width;
      u.channels = depth;
      u.factor = f;
      u.end = m.out_width;
      u.scratch = work.get();
      channels_last ? k.up_row(u) : k.up_row_plane(u);
      if constexpr (!std::is_same_v<T, A>) k.store({out.get(), out_row}, {m.out + at, out_row}, 1, out_row);
    };
    for (int64_t task = take(); task >= 0; task = take()) {
      for (int64_t row = task * each; row < (task + 1) * each; ++row) write_row(row);
    }
  });
}

template <class T>
void backward(const Maps<T>& m, const T* weight, bool channels_last, T* dx, T* dw_out) {
  using A = acc_t<T>;
  const auto& k = kernels<T>();
  const int64_t f = m.factor, depth = m.depth(channels_last), in_row = m.width * depth, out_row = m.out_width * depth;
  const int64_t taps = 4 * f * f, planes = m.planes(channels_last);
  const Scratch<A> w = pack_up_weight<T, A>(weight, m.channels, f, channels_last);
  // Sums of dw over fixed slices of the rows (channels_last) or the images, added in order: the same on any number of
  // threads. A slice of contiguous maps is one channel, over all images.
  const int64_t rows = planes * m.height;
  const int64_t slices = channels_last ? std::clamp<int64_t>(rows / 8, 1, 16) : m.channels;
  std::vector<double> dw(dw_out == nullptr ? 0 : (channels_last ? slices * taps * depth : m.channels * taps), 0.0);
  parallel_queue(slices, 4 * m.images * m.channels * m.out_height * m.out_width / slices, [&](const Take& take) {
    const Scratch<A> wide_x(in_row), wide_dy(std::is_same_v<T, A> ? 0 : 2 * f * out_row), wide_dx(in_row),
        work(channels_last ? taps * depth : plane_scratch(m.width, f), true);
    std::vector<const A*> dy(2 * f);
    for (int64_t slice = take(); slice >= 0; slice = take()) {
      const int64_t begin = channels_last ? rows * slice / slices : 0;
      const int64_t end = channels_last ? rows * (slice + 1) / slices : m.images * m.height;
      for (int64_t r = begin; r < end; ++r) {
        const int64_t row = channels_last ? r : (r / m.height * m.channels + slice) * m.height + r % m.height;
        const int64_t plane = row / m.height, i = row % m.height;
        for (int64_t ky = 0; ky < 2 * f; ++ky) {
          const int64_t o = i * f - f / 2 + ky;
          const bool inside = o >= 0 && o < m.out_height;
          dy[ky] = row_of<T, A>(inside ? m.dy_or_skip + (plane * m.out_height + o) * out_row : nullptr, out_row,
                                wide_dy.get() + ky * out_row);
        }
        UpRowBackward<A> u = {};
        u.dy = dy.data();
        u.x = row_of<T, A>(m.x + row * in_row, in_row, wide_x.get());
        u.weight = w.get() + (channels_last ? 0 : slice * taps);
        if (dx != nullptr) {
          if constexpr (std::is_same_v<T, A>) {
            u.dx = dx + row * in_row;
          } else {
            u.dx = wide_dx.get();
          }
        }
        u.dw = dw_out == nullptr ? nullptr : dw.data() + slice * taps * depth;
        u.width = m.width;
        u.out_width = m.out_width;
        u.channels = depth;
        u.factor = f;
        u.scratch = work.get();
        // Sums of few rows before they go on in double.
        u.flush = r % 16 == 15 || r == end - 1;
        if (std::is_same_v<T, A> && i + 1 < m.height) {
          const int64_t next = (i + 1) * f - f / 2 + f;
          if (next + f <= m.out_height) {
            u.ahead = reinterpret_cast<const char*>(m.dy_or_skip + (plane * m.out_height + next) * out_row);
          }
        }
        channels_last ? k.up_row_backward(u) : k.up_row_plane_backward(u);
        if constexpr (!std::is_same_v<T, A>) {
          if (dx != nullptr) k.store({wide_dx.get(), in_row}, {dx + row * in_row, in_row}, 1, in_row);
        }
      }
    }
  });
  if (dw_out == nullptr) return;
  std::vector<double> sum(depth);
  for (int64_t t = 0; t < taps; ++t) {
    if (!channels_last) {
      for (int64_t c = 0; c < m.channels; ++c) dw_out[c * taps + t] = static_cast<T>(static_cast<A>(dw[c * taps + t]));
      continue;
    }
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t s = 0; s < slices; ++s) {
      for (int64_t c = 0; c < depth; ++c) sum[c] += dw[(s * taps + t) * depth + c];
    }
    for (int64_t c = 0; c < depth; ++c) dw_out[c * taps + t] = static_cast<T>(static_cast<A>(sum[c]));
  }
}

bool whole_planes(bool channels_last, int64_t factor) {
  return !channels_last && (factor == 2 || factor == 4 || factor == 8);
}

template <class T>
void forward_planes(const Maps<T>& m, const T* weight) {
  using A = acc_t<T>;
  const auto& k = kernels<T>();
  const int64_t f = m.factor, width = round_up(m.width, kPlaneMargin), out_width = f * width;
  const Scratch<A> w = pack_up_weight<T, A>(weight, m.channels, f, false);
  // In place where rows are whole vectors of A; else so many are padded or widened at a time.
  const bool direct = std::is_same_v<T, A> && width == m.width;
  const int64_t band = direct ? m.height + 1 : std::clamp<int64_t>(8192 / (f * out_width), 1, m.height + 1);
  const int64_t in_values = direct ? 0 : (band + 1) * width, out_values = direct ? 0 : band * f * out_width;
  parallel_queue(m.planes(false), 2 * m.out_height * m.out_width, [&](const Take& take) {
    const Scratch<A> zeros(width, true), x(in_values, true), out(out_values),
        skip(m.dy_or_skip == nullptr ? 0 : out_values, true);
    for (int64_t plane = take(); plane >= 0; plane = take()) {
      const T* from = m.x + plane * m.height * m.width;
      for (int64_t begin = 0; begin <= m.height; begin += band) {
        const int64_t end = std::min(begin + band, m.height + 1);
        const int64_t first = std::max<int64_t>(begin * f - f / 2, 0), last = std::min(end * f - f / 2, m.out_height);
        const int64_t at = (plane * m.out_height + first) * m.out_width, before = begin > 0 ? 1 : 0;
        UpPlane<A> u = {};
        u.weight = w.get() + plane % m.channels * 4 * f * f;
        u.height = m.height;
        u.width = width;
        u.factor = f;
        u.begin = begin;
        u.end = end;
        u.zeros = zeros.get();
        if constexpr (std::is_same_v<T, A>) {
          u.x = from + begin * width;
          u.skip = m.dy_or_skip == nullptr ? nullptr : m.dy_or_skip + at;
          u.out = m.out + at;
        }
        if (!direct) {
          k.load({from + (begin - before) * m.width, m.width}, {x.get(), width},
                 std::min(end, m.height) - begin + before, m.width);
          u.x = x.get() + before * width;
          if (m.dy_or_skip != nullptr) {
            k.load({m.dy_or_skip + at, m.out_width}, {skip.get(), out_width}, last - first, m.out_width);
            u.skip = skip.get();
          }
          u.out = out.get();
        }
        k.up_plane(u);
        if (!direct) k.store({out.get(), out_width}, {m.out + at, m.out_width}, last - first, m.out_width);
      }
    }
  });
}

// A task is one channel, over all images: the only one that adds to its dw.
template <class T>
void backward_planes(const Maps<T>& m, const T* weight, T* dx, T* dw_out) {
  using A = acc_t<T>;
  const auto& k = kernels<T>();
  const int64_t f = m.factor, taps = 4 * f * f, width = round_up(m.width, kPlaneMargin), out_width = f * width;
  const Scratch<A> w = pack_up_weight<T, A>(weight, m.channels, f, false);
  const bool direct = std::is_same_v<T, A> && width == m.width;
  // Rows whose dy by phases fits the first-level cache.
  const int64_t band =
      std::clamp<int64_t>(4096 / (f * f * (width + kPlaneMargin)), std::min<int64_t>(m.height, 4), m.height);
  parallel_queue(m.channels, 4 * m.images * m.out_height * m.out_width, [&](const Take& take) {
    const Scratch<A> work(plane_backward_scratch(width, f, band), true), x(direct ? 0 : band * width, true),
        wide_dx(direct ? 0 : band * width), dy(direct ? 0 : (band + 1) * f * out_width, true);
    std::vector<double> dw(taps);
    for (int64_t channel = take(); channel >= 0; channel = take()) {
      std::fill(dw.begin(), dw.end(), 0.0);
      for (int64_t row = 0; row < m.images * m.height;) {
        const int64_t plane = row / m.height * m.channels + channel, begin = row % m.height;
        const int64_t end = std::min(begin + band, m.height), rows = end - begin;
        const int64_t first = std::max<int64_t>(begin * f - f / 2, 0), last = std::min(end * f + f / 2, m.out_height);
        const int64_t in = (plane * m.height + begin) * m.width, out = (plane * m.out_height + first) * m.out_width;
        UpPlaneBackward<A> u = {};
        u.weight = w.get() + channel * taps;
        u.dw = dw_out == nullptr ? nullptr : dw.data();
        u.height = m.height;
        u.width = width;
        u.factor = f;
        u.begin = begin;
        u.end = end;
        u.scratch = work.get();
        if constexpr (std::is_same_v<T, A>) {
          u.dy = m.dy_or_skip + out;
          u.x = m.x + in;
          u.dx = dx == nullptr ? nullptr : dx + in;
        }
        if (!direct) {
          k.load({m.dy_or_skip + out, m.out_width}, {dy.get(), out_width}, last - first, m.out_width);
          if (dw_out != nullptr) k.load({m.x + in, m.width}, {x.get(), width}, rows, m.width);
          u.dy = dy.get();
          u.x = x.get();
          u.dx = dx == nullptr ? nullptr : wide_dx.get();
        }
        k.up_plane_backward(u);
        if (!direct && dx != nullptr) k.store({wide_dx.get(), width}, {dx + in, m.width}, rows, m.width);
        row += rows;
      }
      for (int64_t t = 0; dw_out != nullptr && t < taps; ++t) {
        dw_out[channel * taps + t] = static_cast<T>(static_cast<A>(dw[t]));
      }
    }
  });
}

template <class T>
Maps<T> maps(const Tensor& x, int64_t factor) {
  return {x.const_data_ptr<T>(),
          nullptr,
          nullptr,
          x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          upsampled(x.size(2), factor),
          upsampled(x.size(3), factor),
          factor};
}

}  // namespace

Tensor upsample_in(bool channels_last, const Tensor& x_in, const OptionalTensor& skip_in, const Tensor& weight_in,
                   int64_t factor) {
  const Tensor x = arranged(x_in, channels_last), weight = weight_in.contiguous();
  const OptionalTensor skip = arranged(skip_in, channels_last);
  Tensor y =
      empty_map(x, {x.size(0), x.size(1), upsampled(x.size(2), factor), upsampled(x.size(3), factor)}, channels_last);
  if (y.numel() == 0) return y;
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Maps<T> m = maps<T>(x, factor);
    m.dy_or_skip = data_or_null<T>(skip);
    m.out = y.mutable_data_ptr<T>();
    const T* w = weight.const_data_ptr<T>();
    whole_planes(channels_last, factor) ? forward_planes(m, w) : forward(m, w, channels_last);
  });
  return y;
}

Tensor upsample(const Tensor& x, const Tensor& weight, int64_t factor) {
  return upsample_in(is_channels_last(x), x, std::nullopt, weight, factor);
}

Tensor upsample_add(const Tensor& x, const Tensor& skip, const Tensor& weight, int64_t factor) {
  return upsample_in(is_channels_last(x), x, skip, weight, factor);
}

std::tuple<Tensor, Tensor> upsample_backward_in(bool channels_last, const Tensor& dy_in, const Tensor& x_in,
                                                const Tensor& weight_in, int64_t factor, bool need_dx, bool need_dw) {
  const Tensor x = arranged(x_in, channels_last), dy = arranged(dy_in, channels_last), weight = weight_in.contiguous();
  Tensor dx = need_dx ? empty_map(x, x.sizes(), channels_last) : nothing(x);
  Tensor dw = need_dw ? at::empty(weight.sizes(), x.options()) : nothing(x);
  if (dy.numel() == 0 || !(need_dx || need_dw)) {
    if (need_dx) dx.zero_();
    if (need_dw) dw.zero_();
    return {dx, dw};
  }
  dispatch(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Maps<T> m = maps<T>(x, factor);
    m.dy_or_skip = dy.const_data_ptr<T>();
    const T* w = weight.const_data_ptr<T>();
    T* to_dx = need_dx ? dx.mutable_data_ptr<T>() : nullptr;
    T* to_dw = need_dw ? dw.mutable_data_ptr<T>() : nullptr;
    whole_planes(channels_last, factor) ? backward_planes(m, w, to_dx, to_dw)
                                        : backward(m, w, channels_last, to_dx, to_dw);
  });
  return {dx, dw};
}

std::tuple<Tensor, Tensor> upsample_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t factor,
                                             bool need_dx, bool need_dw) {
  return upsample_backward_in(is_channels_last(x), dy, x, weight, factor, need_dx, need_dw);
}

}  // namespace dla_fast::cpu
