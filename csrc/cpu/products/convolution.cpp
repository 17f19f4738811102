#include "convolution.h"

#include "through.h"

namespace dla_fast::cpu {

template <class T>
void Convolution<T>::forward(A* /*out*/, Epilogue<A> epilogue) const {
  convolve(in_, false, panels_of(in_.out_channels),
           [&](const Shape& shape, const PixelRow& row, int64_t channel, Strided<const A> z) {
             epilogue(
                 {shape, row.group, channel, in_.at(in_.out_channels, row.image, row.h * in_.width + row.w, channel)},
                 z);
           });
}

template <class T>
void Convolution<T>::input_gradients(const Gradient<T>& g) const {
  std::vector<Panel> panels;
  for (int64_t i = 0; i < in_.count(); ++i) {
    if (g.dx[i] != nullptr) Panel::add(panels, in_.xs[i].offset, in_.xs[i].channels);
  }
  if (panels.empty()) return;
  Inputs<T> from = in_;
  from.packed = nullptr;
  std::swap(from.in_channels, from.out_channels);
  from.xs = {{g.dz, in_.out_channels, 0, in_.height, in_.width}};
  from.xs[0].gradient = g.dz_on_load();
  const auto& k = kernels<T>();
  // Block by block, the rows of each one after the other.
  const TileGrid grid = grid_of(from);
  ThroughTiles<T> through(g, grid.count());
  convolve(from, true, std::move(panels),
           [&](const Shape& shape, const PixelRow& row, int64_t channel, Strided<const A> z) {
             int64_t i = in_.count() - 1;
             while (in_.xs[i].offset > channel) --i;
             const int64_t channels = in_.xs[i].channels, ld = in_.ld(channels),
                           at = in_.at(channels, row.image, row.h * in_.width + row.w, channel - in_.xs[i].offset);
             if (through.takes(i)) {
               const int64_t block =
                   (row.image * grid.row_blocks + row.h / (2 * grid.rows)) * grid.col_blocks + row.w / (2 * grid.cols);
               return through.put(shape, block, channel - in_.xs[i].offset, at, ld, z, g.dx[i]);
             }
             if (!g.adds(i)) return k.store(z, {g.dx[i] + at, ld}, shape.rows, shape.cols);
             A sum[kPanel];
             for (int64_t r = 0; r < shape.rows; ++r) {
               for (int64_t c = 0; c < shape.cols; ++c) {
                 sum[c] = z.data[r * z.ld + c] + static_cast<A>(g.du[at + r * ld + c]);
               }
               k.store({sum, 0}, {g.dx[i] + at + r * ld, 0}, 1, shape.cols);
             }
           });
  through.finish();
}

template <class T>
void Convolution<T>::backward(const Gradient<T>& gradient) const {
  input_gradients(gradient);
  if (gradient.dw != nullptr) weight_gradient(gradient);
}

template class Convolution<float>;
template class Convolution<double>;
template class Convolution<c10::BFloat16>;
template class Convolution<c10::Half>;

}  // namespace dla_fast::cpu
