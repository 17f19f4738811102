"""The learned upsampling: depthwise transposed convolution, kernel 2F, stride F, padding F // 2; and its backward.

P low-resolution values (pixels times channels), b bytes a value. Output o of a side takes the inputs o' // F and
o' // F - 1 with the kernel's rows o' % F and that plus F, where o' = o + F // 2. So *position* (i, j), 0 <= i <= H and
0 <= j <= W, stands for the F x F outputs that take x at i, i - 1 and j, j - 1.

A program takes a tile of an image's output columns and of channels, and walks down the rows of positions with the
weights of its phases in registers: a row of x, loaded one step ahead, is the row before of the next step. Nothing is
divided per pixel, and 16 bytes are stored at a time. ``upsample_kernel`` does so for one or two of the F rows of
phases, beside the programs that take the others and find x in cache: (1 + F^2) P b bytes, and F^2 P b more where a map
is added; 8 F^2 P flops. A contiguous map that becomes twice as large has its pixels joined in pairs, so that a thread's
weights are those of one channel. ``backward_kernel`` has (low-resolution pixel, phase) for rows of a tile: a value of
dy is met by two pixels of a row, gives its part of dx to two rows, which are added over phases, and its part of dW to
sums that the program keeps over several images: (2 + F^2) P b bytes for both, 16 F^2 P flops. It writes 16 F^2 bytes a
program and channel besides, the parts of dW, which ``weight_gradient_kernel`` reads again and adds in double.

- x, dx: (images, H, W, C) channels_last, or (images, C, H, W), as CL says; y, skip, dy the same with H', W'
- w, dw: (C, 1, 2F, 2F)
- partial: (4 F^2, C, programs), accumulation dtype

Sums run in a fixed order, so results are bitwise the same from run to run.
"""

import triton
import triton.language as tl

from dla_fast.kernels.tile import along, inside, multiple, read


@triton.jit
def wide_if(n, I64: tl.constexpr):
    """A side from which offsets in an image of 2^31 values follow without overflow."""
    if I64:
        n = tl.full((), 0, tl.int64) + n
    return n


@triton.jit
def place_of(row, pixel, column, there, cols, width, channels, CL: tl.constexpr, EVEN: tl.constexpr):
    """(offset of a tile at one row, or a row for each pixel, of an image; its mask)."""
    if CL:
        offset = ((row * width + pixel) * channels)[:, None] + column
    else:
        offset = (row * width + pixel)[:, None] + column
    return offset, inside(there, cols, EVEN)


@triton.jit
def weights_of(w, c, cols, there, ky, kx, F: tl.constexpr, ACC: tl.constexpr):
    """The four taps of a phase, each for the positions and channels of a tile."""
    tap = w + c[None, :] * (4 * F * F) + (ky * (2 * F) + kx)[:, None]
    mask = there[:, None] & cols[None, :]
    w00, w01 = read(tap, mask, ACC), read(tap + F, mask, ACC)
    return w00, w01, read(tap + 2 * F * F, mask, ACC), read(tap + 2 * F * F + F, mask, ACC)


@triton.jit
def phase_row(
    skip, y, x00, x01, x10, x11, w00, w01, w10, w11, top, o, column, there, cols, out_height, out_width, channels,
    CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row of the output, of a tile's columns."""
    offset, mask = place_of(
        top, o, column, there & (top >= 0) & (top < out_height), cols, out_width, channels, CL, EVEN
    )
    value = x00 * w00 + x01 * w01 + x10 * w10 + x11 * w11
    if skip is not None:
        value += read(skip + offset, mask, ACC)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def tiles_down(
    x, w, skip, y, o, c, first, last, ky, height, width, channels, out_height, out_width,
    CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of output columns down an image: one or two rows of phases from ``ky`` on."""
    cols, there = c < channels, o < out_width
    column = along(c, height * width, CL, I64)[None, :]
    out_column = along(c, out_height * out_width, CL, I64)[None, :]
    j, kx = (o + F // 2) // F, (o + F // 2) % F
    here, left = there & (j < width), there & (j > 0)
    w00, w01, w10, w11 = weights_of(w, c, cols, there, ky, kx, F, ACC)
    if ROWS == 2:
        v00, v01, v10, v11 = weights_of(w, c, cols, there, ky + 1, kx, F, ACC)
    # x at j and j - 1, of the row before this one, and ahead of its use of this one.
    at0, mask0 = place_of(first - 1, j, column, here & (first > 0), cols, width, channels, CL, EVEN)
    at1, mask1 = place_of(first - 1, j - 1, column, left & (first > 0), cols, width, channels, CL, EVEN)
    x10, x11 = read(x + at0, mask0, ACC), read(x + at1, mask1, ACC)
    at0, mask0 = place_of(first, j, column, here & (first < height), cols, width, channels, CL, EVEN)
    at1, mask1 = place_of(first, j - 1, column, left & (first < height), cols, width, channels, CL, EVEN)
    x00, x01 = tl.load(x + at0, mask=mask0, other=0.0), tl.load(x + at1, mask=mask1, other=0.0)
    for i in range(first, last):
        at0, mask0 = place_of(i + 1, j, column, here & (i + 1 < height), cols, width, channels, CL, EVEN)
        at1, mask1 = place_of(i + 1, j - 1, column, left & (i + 1 < height), cols, width, channels, CL, EVEN)
        next0, next1 = tl.load(x + at0, mask=mask0, other=0.0), tl.load(x + at1, mask=mask1, other=0.0)
        a, b = x00.to(ACC), x01.to(ACC)
        top = i * F - F // 2 + ky
        phase_row(
            skip, y, a, b, x10, x11, w00, w01, w10, w11, top, o, out_column, there, cols, out_height, out_width,
            channels, CL, EVEN, ACC,
        )  # fmt: skip
        if ROWS == 2:
            phase_row(
                skip, y, a, b, x10, x11, v00, v01, v10, v11, top + 1, o, out_column, there, cols, out_height,
                out_width, channels, CL, EVEN, ACC,
            )  # fmt: skip
        x10, x11, x00, x01 = a, b, next0, next1


@triton.jit
def around(x, i, p, column, cols, height, width):
    """A contiguous row of x at the pixels before, at and behind ``p``: (channels, pixels)."""
    at = x + column + (i * width + p)[None, :]
    rows = cols[:, None] & (i >= 0) & (i < height)
    before = tl.load(at - 1, mask=rows & ((p > 0) & (p <= width))[None, :], other=0.0)
    behind = tl.load(at + 1, mask=rows & (p + 1 < width)[None, :], other=0.0)
    return before, tl.load(at, mask=rows & (p < width)[None, :], other=0.0), behind


@triton.jit
def taps_of(w, c, cols, ky, ACC: tl.constexpr):
    """A channel's eight taps for one row of the output, of sixteen."""
    tap = w + c * 16 + ky * 4
    w0, w1 = read(tap, cols, ACC)[:, None], read(tap + 1, cols, ACC)[:, None]
    w2, w3 = read(tap + 2, cols, ACC)[:, None], read(tap + 3, cols, ACC)[:, None]
    v0, v1 = read(tap + 8, cols, ACC)[:, None], read(tap + 9, cols, ACC)[:, None]
    return w0, w1, w2, w3, v0, v1, read(tap + 10, cols, ACC)[:, None], read(tap + 11, cols, ACC)[:, None]


@triton.jit
def pair_row(
    skip, y, taps, x0, x1, x2, u0, u1, u2, top, o, cols, column, out_height, out_width, ACC: tl.constexpr
):  # fmt: skip
    """One row of a contiguous output, twice as large as x: the pixels 2 p and 2 p + 1 beside each other."""
    w0, w1, w2, w3, v0, v1, v2, v3 = taps
    even = x1 * w1 + x0 * w3 + u1 * v1 + u0 * v3
    odd = x2 * w0 + x1 * w2 + u2 * v0 + u1 * v2
    value = tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))
    offset = column + (top * out_width + o)[None, :]
    mask = cols[:, None] & ((o < out_width) & (top >= 0) & (top < out_height))[None, :]
    if skip is not None:
        value += read(skip + offset, mask, ACC)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def pairs_down(
    x, w, skip, y, p, o, c, first, last, height, width, channels, out_height, out_width,
    ACC: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """The same of a contiguous image that becomes twice as large: a thread's weights are one channel's."""
    cols = c < channels
    column = along(c, height * width, False, I64)[:, None]
    out_column = along(c, out_height * out_width, False, I64)[:, None]
    upper, lower = taps_of(w, c, cols, 0, ACC), taps_of(w, c, cols, 1, ACC)
    u0, u1, u2 = around(x, first - 1, p, column, cols, height, width)
    u0, u1, u2 = u0.to(ACC), u1.to(ACC), u2.to(ACC)
    x0, x1, x2 = around(x, first, p, column, cols, height, width)
    for i in range(first, last):
        n0, n1, n2 = around(x, i + 1, p, column, cols, height, width)
        a0, a1, a2 = x0.to(ACC), x1.to(ACC), x2.to(ACC)
        top = 2 * i - 1
        pair_row(skip, y, upper, a0, a1, a2, u0, u1, u2, top, o, cols, out_column, out_height, out_width, ACC)
        pair_row(skip, y, lower, a0, a1, a2, u0, u1, u2, top + 1, o, cols, out_column, out_height, out_width, ACC)
        u0, u1, u2, x0, x1, x2 = a0, a1, a2, n0, n1, n2


@triton.jit
def upsample_kernel(
    x, w, skip, y, height, width, channels, out_height, out_width, blocks, columns, chunks, each,
    BM: tl.constexpr, BN: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    # Two rows of phases a program, where F is even; programs that read the same of x run at a time.
    ROWS: tl.constexpr = 2 - F % 2
    SHARES: tl.constexpr = F // ROWS
    program = tl.program_id(0)
    ky = program % SHARES * ROWS
    program = program // SHARES
    block, program = program % blocks, program // blocks
    start, program = program % columns * BM, program // columns
    first = program % chunks * each
    image = (program // chunks).to(tl.int64)
    last = tl.minimum(first + each, height + 1)
    width, out_width = wide_if(width, I64), wide_if(multiple(out_width, ALIGN), I64)
    x += image * channels * height * width
    y += image * channels * out_height * out_width
    if skip is not None:
        skip += image * channels * out_height * out_width
    c = block * BN + tl.arange(0, BN)
    o = start + tl.arange(0, BM)
    if CL or F > 2 or BM < 2:
        tiles_down(
            x, w, skip, y, o, c, first, last, ky, height, width, channels, out_height, out_width,
            CL, EVEN, ACC, I64, F, ROWS,
        )  # fmt: skip
    else:
        p = start // 2 + tl.arange(0, BM // 2)
        width = multiple(width, ALIGN // 2)
        pairs_down(x, w, skip, y, p, o, c, first, last, height, width, channels, out_height, out_width, ACC, I64)


@triton.jit
def rows_of(
    dy, x, i, last, o, p, ky, out_column, column, real, more, cols, height, width, out_height, out_width, channels,
    CL: tl.constexpr, EVEN: tl.constexpr, F: tl.constexpr, FY: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """What a step down an image reads: dy of two rows of phases at a column and F behind it, and x, if wanted."""
    top = i * F - F // 2 + ky
    upper = real & (i <= last) & (top >= 0) & (top < out_height)
    lower = more & (i <= last) & (top + FY >= 0) & (top + FY < out_height)
    here, beside = (o >= 0) & (o < out_width), o + F < out_width
    at, mask = place_of(top, o, out_column, upper & here, cols, out_width, channels, CL, EVEN)
    g0 = tl.load(dy + at, mask=mask, other=0.0)
    at, mask = place_of(top, o + F, out_column, upper & beside, cols, out_width, channels, CL, EVEN)
    g1 = tl.load(dy + at, mask=mask, other=0.0)
    at, mask = place_of(top + FY, o, out_column, lower & here, cols, out_width, channels, CL, EVEN)
    g2 = tl.load(dy + at, mask=mask, other=0.0)
    at, mask = place_of(top + FY, o + F, out_column, lower & beside, cols, out_width, channels, CL, EVEN)
    g3 = tl.load(dy + at, mask=mask, other=0.0)
    value = g0
    if X:
        at, mask = place_of(i, p, column, (p < width) & (i < last), cols, width, channels, CL, EVEN)
        value = tl.load(x + at, mask=mask, other=0.0)
    return g0, g1, g2, g3, value


@triton.jit
def backward_kernel(
    dy, x, w, dx, partial, images, height, width, channels, out_height, out_width, blocks, columns, groups, each, most,
    BM: tl.constexpr, BN: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, F: tl.constexpr, FX: tl.constexpr,
):  # fmt: skip
    # A tile's rows are (pixel, half of the phases' rows, phase of a column), FX the power of two not below F.
    FY: tl.constexpr = FX // 2
    PHASES: tl.constexpr = FX * FY
    BP: tl.constexpr = BM // PHASES
    program = tl.program_id(0)
    block, program = program % blocks, program // blocks
    pixel, group = program % columns * BP, program // columns
    r = tl.arange(0, BM)
    p, ky, kx = pixel + r // PHASES, r // FX % FY, r % FX
    c = block * BN + tl.arange(0, BN)
    cols = c < channels
    width, out_width = wide_if(width, I64), wide_if(multiple(out_width, ALIGN), I64)
    column = along(c, height * width, CL, I64)[None, :]
    out_column = along(c, out_height * out_width, CL, I64)[None, :]
    o = p * F - F // 2 + kx
    real, more = (kx < F) & (ky < F) & (p < width), (kx < F) & (ky + FY < F) & (p < width)
    w00, w01, w10, w11 = weights_of(w, c, cols, real, ky, kx, F, ACC)
    v00, v01, v10, v11 = weights_of(w, c, cols, more, ky + FY, kx, F, ACC)
    zero = tl.zeros((BM, BN), ACC)
    a00, a01, a10, a11, b00, b01, b10, b11 = zero, zero, zero, zero, zero, zero, zero, zero
    q = pixel + tl.arange(0, BP)
    chunks = tl.cdiv(height, each)
    for one in range(group * most, tl.minimum(group * most + most, images * chunks)):
        image, first = (one // chunks).to(tl.int64), one % chunks * each
        last = tl.minimum(first + each, height)
        dy_of, x_of = dy + image * channels * out_height * out_width, x + image * channels * height * width
        g0, g1, g2, g3, value = rows_of(
            dy_of, x_of, first, last, o, p, ky, out_column, column, real, more, cols, height, width, out_height,
            out_width, channels, CL, EVEN, F, FY, partial is not None,
        )  # fmt: skip
        # Of the row before: its gradient so far, and its values.
        grad, before = zero, zero
        for i in range(first, last + 1):
            # Ahead of its use.
            n0, n1, n2, n3, following = rows_of(
                dy_of, x_of, i + 1, last, o, p, ky, out_column, column, real, more, cols, height, width, out_height,
                out_width, channels, CL, EVEN, F, FY, partial is not None,
            )  # fmt: skip
            h0, h1, h2, h3 = g0.to(ACC), g1.to(ACC), g2.to(ACC), g3.to(ACC)
            if partial is not None:
                here = value.to(ACC)
                a00, a01, a10, a11 = a00 + h0 * here, a01 + h1 * here, a10 + h0 * before, a11 + h1 * before
                b00, b01, b10, b11 = b00 + h2 * here, b01 + h3 * here, b10 + h2 * before, b11 + h3 * before
                before = here
            if dx is not None:
                grad += h0 * w10 + h1 * w11 + h2 * v10 + h3 * v11
                to, mask = place_of(i - 1, q, column, (q < width) & (i > first), cols, width, channels, CL, EVEN)
                total = tl.sum(tl.reshape(grad, (BP, PHASES, BN)), 1)
                tl.store(dx + image * channels * height * width + to, total.to(dx.dtype.element_ty), mask=mask)
                grad = h0 * w00 + h1 * w01 + h2 * v00 + h3 * v01
            g0, g1, g2, g3, value = n0, n1, n2, n3, following
    if partial is not None:
        s = tl.arange(0, PHASES)
        ky, kx = s // FX, s % FX
        plane = channels * groups * columns
        to = partial + (ky * (2 * F) + kx)[:, None] * plane
        to += (c * (groups * columns))[None, :] + program
        mask = ((kx < F) & (ky < F))[:, None] & cols[None, :]
        tl.store(to, tl.sum(tl.reshape(a00, (BP, PHASES, BN)), 0), mask=mask)
        tl.store(to + F * plane, tl.sum(tl.reshape(a01, (BP, PHASES, BN)), 0), mask=mask)
        tl.store(to + 2 * F * F * plane, tl.sum(tl.reshape(a10, (BP, PHASES, BN)), 0), mask=mask)
        tl.store(to + (2 * F * F + F) * plane, tl.sum(tl.reshape(a11, (BP, PHASES, BN)), 0), mask=mask)
        to += FY * 2 * F * plane
        mask = ((kx < F) & (ky + FY < F))[:, None] & cols[None, :]
        tl.store(to, tl.sum(tl.reshape(b00, (BP, PHASES, BN)), 0), mask=mask)
        tl.store(to + F * plane, tl.sum(tl.reshape(b01, (BP, PHASES, BN)), 0), mask=mask)
        tl.store(to + 2 * F * F * plane, tl.sum(tl.reshape(b10, (BP, PHASES, BN)), 0), mask=mask)
        tl.store(to + (2 * F * F + F) * plane, tl.sum(tl.reshape(b11, (BP, PHASES, BN)), 0), mask=mask)


@triton.jit
def weight_gradient_kernel(partial, dw, channels, taps, tiles, BC: tl.constexpr, BT: tl.constexpr):
    r = tl.program_id(0) * BC + tl.arange(0, BC)
    rows = r < taps * channels
    total = tl.zeros((BC, BT), tl.float64)
    for first in range(0, tiles, BT):
        t = first + tl.arange(0, BT)
        mask = rows[:, None] & (t < tiles)[None, :]
        total += tl.load(partial + r.to(tl.int64)[:, None] * tiles + t[None, :], mask=mask, other=0.0).to(tl.float64)
    tl.store(dw + r % channels * taps + r // channels, tl.sum(total, 1).to(dw.dtype.element_ty), mask=rows)
