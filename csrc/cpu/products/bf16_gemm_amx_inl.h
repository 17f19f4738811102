// Products of bfloat16 matrices with AMX: four tiles of c stay in the unit while every input is accumulated.
// Included by amx_gemm_isa_inl.h, inside a namespace.

// Eight tiles of 16 rows of 64 bytes. Static: gcc's intrinsic claims to read eight bytes of it, and a local one would
// lose the rest to the optimiser.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64 && kBf16Block == 16 && kBf16Step * sizeof(BFloat16) == 64);
const TileConfig kConfig;

void enter(void* state) {
  _tile_storeconfig(state);
  _tile_loadconfig(&kConfig);
}

void leave(const void* state) {
  // Tiles that nobody uses are released: the kernel then need not save them with the thread.
  if (*static_cast<const uint8_t*>(state) == 0) {
    _tile_release();
  } else {
    _tile_loadconfig(state);
  }
}

// Rows from i0 and from i1 (two tiles of a, or the first alone) by one or two blocks of b.
template <int ROWS, int BLOCKS>
inline void micro(const Bf16Gemm& g, int64_t i0, int64_t i1, const BFloat16* b, float* c) {
  const int64_t ld = g.ldc * static_cast<int64_t>(sizeof(float));
  float *const c0 = c + i0 * g.ldc, *const c1 = c + i1 * g.ldc;
  if (g.add) {
    _tile_loadd(0, c0, ld);
    if constexpr (BLOCKS == 2) _tile_loadd(1, c0 + kBf16Block, ld);
    if constexpr (ROWS == 2) _tile_loadd(2, c1, ld);
    if constexpr (ROWS == 2 && BLOCKS == 2) _tile_loadd(3, c1 + kBf16Block, ld);
  } else {
    _tile_zero(0);
    if constexpr (BLOCKS == 2) _tile_zero(1);
    if constexpr (ROWS == 2) _tile_zero(2);
    if constexpr (ROWS == 2 && BLOCKS == 2) _tile_zero(3);
  }
  for (int64_t s = 0; s < g.segment_count; ++s) {
    const Bf16Segment& segment = g.segments[s];
    const BFloat16* a0 = segment.a + i0 * segment.lda;
    const BFloat16* a1 = segment.a + i1 * segment.lda;
    const int64_t stride = segment.lda * static_cast<int64_t>(sizeof(BFloat16));
    for (int64_t step = 0; step < segment.steps; ++step) {
      _tile_loadd(4, a0, stride);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (BLOCKS == 2) {
        _tile_loadd(7, b + kBf16Step * kBf16Block, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (ROWS == 2) {
        _tile_loadd(5, a1, stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (BLOCKS == 2) _tile_dpbf16ps(3, 5, 7);
      }
      a0 += kBf16Step;
      a1 += kBf16Step;
      b += kBf16PanelStep;
    }
  }
  _tile_stored(0, c0, ld);
  if constexpr (BLOCKS == 2) _tile_stored(1, c0 + kBf16Block, ld);
  if constexpr (ROWS == 2) _tile_stored(2, c1, ld);
  if constexpr (ROWS == 2 && BLOCKS == 2) _tile_stored(3, c1 + kBf16Block, ld);
}

template <int BLOCKS>
inline void column(const Bf16Gemm& g, const BFloat16* b, float* c) {
  // The last tile is full, and overlaps the one before: its rows come out the same twice.
  const int64_t last = g.m < kBf16Block ? 0 : g.m - kBf16Block;
  for (int64_t i = 0; i < g.m; i += 2 * kBf16Block) {
    const int64_t i0 = i < last ? i : last, i1 = i + kBf16Block < last ? i + kBf16Block : last;
    if (i + kBf16Block < g.m) {
      micro<2, BLOCKS>(g, i0, i1, b, c);
    } else {
      micro<1, BLOCKS>(g, i0, i0, b, c);
    }
  }
}

void gemm(const Bf16Gemm& g) {
  for (int64_t j = 0; j < g.n; j += kBf16Panel) {
    const BFloat16* b = g.b + j / kBf16Panel * g.panel_stride;
    if (g.n - j > kBf16Block) {
      column<2>(g, b, g.c + j);
    } else {
      column<1>(g, b, g.c + j);
    }
  }
}
