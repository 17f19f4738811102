// Products of bfloat16 matrices in the processor's bfloat16 instructions, summed in float: AMX tiles, or vectors of
// AVX512_BF16.
//
// Both take the right-hand matrix as pairs of neighbouring rows, side by side: a step of kBf16Step rows and kBf16Block
// columns is a block of 16 x 16 pairs (1 KB), and a panel holds two blocks of columns, step by step. Depth is padded
// with zeros to whole steps on both sides: garbage there might be NaN, which a zero on the other side does not silence.

#pragma once

#include "../shared/kernels.h"

namespace dla_fast::cpu {

constexpr int64_t kBf16Step = 32;
constexpr int64_t kBf16Block = 16;
constexpr int64_t kBf16Panel = 2 * kBf16Block;
constexpr int64_t kBf16PanelStep = kBf16Step * kBf16Panel;  // values of a panel per step

// One input of a sum of products: rows of whole steps. At least kBf16Block rows can be read, however few are wanted.
struct Bf16Segment {
  const c10::BFloat16* a;
  int64_t lda;
  int64_t steps;
};

// c[m x n] = sum over segments of a_s * b_s, where the b_s lie one after the other in each panel of b. c is scratch:
// rows up to kBf16Block and columns up to the next multiple of that may be written beyond. With `add` the sum is added
// to c, and m is a multiple of kBf16Block: rows that are computed twice would be added twice.
struct Bf16Gemm {
  int64_t m, n;
  const Bf16Segment* segments;
  int64_t segment_count;
  const c10::BFloat16* b;
  int64_t panel_stride;
  float* c;
  int64_t ldc;
  bool add = false;
};

// Columns of a right-hand matrix, from `begin` on, in blocks from `to`. Where `last`, zeros fill the last block.
struct Bf16Columns {
  c10::BFloat16* to;
  int64_t panel_stride;
  int64_t begin, count;
  bool last;
};

struct Bf16Kernels {
  void (*gemm)(const Bf16Gemm&);
  // One panel, of at most kBf16Panel columns, from the transposed matrix: columns x depth values.
  void (*pack_transposed)(Strided<const c10::BFloat16> src, int64_t columns, int64_t depth, c10::BFloat16* to);
  // Columns from depth x count values.
  void (*pack)(Strided<const c10::BFloat16> src, int64_t depth, const Bf16Columns& columns);
  // dst (cols x rows) from src (rows x cols), with zeros to the end of every row's last step.
  void (*transpose)(Strided<const c10::BFloat16> src, int64_t rows, int64_t cols, Strided<c10::BFloat16> dst);
  // dst = src, or src + more where that is not null, rounded to nearest even. What is below float's normal range turns
  // into zero: the instruction has no other mode.
  void (*store)(Strided<const float> src, Strided<const float> more, Strided<c10::BFloat16> dst, int64_t rows,
                int64_t cols);
  // Prepares a thread for gemm, and leaves it as it was found; null where there is nothing to do.
  void (*enter)(void* state);
  void (*leave)(const void* state);
};

// The products of this process, or null where its instruction set has none.
const Bf16Kernels* bf16_kernels();

// A thread while it multiplies. Other libraries configure the same tiles in the same threads, so none stays configured
// from one call to the next.
class Bf16Thread {
 public:
  explicit Bf16Thread(const Bf16Kernels& kernels) : leave_(kernels.leave) {
    if (kernels.enter != nullptr) kernels.enter(state_);
  }
  ~Bf16Thread() {
    if (leave_ != nullptr) leave_(state_);
  }
  Bf16Thread(const Bf16Thread&) = delete;
  Bf16Thread& operator=(const Bf16Thread&) = delete;

 private:
  void (*leave_)(const void*);
  alignas(64) char state_[64];
};

#if defined(DLA_WITH_AVX512_BF16)
namespace avx512_bf16 {
const Bf16Kernels& bf16_kernels();
}
namespace amx_emulated {
const Bf16Kernels& bf16_kernels();
}
#endif
#if defined(DLA_WITH_AMX)
namespace amx {
const Bf16Kernels& bf16_kernels();
}
#endif

}  // namespace dla_fast::cpu
