#include "tasks.h"

namespace dla_fast::cpu {

int64_t tile_rows(int64_t total, int64_t weights, int64_t panels) {
  // Every tile reads all weights. Those that no cache near the core holds beside the tile want few and tall tiles;
  // threads then share the panels of a tile.
  constexpr int64_t tallest = 108, cached = 1 << 16, large = 1 << 18;
  const int64_t tiles = divide_up(total, tallest);
  if (weights > large || (weights > cached && tiles * panels >= 2 * thread_count())) {
    return std::max<int64_t>(round_up(divide_up(total, tiles), 6), 6);
  }
  const int64_t wanted = divide_up(total, 8 * thread_count());
  return std::clamp<int64_t>(round_up(wanted, 6), 24, 96);
}

Tasks::Tasks(int64_t tiles, int64_t panels) : tiles(tiles), panels(panels) {
  groups = tiles == 0 ? 1 : std::clamp<int64_t>(divide_up(8 * thread_count(), tiles), 1, std::max<int64_t>(panels, 1));
  count = tiles * groups;
}

}  // namespace dla_fast::cpu
