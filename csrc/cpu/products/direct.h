// A convolution of float or double with any odd kernel, stride and dilation as the plain sum of products; half
// precision is widened. K = sum of the inputs' channels, N = output channels, k = the kernel.
//
// 2 k^2 K N flops a pixel. A block of output rows and the pixels that it takes lie in cache; a row of taps is one run
// of memory there, so the sum of products reads the map itself and no unfolded copy of it.

#pragma once

#include "blocks.h"
#include "float_gemm.h"
#include "product.h"
#include "tasks.h"

namespace dla_fast::cpu {

// The output cut into blocks of rows, as wide as the map where that fits, and of small maps of several images.
struct RowGrid {
  struct Block {
    int64_t image, h, w;            // first pixel
    int64_t images, height, width;  // pixels
  };

  int64_t images, height, width, together, rows, cols, row_blocks, col_blocks;
  bool by_rows;  // a block's rows are long enough to be computed one by one

  // inputs, outputs: values of a pixel; span: pixels that a kernel spans; rowwise: rows may be computed so.
  RowGrid(int64_t images, int64_t height, int64_t width, int64_t stride, int64_t span, int64_t inputs, int64_t outputs,
          bool rowwise = false);
  int64_t count() const { return divide_up(images, together) * row_blocks * col_blocks; }
  Block operator[](int64_t i) const;
};

// The pixels a convolution takes for such a block.
struct Window {
  int64_t stride, dilation, kernel;

  template <class T>
  explicit Window(const Inputs<T>& in) : stride(in.stride), dilation(in.dilation), kernel(in.kernel) {}
  int64_t span() const { return (kernel - 1) * dilation + 1; }
  int64_t padding() const { return dilation * (kernel / 2); }
  int64_t side(int64_t outputs) const { return (outputs - 1) * stride + span(); }
};

template <class T>
class Direct : public Product<T> {
 public:
  using A = acc_t<T>;

  explicit Direct(const Inputs<T>& in, bool rowwise = true);
  int64_t packed_bytes() const override;
  void pack(void* to) const override;
  // Images of blocks, or where one is narrower than the map or goes by rows, their rows.
  int64_t groups() const override { return grid_.count() * pieces(); }
  // What is computed at a time is then one piece of memory, which the sums of products fetch long before they write it.
  bool in_place() const override { return finishes_pieces() && in_.out_channels <= kPanel; }
  void forward(A* out, Epilogue<A> epilogue) const override { multiply(out, nullptr, epilogue); }
  bool infer(const Norm<A>& norm, const T* residual, T* y) const override;
  bool forms_dz() const override { return false; }
  void backward(const Gradient<T>& gradient) const override;

 protected:
  // Whether the rows of a block are one piece: they lie one behind the other in the output.
  bool whole() const { return grid_.col_blocks == 1 && !grid_.by_rows; }
  // Whether what is computed at a time is such a piece, of values that are stored as they are summed.
  bool finishes_pieces() const { return std::is_same_v<T, A> && in_.channels_last && (whole() || grid_.by_rows); }
  int64_t pieces() const { return grid_.together * (whole() ? 1 : grid_.rows); }
  // Values between pixels of a block of the output, in cache, and between rows of a packed panel: with no more than are
  // needed the rows of few output channels stay in the first-level cache, of which every fourth line holds few of them.
  int64_t width() const { return std::min(kPanel, round_up(in_.out_channels, 16)); }
  Ahead below(const RowGrid::Block& part) const;
  // With what the sums become, or an epilogue that is given them.
  void multiply(A* out, const Finish<A>* finish, Epilogue<A> epilogue) const;
  void weight_gradient(const Gradient<T>& gradient) const;
  void input_gradients(const Gradient<T>& gradient) const;

  const Inputs<T>& in_;
  Window window_;
  RowGrid grid_;
  std::vector<Map<T>> maps_;
};

}  // namespace dla_fast::cpu
