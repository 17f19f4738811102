#include "map_passes.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../shared/parallel.h"
#include "../shared/scratch.h"

namespace dla_fast::cpu {
namespace {

// How a normalisation pass walks a (N, C, H, W) tensor: tiles of about `target` values.
struct Tile {
  int64_t offset, group, channel;
  Shape shape;
};

// Pixels of few channels lie side by side in a channels_last map: `fold` of them are taken for one with as many times
// the channels, since a row of 16 values costs about as much as one of 256.
struct Tiling {
  bool channels_last;
  int64_t fold = 1;
  int64_t images, channels, pixels, block_rows, block_cols, groups, per_group;

  static constexpr int64_t kTile = 8192;  // values that fit the first-level cache: 32 KB of floats

  explicit Tiling(const MapSize& size, int64_t target = kTile);
  // Passes that leave sums for every tile take larger ones, since somebody has to add those, but enough to share out.
  static Tiling for_sums(const MapSize& size) {
    return Tiling(size, std::clamp<int64_t>(size.values() / 64, 2 * kTile, 8 * kTile));
  }
  int64_t count() const { return groups * per_group; }
  int64_t ld() const { return channels_last ? channels : pixels; }
  Tile operator[](int64_t i) const;
  int64_t group_size(int64_t group) const;  // values per channel in a group
};

Tiling::Tiling(const MapSize& size, int64_t target)
    : channels_last(size.channels_last), images(size.images), channels(size.channels), pixels(size.pixels) {
  if (channels_last) {
    while (channels > 0 && 2 * channels <= kChunk && images * pixels % 2 == 0 && images * pixels > 0) {
      fold *= 2;
      channels *= 2;
      pixels = images * pixels / 2;
      images = 1;
    }
    const int64_t total = images * pixels;
    block_rows = std::clamp<int64_t>(target / std::max<int64_t>(channels, 1), 16, 1024);
    block_cols = channels;
    groups = divide_up(total, block_rows);
    per_group = channels > 0 ? 1 : 0;
  } else {
    block_cols = std::min<int64_t>(std::max<int64_t>(pixels, 1), target);
    block_rows = std::clamp<int64_t>(target / block_cols, 1, std::max<int64_t>(channels, 1));
    groups = images * divide_up(pixels, block_cols);
    per_group = divide_up(channels, block_rows);
  }
}

Tile Tiling::operator[](int64_t i) const {
  const int64_t group = i / per_group;
  if (channels_last) {
    const int64_t first = group * block_rows;
    return {first * channels, group, 0, {std::min(block_rows, images * pixels - first), channels, false}};
  }
  const int64_t blocks = divide_up(pixels, block_cols);
  const int64_t image = group / blocks, col = group % blocks * block_cols, channel = i % per_group * block_rows;
  return {(image * channels + channel) * pixels + col,
          group,
          channel,
          {std::min(block_rows, channels - channel), std::min(block_cols, pixels - col), true}};
}

int64_t Tiling::group_size(int64_t group) const {
  if (channels_last) return std::min(block_rows, images * pixels - group * block_rows);
  return std::min(block_cols, pixels - group % divide_up(pixels, block_cols) * block_cols);
}

template <class T>
Strided<const T> part(const T* data, const Tile& tile, int64_t ld) {
  return {data == nullptr ? nullptr : data + tile.offset, ld};
}

}  // namespace

template <class T>
void moments_pass(const MapSize& size, const T* z, acc_t<T>* mean, acc_t<T>* var) {
  const Tiling tiling = Tiling::for_sums(size);
  MomentPartials<acc_t<T>> partials(tiling.groups * tiling.fold, size.channels);
  parallel_queue(tiling.count(), tiling.block_rows * tiling.block_cols, [&](const Take& take) {
    for (int64_t i = take(); i >= 0; i = take()) {
      const Tile t = tiling[i];
      const int64_t at = t.group * tiling.channels + t.channel;
      kernels<T>().moments(t.shape, part(z, t, tiling.ld()), &partials.mean[at], &partials.m2[at], &partials.delta[at]);
      if (t.channel == 0) std::fill_n(&partials.count[t.group * tiling.fold], tiling.fold, tiling.group_size(t.group));
    }
  });
  partials.finalise(mean, var);
}

template <class T>
void tail_pass(const MapSize& size, NormVectors<acc_t<T>> norm, const T* z, const T* residual, T* y) {
  const Tiling tiling(size);
  norm.repeat(tiling.fold);
  backwards_queue(tiling.count(), tiling.block_rows * tiling.block_cols, [&](const Take& take) {
    for (int64_t i = take(); i >= 0; i = take()) {
      const Tile t = tiling[i];
      kernels<T>().tail(t.shape, norm.from(t.channel), part(z, t, tiling.ld()), part(residual, t, tiling.ld()),
                        {y + t.offset, tiling.ld()});
    }
  });
}

template <class T>
void reduce_pass(const MapSize& size, TailGradient<T> g, acc_t<T>* sum_dy, acc_t<T>* sum_dy_xhat) {
  through_pass<T>(size, std::move(g), nullptr, sum_dy, sum_dy_xhat);
}

template <class T>
void through_pass(const MapSize& size, TailGradient<T> g, T* du, acc_t<T>* sum_dy, acc_t<T>* sum_dy_xhat) {
  const Tiling tiling = Tiling::for_sums(size);
  g.repeat(tiling.fold);
  GradientSums sums(tiling.groups * tiling.fold, size.channels);
  parallel_queue(tiling.count(), tiling.block_rows * tiling.block_cols, [&](const Take& take) {
    for (int64_t i = take(); i >= 0; i = take()) {
      const Tile t = tiling[i];
      const int64_t at = t.group * tiling.channels + t.channel, ld = tiling.ld();
      kernels<T>().reduce(t.shape, g.norm.from(t.channel), part(g.dy, t, ld), part(g.z, t, ld), part(g.residual, t, ld),
                          {du == nullptr ? nullptr : du + t.offset, ld}, &sums.dy[at], &sums.dy_xhat[at]);
    }
  });
  sums.finalise(sum_dy, sum_dy_xhat);
}

template <class T>
void apply_pass(const MapSize& size, TailGradient<T> g, T* dz, T* du) {
  using A = acc_t<T>;
  constexpr bool in_place = std::is_same_v<T, A>;
  const Tiling tiling(size);
  g.repeat(tiling.fold);
  backwards_queue(tiling.count(), tiling.block_rows * tiling.block_cols, [&](const Take& take) {
    const int64_t values = in_place ? 0 : tiling.block_rows * tiling.block_cols;
    const Scratch<A> dz_tile(values), du_tile(du != nullptr ? values : 0);
    for (int64_t i = take(); i >= 0; i = take()) {
      const Tile t = tiling[i];
      const int64_t ld = tiling.ld(), cols = t.shape.cols;
      if constexpr (in_place) {
        g.form(t.shape, t.channel, t.offset, ld, {dz + t.offset, ld}, {du != nullptr ? du + t.offset : nullptr, ld});
      } else {
        g.form(t.shape, t.channel, t.offset, ld, {dz_tile.get(), cols},
               {du != nullptr ? du_tile.get() : nullptr, cols});
        kernels<T>().store({dz_tile.get(), cols}, {dz + t.offset, ld}, t.shape.rows, cols);
        if (du != nullptr) kernels<T>().store({du_tile.get(), cols}, {du + t.offset, ld}, t.shape.rows, cols);
      }
    }
  });
}

#define DLA_INSTANTIATE(T)                                                                \
  template void moments_pass(const MapSize&, const T*, acc_t<T>*, acc_t<T>*);             \
  template void tail_pass(const MapSize&, NormVectors<acc_t<T>>, const T*, const T*, T*); \
  template void reduce_pass(const MapSize&, TailGradient<T>, acc_t<T>*, acc_t<T>*);       \
  template void through_pass(const MapSize&, TailGradient<T>, T*, acc_t<T>*, acc_t<T>*);  \
  template void apply_pass(const MapSize&, TailGradient<T>, T*, T*);

DLA_INSTANTIATE(float)
DLA_INSTANTIATE(double)
DLA_INSTANTIATE(c10::BFloat16)
DLA_INSTANTIATE(c10::Half)

}  // namespace dla_fast::cpu
