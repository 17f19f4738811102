"""Forward of the node: z = sum_i W_i * up_i(x_i), a k x k convolution of several inputs, and what follows it.

M output pixels over all images, K = sum of the inputs' channels C_i, N output channels, T = k * k taps, b bytes a
value.

``inference_kernel``: y = act(gamma * (z + bias - mean) / sigma + beta + residual), one launch.
``stage_kernel``: z, and per tile of pixels and channel (mean, M2, sum(z - mean)) of the z that is written.

- xs[i]: (images, H_i, W_i, C_i) channels_last, or (images, C_i, H_i, W_i) contiguous, as CL says. A plain one
  (FACTORS[i] = 1) has H_i, W_i = H, W; the others lie at low resolution, with H_i, W_i = heights[i], widths[i]
- ups[i]: (C_i, 1, 2F, 2F), F = FACTORS[i], or None; ups, heights and widths are None where every input is plain
- w: (N, K, k, k), element (n, k, t) at n * stride_n + k * stride_k + t * stride_t
- y, z, residual: like a plain input, with N channels and the sides (H - 1) // STRIDE + 1, (W - 1) // STRIDE + 1
- mean, var, gamma, beta, bias: (N,) each, any dtype; the last three may be None, like the residual
- partial: (3, N, tiles of pixels), accumulation dtype

An implicit product: a step takes one input, one tap and BK of its channels, and reads the pixels that the tap moves
the tile to, zero outside the map. So neither a concatenation nor a column buffer exists. Where one tap moves nothing
(1 x 1, stride 1) a pixel's number is its address, and no side matters: H, W may be given as H * W, 1.

At stride 1 either kernel reads K values a pixel (an upsampled input counts C_i / F^2; a residual among the inputs is
there once more, from cache, any other counts N) and writes N: (K + N) b bytes, and 2TKN flops; the stage writes 12 N
bytes a tile beside. Programs of one tile of pixels are neighbours, so that an input which several of them read comes
from memory once.
"""

import triton
import triton.language as tl

from dla_fast.kernels.tile import (
    activate,
    along,
    at,
    inside,
    moments_of,
    per_channel,
    pixel_range,
    reciprocal_deviation,
    tf32,
)


@triton.jit
def strided(side, STRIDE: tl.constexpr):
    """The output's side; an odd kernel's padding keeps it at stride 1."""
    if STRIDE > 1:
        side = (side - 1) // STRIDE + 1
    return side


@triton.jit
def load_plain(
    x, pixel, k, there, kin, pixels, channels, CL: tl.constexpr, EVEN: tl.constexpr, I64: tl.constexpr,
    MOVED: tl.constexpr,
):  # fmt: skip
    """Channels k of x at a pixel for each row of the tile; zero where ``there`` says no."""
    row, column = at(pixel, pixels, channels, CL)[:, None], along(k, pixels, CL, I64)[None, :]
    # Rows that no tap moves have one address for all steps. Those that move are kept as offsets, of half the registers.
    address = x + (row + column) if MOVED else x + row + column
    return tl.load(address, mask=inside(there, kin, EVEN), other=0.0)


@triton.jit
def load_upsampled(
    x, up, image, top, left, k, there, kin, height, width, channels,
    CL: tl.constexpr, EVEN: tl.constexpr, I64: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The same of the upsampled map: a sum of 2 x 2 products, rounded as a map that is stored would be."""
    i, j = (top + F // 2) // F, (left + F // 2) // F
    tap = ((top + F // 2) % F * (2 * F) + (left + F // 2) % F)[:, None] + (k * (4 * F * F))[None, :]
    mask = inside(there, kin, False)
    acc = tl.zeros((top.shape[0], k.shape[0]), ACC)
    for corner in tl.static_range(4):
        row, column = i - corner // 2, j - corner % 2
        exists = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixel = (image * height + row) * width + column
        value = load_plain(x, pixel, k, exists, kin, height * width, channels, CL, EVEN, I64, True)
        weight = tl.load(up + tap + (corner // 2 * 2 * F * F + corner % 2 * F), mask=mask, other=0.0)
        acc += value.to(ACC) * weight.to(ACC)
    return acc.to(x.dtype.element_ty)


@triton.jit
def load_input(
    xs, ups, heights, widths, channels, i: tl.constexpr, m, image, top, left, k, there, kin, height, width,
    CL: tl.constexpr, EVEN: tl.constexpr, I64: tl.constexpr, ACC: tl.constexpr, FACTOR: tl.constexpr,
    MOVED: tl.constexpr,
):  # fmt: skip
    """Channels k of input i, as the product takes them: what is done to an input on the way is chosen here."""
    if FACTOR > 1:
        values = load_upsampled(
            xs[i], ups[i], image, top, left, k, there, kin, heights[i], widths[i], channels[i],
            CL, EVEN, I64, FACTOR, ACC,
        )  # fmt: skip
    else:
        pixel = (image * height + top) * width + left if MOVED else m
        values = load_plain(xs[i], pixel, k, there, kin, height * width, channels[i], CL, EVEN, I64, MOVED)
    return values


@triton.jit
def product(
    xs, ups, heights, widths, channels, starts, w, m, n, total, height, width, out_channels,
    stride_n, stride_k, stride_t,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    FACTORS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """A tile of z in one accumulator, over every input and tap."""
    acc = tl.zeros((BM, BN), ACC)
    rows, outs = m < total, n < out_channels
    out_height, out_width = strided(height, STRIDE), strided(width, STRIDE)
    x, y = m % out_width, m // out_width % out_height
    image = m // (out_width * out_height)
    for i in tl.static_range(len(xs)):
        for tap in range(KERNEL * KERNEL):
            top = y * STRIDE + tap // KERNEL * DILATION - KERNEL // 2 * DILATION
            left = x * STRIDE + tap % KERNEL * DILATION - KERNEL // 2 * DILATION
            there = rows
            if KERNEL > 1:
                there = rows & (top >= 0) & (top < height) & (left >= 0) & (left < width)
            for first in range(0, channels[i], BK):
                k = first + tl.arange(0, BK)
                kin = k < channels[i]
                values = load_input(
                    xs, ups, heights, widths, channels, i, m, image, top, left, k, there, kin, height, width,
                    CL, EVEN_K, I64, ACC, FACTORS[i], KERNEL > 1 or STRIDE > 1,
                )  # fmt: skip
                weights = w + n[None, :] * stride_n + (starts[i] + k)[:, None] * stride_k + tap * stride_t
                if EVEN_K and EVEN_N:
                    right = tl.load(weights)
                else:
                    right = tl.load(weights, mask=kin[:, None] & outs[None, :], other=0.0)
                values, right = tf32(values, PRECISION), tf32(right, PRECISION)
                acc = tl.dot(values, right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def inference_kernel(
    xs, ups, heights, widths, channels, starts, w, y, residual, mean, var, gamma, beta, bias, total, height, width,
    out_channels, stride_n, stride_k, stride_t,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    FACTORS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(out_channels, BN)
    m = pixel_range(tl.program_id(0) // blocks, BM, I64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    acc = product(
        xs, ups, heights, widths, channels, starts, w, m, n, total, height, width, out_channels,
        stride_n, stride_k, stride_t,
        BM, BN, BK, CL, EVEN_K, EVEN_N, PRECISION, ACC, I64, FACTORS, KERNEL, STRIDE, DILATION,
    )  # fmt: skip
    outs, pixels = n < out_channels, strided(height, STRIDE) * strided(width, STRIDE)
    mask = inside(m < total, outs, EVEN_N)
    offset = at(m, pixels, out_channels, CL)[:, None] + along(n, pixels, CL, I64)[None, :]
    center = per_channel(mean, n, outs, 0.0, ACC) - per_channel(bias, n, outs, 0.0, ACC)
    scale = per_channel(gamma, n, outs, 1.0, ACC) * reciprocal_deviation(per_channel(var, n, outs, 1.0, ACC), EPS)
    u = (acc - center[None, :]) * scale[None, :] + per_channel(beta, n, outs, 0.0, ACC)[None, :]
    if residual is not None:
        u += tl.load(residual + offset, mask=mask, other=0.0).to(ACC)
    tl.store(y + offset, activate(u, ACT, SLOPE).to(y.dtype.element_ty), mask=mask)


@triton.jit
def stage_kernel(
    xs, ups, heights, widths, channels, starts, w, z, partial, total, height, width, out_channels,
    stride_n, stride_k, stride_t,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    FACTORS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(out_channels, BN)
    tile = tl.program_id(0) // blocks
    m = pixel_range(tile, BM, I64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    acc = product(
        xs, ups, heights, widths, channels, starts, w, m, n, total, height, width, out_channels,
        stride_n, stride_k, stride_t,
        BM, BN, BK, CL, EVEN_K, EVEN_N, PRECISION, ACC, I64, FACTORS, KERNEL, STRIDE, DILATION,
    )  # fmt: skip
    rows, outs, pixels = m < total, n < out_channels, strided(height, STRIDE) * strided(width, STRIDE)
    offset = at(m, pixels, out_channels, CL)[:, None] + along(n, pixels, CL, I64)[None, :]
    written = acc.to(z.dtype.element_ty)
    tl.store(z + offset, written, mask=inside(rows, outs, EVEN_N))
    if partial is not None:
        tiles = tl.cdiv(total, BM)
        count = tl.minimum(total - tile * BM, BM).to(ACC)
        mean, m2, rest = moments_of(written.to(ACC), rows, count, ACC)
        to = partial + n * tiles + tile
        tl.store(to, mean, mask=outs)
        tl.store(to + out_channels * tiles, m2, mask=outs)
        tl.store(to + 2 * out_channels * tiles, rest, mask=outs)
