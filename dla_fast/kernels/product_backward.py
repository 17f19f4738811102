"""Backward of a 1 x 1 node's product: dx_i = W_i^T dz (+ g for the residual's input), dW_i = dz^T x_i.

M pixels over all images, K = sum of the inputs' channels C_i, N output channels, b bytes a value. dz is formed tile by
tile from dy and z, and never stored.

``weight_kernel`` with DX makes both: a program owns a block of an input's channels and walks a range of pixels, its
part of dW in registers. It reads dy and z (2N) and x_i (K), writes dx_i (K): 2N + 2K values a pixel, since the programs
of a range run side by side and dy and z come from memory once; 4KN flops. It needs all N channels of dz in a tile.
For larger nodes ``dx_kernel`` reads 2N and writes K, and ``weight_kernel`` without DX reads 2N + K; 2KN flops each.
A residual adds its read (N) to each pass that does not read it anyway. ``weight_sum_kernel`` adds the ranges' dW in
order.

- dy, z, residual: (M, N) channels_last, or (images, N, pixels) contiguous, as CL says; xs[i], dxs[i] the same with C_i
  channels, in any order, starts[i] being the first of their columns of w; with ADD the first of them is the residual.
  Only inputs that need it are among the dxs of ``dx_kernel``
- w, dw: (N, K), K contiguous; partial: (ranges, N, K), accumulation dtype
- mean, var, gamma, beta, sum_dy, sum_dy_xhat: (N,); all but the first two may be None
- blocks[i]: number of the first block of channels of input i; one more entry says how many blocks there are
"""

import triton
import triton.language as tl

from dla_fast.kernels.tile import along, at, batch_terms, gradient_of, inside, norm_of, pixel_range, tf32


@triton.jit
def dx_kernel(
    dxs, channels, starts, blocks, dy, z, residual, w, mean, var, gamma, beta, sum_dy, sum_dy_xhat,
    inverse_count: tl.float64, total, pixels, out_channels, depth, count,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ADD: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % count
    m = pixel_range(tl.program_id(0) // count, BM, I64)
    rows = m < total
    dx = dxs[0]
    own, start, first = channels[0], starts[0], 0
    for i in tl.static_range(1, len(dxs)):
        if block >= blocks[i]:
            dx = dxs[i]
        own = tl.where(block >= blocks[i], channels[i], own)
        start = tl.where(block >= blocks[i], starts[i], start)
        first = tl.where(block >= blocks[i], blocks[i], first)
    k = (block - first) * BK + tl.arange(0, BK)
    pixel = at(m, pixels, out_channels, CL)[:, None]
    acc = tl.zeros((BM, BK), ACC)
    for begin in range(0, out_channels, BN):
        n = begin + tl.arange(0, BN)
        outs = n < out_channels
        offset = pixel + along(n, pixels, CL, I64)[None, :]
        center, rstd, scale, shift = norm_of(mean, var, gamma, beta, n, outs, EPS, ACC)
        tilt, drop = batch_terms(sum_dy, sum_dy_xhat, inverse_count, rstd, scale, n, outs, ACC)
        grad, off = gradient_of(
            dy, z, residual, offset, inside(rows, outs, EVEN_N), center, scale, shift, ACT, SLOPE, ACC
        )
        dz = grad * scale[None, :] - off * tilt[None, :] - drop[None, :]
        weights = w + n[:, None] * depth + (start + k)[None, :]
        right = tl.load(weights, mask=outs[:, None] & (k < own)[None, :], other=0.0)
        dz, right = tf32(dz.to(right.dtype), PRECISION), tf32(right, PRECISION)
        acc = tl.dot(dz, right, acc, input_precision=PRECISION, out_dtype=ACC)
    mask = inside(rows, k < own, EVEN_K)
    if ADD:  # noqa: SIM102, the inner condition is the device's
        if block < blocks[1]:
            center, _, scale, shift = norm_of(mean, var, gamma, beta, k, k < own, EPS, ACC)
            grad, _ = gradient_of(
                dy, z, residual, pixel + along(k, pixels, CL, I64)[None, :], mask, center, scale, shift, ACT, SLOPE, ACC
            )
            acc += grad
    to = dx + at(m, pixels, own, CL)[:, None] + along(k, pixels, CL, I64)[None, :]
    tl.store(to, acc.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    xs, dxs, channels, starts, blocks, dy, z, residual, w, dw, mean, var, gamma, beta, sum_dy, sum_dy_xhat,
    inverse_count: tl.float64, total, pixels, out_channels, depth, tiles_per_range,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    DX: tl.constexpr, ADD: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """DX: bit i says that input i needs its gradient; 0 for none."""
    outs_blocks = tl.cdiv(out_channels, BN)
    block = tl.program_id(0) // outs_blocks
    n = tl.program_id(0) % outs_blocks * BN + tl.arange(0, BN)
    outs = n < out_channels
    x, dx = xs[0], dxs[0]
    own, start, first = channels[0], starts[0], 0
    wanted = tl.full((), (DX & 1) != 0, tl.int1)
    for i in tl.static_range(1, len(xs)):
        if block >= blocks[i]:
            x = xs[i]
            dx = dxs[i]
        own = tl.where(block >= blocks[i], channels[i], own)
        start = tl.where(block >= blocks[i], starts[i], start)
        first = tl.where(block >= blocks[i], blocks[i], first)
        wanted = tl.where(block >= blocks[i], ((DX >> i) & 1) != 0, wanted)
    k = (block - first) * BK + tl.arange(0, BK)
    own_of_first = tl.where(block < blocks[1], own, 0)
    column = along(k, pixels, CL, I64)[None, :]
    at_weights = n[:, None] * depth + (start + k)[None, :]
    weights_mask = outs[:, None] & (k < own)[None, :]
    if DX:
        weights = tf32(tl.load(w + at_weights, mask=weights_mask, other=0.0), PRECISION)
    center, rstd, scale, shift = norm_of(mean, var, gamma, beta, n, outs, EPS, ACC)
    tilt, drop = batch_terms(sum_dy, sum_dy_xhat, inverse_count, rstd, scale, n, outs, ACC)
    if ADD:
        center_k, _, scale_k, shift_k = norm_of(mean, var, gamma, beta, k, k < own_of_first, EPS, ACC)
    acc = tl.zeros((BN, BK), ACC)
    begin = tl.program_id(1) * tiles_per_range
    for tile in range(begin, tl.minimum(begin + tiles_per_range, tl.cdiv(total, BM))):
        m = pixel_range(tile, BM, I64)
        rows = m < total
        pixel = at(m, pixels, out_channels, CL)[:, None]
        grad, off = gradient_of(
            dy, z, residual, pixel + along(n, pixels, CL, I64)[None, :], inside(rows, outs, EVEN_N), center, scale,
            shift, ACT, SLOPE, ACC,
        )  # fmt: skip
        dz = grad * scale[None, :] - off * tilt[None, :] - drop[None, :]
        mask = inside(rows, k < own, EVEN_K)
        offset = at(m, pixels, own, CL)[:, None] + column
        right = tl.load(x + offset, mask=mask, other=0.0)
        dz, right = tf32(dz.to(right.dtype), PRECISION), tf32(right, PRECISION)
        acc = tl.dot(tl.trans(dz), right, acc, input_precision=PRECISION, out_dtype=ACC)
        if DX:
            made = tl.dot(dz, weights, input_precision=PRECISION, out_dtype=ACC)
            if ADD:
                # Where the block is not one of input 0, nothing is loaded.
                of_first = mask & (k < own_of_first)[None, :]
                grad, _ = gradient_of(
                    dy, z, residual, pixel + column, of_first, center_k, scale_k, shift_k, ACT, SLOPE, ACC
                )  # fmt: skip
                made += grad
            tl.store(dx + offset, made.to(dx.dtype.element_ty), mask=mask & wanted)
    to = dw + tl.program_id(1).to(tl.int64) * out_channels * depth + at_weights
    tl.store(to, acc.to(dw.dtype.element_ty), mask=weights_mask)


@triton.jit
def weight_sum_kernel(partial, dw, size, ranges, B: tl.constexpr, ACC: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    acc = tl.zeros((B,), ACC)
    for r in range(0, ranges):
        acc += tl.load(partial + tl.full((), size, tl.int64) * r + i, mask=i < size, other=0.0)
    tl.store(dw + i, acc.to(dw.dtype.element_ty), mask=i < size)
