// Products of float matrices in the processor's bfloat16 instructions, as exact as in its float instructions.
//
// Every value is the sum of three bfloat16 numbers, x = high + middle + low, of eight bits each. Six of the nine
// products of parts are summed, in float; the other three are below float's rounding of the product (Henry, Tang and
// Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, 2019). Where a
// bfloat16 product costs less than a sixth of a float product, as in AMX tiles, that is the faster way.
//
// What it cannot do: infinity has no such parts and turns into NaN, as do values that round to it (3.39e38 and above),
// and what became of them is computed once more as float (operators/exact.h);
// parts below float's normal range (1.2e-38) count for nothing.

#pragma once

#include "bf16_gemm.h"
#include "float_gemm.h"

namespace dla_fast::cpu {

constexpr int64_t kBf16x3Tile = kBf16Block * kBf16Step;  // values of a part of a block in a step
constexpr int64_t kBf16x3Step = 3 * kBf16x3Tile;

// One side of a product, split: blocks of kBf16Block rows (of the left-hand side) or columns (of the right-hand side),
// `stride` apart; in each, kBf16Step values of the depth after another, `step` apart; of those high, middle and low,
// `part` apart, 1 KB each. Depth is padded with zeros to whole steps.
struct Bf16x3Side {
  c10::BFloat16* data;
  int64_t stride, step = kBf16x3Step, part = kBf16x3Tile;

  Bf16x3Side at(int64_t block, int64_t step_index) const {
    return {data + block * stride + step_index * step, stride, step, part};
  }
  // For so many steps. A line more than they take: blocks a multiple of 4 KB apart evict each other from the cache.
  static int64_t stride_of(int64_t steps) { return steps * kBf16x3Step + kBf16Step; }
  static int64_t values(int64_t count, int64_t steps) {
    return (count + kBf16Block - 1) / kBf16Block * stride_of(steps);
  }
  // A left-hand side of so many rows at most, which lie one after the other: a product may begin at any of them. What
  // is split or multiplied takes kBf16Block of them at a time.
  static Bf16x3Side of_rows(c10::BFloat16* data, int64_t rows) {
    const int64_t part = (rows + kBf16Block) * kBf16Step;
    return {data, kBf16x3Tile, 3 * part, part};
  }
  static int64_t values_of_rows(int64_t rows, int64_t steps) { return 3 * (rows + kBf16Block) * kBf16Step * steps; }
  Bf16x3Side from_row(int64_t row) const { return {data + row * kBf16Step, stride, step, part}; }
};

// c[m x n] (+)= left * right, or the sum of such products, whose left-hand sides begin at `taps` in `left` and whose
// right-hand sides follow one another in depth, `steps` each. Only these values of c are touched. `ahead` is fetched
// evenly over the product.
struct Bf16x3Gemm {
  int64_t m, n, steps;
  Bf16x3Side left, right;
  float* c;
  int64_t ldc;
  bool add = false;
  Ahead* ahead = nullptr;
  const int64_t* taps = nullptr;
  int64_t tap_count = 1;
};

struct Bf16x3Kernels {
  void (*gemm)(const Bf16x3Gemm&);
  // Split a matrix for a side: `count` rows of the left-hand or columns of the right-hand side. The left-hand side lies
  // count x depth in memory, the right-hand side depth x count; transposed, the other way about.
  // Only `left` knows sides of another step and part.
  void (*left)(Strided<const float> src, int64_t count, int64_t depth, Bf16x3Side to);
  void (*left_transposed)(Strided<const float> src, int64_t count, int64_t depth, Bf16x3Side to);
  void (*right)(Strided<const float> src, int64_t count, int64_t depth, Bf16x3Side to);
  void (*right_transposed)(Strided<const float> src, int64_t count, int64_t depth, Bf16x3Side to);
  const Bf16Kernels& thread;  // prepares a thread: Bf16Thread(thread)
};

// The products of this process, or null where float instructions are the faster way.
const Bf16x3Kernels* bf16x3_kernels();

#if defined(DLA_WITH_AVX512_BF16)
namespace amx_emulated {
const Bf16x3Kernels& bf16x3_kernels();
}
#endif
#if defined(DLA_WITH_AMX)
namespace amx {
const Bf16x3Kernels& bf16x3_kernels();
}
#endif

}  // namespace dla_fast::cpu
