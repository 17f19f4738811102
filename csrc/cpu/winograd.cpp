#include "winograd.h"

namespace dla_fast::cpu {

template <class T>
Tensor winograd_weight_gradient(const Tensor& dz, const MergeInputs& in, const std::vector<Tensor>& xs,
                                const Tensor& weight) {
  using A = acc_t<T>;
  // What is summed at a time stays in the second-level cache while the map passes by.
  constexpr int64_t deep = 64, wide = 128;
  const auto& k = kernels<T>();
  const TileGrid grid(in.images, in.height, in.width, 48);
  WeightSums<A> sums(in, weight, grid.count(), deep, wide);
  std::vector<Map<T>> maps;
  for (const Tensor& x : xs) maps.emplace_back(x, in.channels_last);
  const Map<T> gradient(dz, in.channels_last);
  const int64_t tiles = grid.tiles();
  parallel_queue(sums.tasks(), sums.blocks_per_task() * tiles * deep * wide, [&](const auto& take) {
    const int64_t rows = 2 * grid.rows, cols = 2 * grid.cols;
    const Scratch<A> x((rows + 2) * (cols + 2) * deep), dy(rows * cols * wide), v(16 * tiles * deep),
        d(16 * tiles * wide, true), du(16 * deep * wide), taps(9 * deep * wide);
    for (int64_t task = take(); task >= 0; task = take()) {
      const auto& [input, channel, depth, out, width] = sums.piece(task);
      for (int64_t b = sums.first_block(task); b < sums.last_block(task); ++b) {
        const TileGrid::Block block = grid[b];
        maps[input].gather(block.image, block.h - 1, block.w - 1, rows + 2, cols + 2, channel, depth, x.get());
        k.winograd_input({grid.rows, grid.cols, depth, v.get(), tiles * deep, deep}, x.get());
        gradient.gather(block.image, block.h, block.w, rows, cols, out, width, dy.get());
        k.winograd_gradient({grid.rows, grid.cols, width, d.get(), tiles * wide, wide}, dy.get());
        for (int64_t position = 0; position < 16; ++position) {
          const Segment<A> segment = {v.get() + position * tiles * deep, deep, tiles};
          k.gemm({depth, width, &segment, 1, true, d.get() + position * tiles * wide, wide,
                  du.get() + position * deep * wide, wide, b > sums.first_block(task)});
        }
      }
      for (int64_t c = 0; c < depth; ++c) {
        k.winograd_weight_gradient(du.get() + c * wide, deep * wide, width, taps.get() + c * sums.per_channel(),
                                   sums.per_tap());
      }
      sums.store(task, taps.get());
    }
  });
  return sums.result();
}

template Tensor winograd_weight_gradient<float>(const Tensor&, const MergeInputs&, const std::vector<Tensor>&,
                                                const Tensor&);
template Tensor winograd_weight_gradient<double>(const Tensor&, const MergeInputs&, const std::vector<Tensor>&,
                                                 const Tensor&);
template Tensor winograd_weight_gradient<c10::BFloat16>(const Tensor&, const MergeInputs&, const std::vector<Tensor>&,
                                                        const Tensor&);
template Tensor winograd_weight_gradient<c10::Half>(const Tensor&, const MergeInputs&, const std::vector<Tensor>&,
                                                    const Tensor&);

}  // namespace dla_fast::cpu
