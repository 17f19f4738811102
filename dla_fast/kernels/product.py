"""Forward of the node: z = sum_i W_i * up_i(x_i), a k x k convolution of several inputs, and what follows it.

M output pixels over all images, K = sum of the inputs' channels C_i, N output channels, T = k * k taps, b bytes a
value.

``inference_kernel``: y = act(gamma * (z + bias - mean) / sigma + beta + residual), one launch.
``stage_kernel``: z, and per group of pixels and channel (shift, M2 around it, sum(z - shift)) of the z that is written.

- xs[i]: (images, H_i, W_i, C_i) channels_last, or (images, C_i, H_i, W_i) contiguous, as CL says. The first PLAIN have
  H_i, W_i = H, W; the others lie at low resolution, with H_i, W_i = heights[i], widths[i] and a factor of FACTORS[i]
- ups[i]: (C_i, 1, 2F, 2F), F = FACTORS[i], or None; ups, heights and widths are None where every input is plain
- starts[i]: first of the weight's input channels that are those of input i
- w: (N, K, k, k), element (n, k, t) at n * stride_n + k * stride_k + t * stride_t
- y, z, residual: like a plain input, with N channels and the sides (H - 1) // STRIDE + 1, (W - 1) // STRIDE + 1
- mean, var, gamma, beta, bias: (N,) each, any dtype; the last three may be None, like the residual
- partial: (3, N, groups), accumulation dtype
- norm, added: of input PRE[0], where it is z of the unit before: its coefficients (4, C_i), accumulation dtype, and its
  residual, shape of z, or None; PRE[1:] are name and slope of the activation. PRE is None where no input is

An implicit product, persistent: a program keeps its block of output channels and walks tiles of pixels in one loop,
flat over (tile, input, block of channels, tap), so that the loads of the next steps, of another input or the next tile,
are in flight while a tile is finished. A step reads the pixels that its tap moves the tile to, zero outside the map. So
neither a concatenation nor a column buffer exists. Inputs that are upsampled on the way follow at the end of a tile.
Where one tap moves nothing (1 x 1, stride 1) a pixel's number is its address, and no side matters: H, W may be given
as H * W, 1.

At stride 1 either kernel reads K values a pixel (an upsampled input counts C_i / F^2; a residual among the inputs is
there once more, from cache, any other counts N) and writes N: (K + N) b bytes, and 2TKN flops. The stage adds up a
program's moments in registers (CARRIED: a group is what a program takes) and writes 12 N bytes a group beside; where a
tile leaves no registers for them, a group is a tile. A residual of an input's own adds C_i values. Programs of one tile
of pixels are neighbours, so that an input which several of them read comes from memory once.
"""

import triton
import triton.language as tl

from dla_fast.kernels.prologue_kernels import coefficients_of, formed_if
from dla_fast.kernels.tile import (
    activate,
    along,
    at,
    fetch,
    finite_or_zero,
    inside,
    multiple,
    norm_of,
    per_channel,
    pixel_range,
    read,
    tf32,
)


@triton.jit
def strided(side, STRIDE: tl.constexpr):
    """The output's side; an odd kernel's padding keeps it at stride 1."""
    if STRIDE > 1:
        side = (side - 1) // STRIDE + 1
    return side


@triton.jit
def place_of(
    m, total, height, width,
    CL: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Where the output's pixels m lie in a plain input: image and place in it (channels_last: place among all images'
    pixels), and a bit for each tap that stays inside the map."""
    if KERNEL == 1 and STRIDE == 1:
        pixels = multiple(height * width, ALIGN)
        image, place = (m, m) if CL else (m // pixels, m % pixels)
        taps = (m < total).to(tl.int32)
    else:
        out_height, out_width = strided(height, STRIDE), strided(width, STRIDE)
        left, top = m % out_width * STRIDE, m // out_width % out_height * STRIDE
        image = m // (out_width * out_height)
        place = top * width + left
        if CL:
            place += image * (height * width)
        taps = tl.zeros(m.shape, tl.int32)
        for tap in tl.static_range(KERNEL * KERNEL):
            y = top + (tap // KERNEL - KERNEL // 2) * DILATION
            x = left + (tap % KERNEL - KERNEL // 2) * DILATION
            taps += ((y >= 0) & (y < height) & (x >= 0) & (x < width) & (m < total)).to(tl.int32) << tap
    return image, place, taps


@triton.jit
def chosen(xs, channels, starts, i, PLAIN: tl.constexpr):
    """Input i, its channels, and where its columns of the weight begin; i is known only at run time."""
    x, own, start = xs[0], channels[0], starts[0]
    for j in tl.static_range(1, PLAIN):
        if i == j:
            x = xs[j]
        own = tl.where(i == j, channels[j], own)
        start = tl.where(i == j, starts[j], start)
    return x, own, start


@triton.jit
def load_weights(
    w, n, k, tap, kin, outs, stride_n, stride_k, stride_t,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """Columns k of the weight's rows n, as (k, n)."""
    weights = w + n[None, :] * stride_n + k[:, None] * stride_k
    # Nothing would know that the only tap is 0, and where a weight begins.
    if KERNEL > 1:
        weights += tap * stride_t
    return fetch(weights, None if EVEN_K and EVEN_N else kin[:, None] & outs[None, :])


@triton.jit
def add_step(
    acc, x, own, start, i, first, tap, image, place, taps, w, n, norm, added, height, width, out_channels,
    stride_n, stride_k, stride_t,
    BK: tl.constexpr, CL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, ALIGN: tl.constexpr, PLAIN: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """The product of one plain input's channels from ``first`` on and one tap, added to a tile of z."""
    k = first + tl.arange(0, BK)
    kin = k < own
    pixels = height * width
    if KERNEL == 1 and STRIDE == 1:
        pixels = multiple(pixels, ALIGN)
    if KERNEL > 1:
        place += ((tap // KERNEL - KERNEL // 2) * width + tap % KERNEL - KERNEL // 2) * DILATION
    row, column = place * own, k
    if not CL:
        row = image * (own * pixels) + place
        column = (k.to(tl.int64) if I64 else k) * pixels
    offset = row[:, None] + column[None, :]
    address = x + offset
    rows = ((taps >> tap) & 1) != 0
    mask = inside(rows, kin, EVEN_K, EVEN_M and KERNEL == 1)
    values = fetch(address, mask)
    if PRE is not None:
        ACT: tl.constexpr = PRE[1]
        SLOPE: tl.constexpr = PRE[2]
        given = kin & (i == PRE[0])
        center, scale, shift = coefficients_of(norm, own, k, given)
        values = formed_if(
            i == PRE[0], values, added, offset, mask, rows, kin, center, scale, shift,
            EVEN_K, PLAIN == 1, ACT, SLOPE, ACC,
        )  # fmt: skip
    right = load_weights(
        w, n, start + k, tap, kin, n < out_channels, stride_n, stride_k, stride_t, EVEN_K, EVEN_N, KERNEL
    )  # fmt: skip
    return tl.dot(tf32(values, PRECISION), tf32(right, PRECISION), acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def load_upsampled(
    x, up, image, top, left, k, there, kin, height, width, channels,
    CL: tl.constexpr, EVEN: tl.constexpr, I64: tl.constexpr, F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Channels k of the upsampled map: a sum of 2 x 2 products, rounded as a map that is stored would be."""
    i, j = (top + F // 2) // F, (left + F // 2) // F
    tap = ((top + F // 2) % F * (2 * F) + (left + F // 2) % F)[:, None] + (k * (4 * F * F))[None, :]
    mask = inside(there, kin, False)
    acc = tl.zeros((top.shape[0], k.shape[0]), ACC)
    for corner in tl.static_range(4):
        row, column = i - corner // 2, j - corner % 2
        exists = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixel = (image * height + row) * width + column
        value = tl.load(
            x + (at(pixel, height * width, channels, CL)[:, None] + along(k, height * width, CL, I64)[None, :]),
            mask=inside(exists, kin, EVEN), other=0.0,
        )  # fmt: skip
        weight = tl.load(up + tap + (corner // 2 * 2 * F * F + corner % 2 * F), mask=mask, other=0.0)
        acc += value.to(ACC) * weight.to(ACC)
    return acc.to(x.dtype.element_ty)


@triton.jit
def add_upsampled(
    acc, xs, ups, heights, widths, channels, starts, w, m, n, total, height, width, out_channels,
    stride_n, stride_k, stride_t,
    BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, I64: tl.constexpr, FACTORS: tl.constexpr, PLAIN: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """The products of the inputs that are upsampled on the way, added to a tile of z."""
    out_height, out_width = strided(height, STRIDE), strided(width, STRIDE)
    x, y = m % out_width, m // out_width % out_height
    image = m // (out_width * out_height)
    for i in tl.static_range(PLAIN, len(xs)):
        for tap in range(KERNEL * KERNEL):
            top = y * STRIDE + (tap // KERNEL - KERNEL // 2) * DILATION
            left = x * STRIDE + (tap % KERNEL - KERNEL // 2) * DILATION
            there = (m < total) & (top >= 0) & (top < height) & (left >= 0) & (left < width)
            for first in range(0, channels[i], BK):
                k = first + tl.arange(0, BK)
                kin = k < channels[i]
                values = load_upsampled(
                    xs[i], ups[i], image, top, left, k, there, kin, heights[i], widths[i], channels[i],
                    CL, EVEN_K, I64, FACTORS[i], ACC,
                )  # fmt: skip
                right = load_weights(
                    w, n, starts[i] + k, tap, kin, n < out_channels, stride_n, stride_k, stride_t,
                    EVEN_K, EVEN_N, KERNEL,
                )  # fmt: skip
                values, right = tf32(values, PRECISION), tf32(right, PRECISION)
                acc = tl.dot(values, right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def advance(i, first, tap, own, BK: tl.constexpr, PLAIN: tl.constexpr, KERNEL: tl.constexpr):
    """The step after this one, (input, first channel, tap), and whether this one was a tile's last."""
    tap += 1
    ends = tap == KERNEL * KERNEL
    tap = tl.where(ends, 0, tap)
    first = tl.where(ends, first + BK, first)
    ends = ends & (first >= own)
    first = tl.where(ends, 0, first)
    i = tl.where(ends, i + 1, i)
    last = ends & (i >= PLAIN)
    return tl.where(last, 0, i), first, tap, last


@triton.jit
def next_step(
    acc, i, first, tap, last, tile, image, place, taps, xs, ups, heights, widths, channels, starts, w, n,
    norm, added, total, height, width, out_channels, stride_n, stride_k, stride_t,
    BM: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_M: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr, ALIGN: tl.constexpr,
    FACTORS: tl.constexpr, PLAIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    PRE: tl.constexpr,
):  # fmt: skip
    """One step of the flat loop: what it leaves behind, whether it was its tile's last, and the tile's pixels."""
    m = pixel_range(tile, BM, I64)
    if KERNEL == 1 and STRIDE == 1 and CL:
        image, place, taps = m, m, (m < total).to(tl.int32)
    elif last:
        # Apart from what ends a tile, which waits for its product: the next loads must not.
        image, place, taps = place_of(m, total, height, width, CL, KERNEL, STRIDE, DILATION, ALIGN)
    own = BK
    if PLAIN > 0:
        x, own, start = chosen(xs, channels, starts, i, PLAIN)
        acc = add_step(
            acc, x, own, start, i, first, tap, image, place, taps, w, n, norm, added, height, width, out_channels,
            stride_n, stride_k, stride_t,
            BK, CL, EVEN_M, EVEN_K, EVEN_N, PRECISION, ACC, I64, KERNEL, STRIDE, DILATION, ALIGN, PLAIN, PRE,
        )  # fmt: skip
    i, first, tap, last = advance(i, first, tap, own, BK, PLAIN, KERNEL)
    if len(xs) > PLAIN:  # noqa: SIM102, the inner condition is the device's
        if last:
            acc = add_upsampled(
                acc, xs, ups, heights, widths, channels, starts, w, m, n, total, height, width, out_channels,
                stride_n, stride_k, stride_t,
                BK, CL, EVEN_K, EVEN_N, PRECISION, ACC, I64, FACTORS, PLAIN, KERNEL, STRIDE, DILATION,
            )  # fmt: skip
    return acc, i, first, tap, last, m, image, place, taps


@triton.jit
def output_of(m, n, pixels, out_channels, CL: tl.constexpr, I64: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets of a tile of the output."""
    return at(m, pixels, out_channels, CL, ALIGN)[:, None] + along(n, pixels, CL, I64, ALIGN)[None, :]


@triton.jit
def folded(value, WARPS: tl.constexpr):
    """A tile's rows added up as far as one thread holds them, by the layout of a warp's product: no value moves."""
    parts = tl.reshape(value, (value.shape[0] // (16 * WARPS), WARPS, 2, 8, value.shape[1]))
    return tl.sum(tl.sum(parts, 2), 0)


@triton.jit
def add_both(a, b, c, d):
    """Two sums in one reduction."""
    return a + c, b + d


@triton.jit
def inference_kernel(
    xs, ups, heights, widths, channels, starts, w, y, residual, mean, var, gamma, beta, bias, total, height, width,
    out_channels, stride_n, stride_k, stride_t, steps, per_program,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, FACTORS: tl.constexpr, PLAIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(out_channels, BN)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    outs, pixels = n < out_channels, strided(height, STRIDE) * strided(width, STRIDE)
    center, _, scale, shift = norm_of(mean, var, gamma, beta, n, outs, EPS, ACC)
    center -= per_channel(bias, n, outs, 0.0, ACC)
    tile = tl.program_id(0) // blocks * per_program
    mine = tl.minimum(per_program, tl.cdiv(total, BM) - tile)
    image, place, taps = place_of(
        pixel_range(tile, BM, I64), total, height, width, CL, KERNEL, STRIDE, DILATION, ALIGN
    )  # fmt: skip
    i, first, tap, last = 0, 0, 0, tile < 0
    acc = tl.zeros((BM, BN), ACC)
    for _ in range(0, mine * steps):
        acc, i, first, tap, last, m, image, place, taps = next_step(
            acc, i, first, tap, last, tile, image, place, taps, xs, ups, heights, widths, channels, starts, w, n,
            None, None, total, height, width, out_channels, stride_n, stride_k, stride_t,
            BM, BK, CL, EVEN_M, EVEN_K, EVEN_N, PRECISION, ACC, I64, ALIGN, FACTORS, PLAIN, KERNEL, STRIDE, DILATION,
            None,
        )  # fmt: skip
        if last:
            offset = output_of(m, n, pixels, out_channels, CL, I64, ALIGN)
            mask = inside(m < total, outs, EVEN_N, EVEN_M)
            u = (acc - center[None, :]) * scale[None, :] + shift[None, :]
            if residual is not None:
                u += read(residual + offset, mask, ACC)
            tl.store(y + offset, activate(u, ACT, SLOPE).to(y.dtype.element_ty), mask=mask)
            acc = tl.zeros((BM, BN), ACC)
        tile = tl.where(last, tile + 1, tile)


@triton.jit
def stage_kernel(
    xs, ups, heights, widths, channels, starts, w, z, partial, norm, added, total, height, width,
    out_channels, stride_n, stride_k, stride_t, steps, per_program,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, FACTORS: tl.constexpr, PLAIN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, WARPS: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """WARPS: over how many of them a tile's rows are spread, where moments are carried from tile to tile; else 0."""
    blocks = tl.cdiv(out_channels, BN)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    outs, pixels = n < out_channels, strided(height, STRIDE) * strided(width, STRIDE)
    group = tl.program_id(0) // blocks
    begin = group * per_program
    tile = begin
    tiles = tl.cdiv(total, BM)
    mine = tl.minimum(per_program, tiles - tile)
    if WARPS > 0:
        shift = tl.zeros((BN,), ACC)
        rest = tl.zeros((WARPS, 8, BN), ACC)
        squares = tl.zeros((WARPS, 8, BN), ACC)
    image, place, taps = place_of(
        pixel_range(tile, BM, I64), total, height, width, CL, KERNEL, STRIDE, DILATION, ALIGN
    )  # fmt: skip
    i, first, tap, last = 0, 0, 0, tile < 0
    acc = tl.zeros((BM, BN), ACC)
    for _ in range(0, mine * steps):
        acc, i, first, tap, last, m, image, place, taps = next_step(
            acc, i, first, tap, last, tile, image, place, taps, xs, ups, heights, widths, channels, starts, w, n,
            norm, added, total, height, width, out_channels, stride_n, stride_k, stride_t,
            BM, BK, CL, EVEN_M, EVEN_K, EVEN_N, PRECISION, ACC, I64, ALIGN, FACTORS, PLAIN, KERNEL, STRIDE, DILATION,
            PRE,
        )  # fmt: skip
        if last:
            written = acc.to(z.dtype.element_ty)
            offset = output_of(m, n, pixels, out_channels, CL, I64, ALIGN)
            mask = inside(m < total, outs, EVEN_N, EVEN_M)
            tl.store(z + offset, written, mask=mask)
            value = written.to(ACC)
            if partial is not None:
                # Sums are taken around the mean of the first tile, any value near the others would do, or of each.
                if WARPS == 0 or tile == begin:
                    first_pixel = (tile.to(tl.int64) if I64 else tile) * BM
                    shift = finite_or_zero(tl.sum(value, 0) / tl.minimum(total - first_pixel, BM).to(ACC))
                off = value - shift[None, :]
                if not EVEN_M:
                    off = tl.where((m < total)[:, None], off, 0.0)
                if WARPS > 0:
                    rest += folded(off, WARPS)
                    squares += folded(off * off, WARPS)
                else:
                    of_tile, m2 = tl.reduce((off, off * off), 0, add_both)
                    to = partial + n * tiles + tile
                    tl.store(to, shift, mask=outs)
                    tl.store(to + out_channels * tiles, m2, mask=outs)
                    tl.store(to + 2 * out_channels * tiles, of_tile, mask=outs)
            acc = tl.zeros((BM, BN), ACC)
        tile = tl.where(last, tile + 1, tile)
    if WARPS > 0:
        groups = tl.cdiv(tiles, per_program)
        to = partial + n * groups + group
        tl.store(to, shift, mask=outs)
        tl.store(to + out_channels * groups, tl.sum(tl.sum(squares, 0), 0), mask=outs)
        tl.store(to + 2 * out_channels * groups, tl.sum(tl.sum(rest, 0), 0), mask=outs)
