"""Backward of a 1 x 1 node's product: dx_i = W_i^T dz (+ g for the residual's input), dW_i = dz^T x_i.

M pixels over all images, K = sum of the inputs' channels C_i, N output channels, b bytes a value. dz is formed once a
value, from dy and z; every channel's coefficients are formed once a program, outside loops.

``fused_kernel`` makes all of it: a program walks a range of pixels with the whole of dW in registers, and dz is never
stored. It reads dy and z (2N) and the inputs (K), writes their gradients (K): 2N + 2K values a pixel, 4KN flops.
For larger nodes ``dx_kernel`` takes a tile of pixels, forms all channels of dz, writes it, and goes over all blocks of
input channels: 2N read, N + K written, 2KN flops; ``weight_kernel`` is then a plain product of dz and the inputs, cut
into ranges of pixels: N + K read, 2KN flops. 4N + 2K together. A residual adds its read (N) to the pass that forms dz.
``weight_sum_kernel`` adds the ranges' dW in order.

One input may be z of the unit before, with y = act(norm(z) + residual) of it: dW then takes y, formed from the z that
is loaded anyway. Where its norm's backward is another's, the gradient that is written is that of what is activated, and
its sums over a tile's or range's pixels are left beside it: ``dx_kernel`` reads z (C_i) for that, ``fused_kernel``
nothing more. That input's own residual is one more read (C_i) of each kernel.

- dy, z, dz, residual: (M, N) channels_last, or (images, N, pixels) contiguous, as CL says; xs[i], dxs[i] the same with
  C_i channels, in any order, starts[i] being the first of their columns of w; with ADD the first of them is the
  residual. Only inputs that need it are among the dxs of ``dx_kernel``
- w, dw: (N, K), K contiguous; partial: (ranges, N, K), accumulation dtype
- mean, var, gamma, beta, sum_dy, sum_dy_xhat: (N,); all but the first two may be None
- before: of that input, PRE[0], (z, residual, norm, partial): z for ``dx_kernel`` alone, norm its coefficients
  (4, C_i), accumulation dtype, partial (2, C_i, tiles or ranges) or None where the gradient is to be y's; PRE[1:] are
  name and slope of the activation. None, like PRE, where there is no such input
- blocks[i]: number of the first block of channels of input i; one more entry says how many blocks there are
"""

import triton
import triton.language as tl

from dla_fast.kernels.prologue_kernels import coefficients_of, formed_if, is_of, passed_back
from dla_fast.kernels.tile import along, at, batch_terms, dz_of, fetch, gradient_of, inside, norm_of, pixel_range, tf32


@triton.jit
def input_of(xs, channels, starts, blocks, block):
    """The input that a block of channels belongs to: itself, its channels, its first column of w, its first block."""
    x, own, start, first = xs[0], channels[0], starts[0], 0
    for i in tl.static_range(1, len(xs)):
        if block >= blocks[i]:
            x = xs[i]
        own = tl.where(block >= blocks[i], channels[i], own)
        start = tl.where(block >= blocks[i], starts[i], start)
        first = tl.where(block >= blocks[i], blocks[i], first)
    return x, own, start, first


@triton.jit
def columns_of(xs, channels, starts, blocks, i, n, outs, depth, BK: tl.constexpr, EACH: tl.constexpr):
    """Where the columns of a program's block i lie in the rows n of w, and which of them there are."""
    block = tl.program_id(0) * EACH + i
    _, own, start, first = input_of(xs, channels, starts, blocks, block)
    k = (block - first) * BK + tl.arange(0, BK)
    return n[:, None] * depth + (start + k)[None, :], outs[:, None] & (k < own)[None, :]


@triton.jit
def dx_block(
    block, parts, dxs, channels, starts, blocks, dy, z, residual, w, mean, var, gamma, beta, before, m, row, rows,
    pixels, out_channels, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, CHUNKS: tl.constexpr, ADD: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    SLOPE: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of input channels, from all channels of dz; of the input with a prologue on through
    that, where PRE is given."""
    if PRE is not None:
        ACT_BEFORE: tl.constexpr = PRE[1]
        SLOPE_BEFORE: tl.constexpr = PRE[2]
    dx, own, start, first = input_of(dxs, channels, starts, blocks, block)
    k = (block - first) * BK + tl.arange(0, BK)
    kin = k < own
    acc = tl.zeros((BM, BK), ACC)
    for chunk in tl.static_range(CHUNKS):
        weights = w + (chunk * BN + tl.arange(0, BN))[:, None] * depth + (start + k)[None, :]
        there = (chunk * BN + tl.arange(0, BN))[:, None] < out_channels
        right = fetch(weights, None if EVEN_N and EVEN_K else there & kin[None, :])
        acc = tl.dot(parts[chunk], tf32(right, PRECISION), acc, input_precision=PRECISION, out_dtype=ACC)
    of_input = inside(rows, kin, EVEN_K, EVEN_M)
    if ADD:  # noqa: SIM102, the inner condition is the device's
        if block < blocks[1]:
            center_k, _, scale_k, shift_k = norm_of(mean, var, gamma, beta, k, kin, EPS, ACC)
            of_first = row + along(k, pixels, CL, I64, ALIGN)[None, :]
            acc += gradient_of(
                dy, z, residual, of_first, of_input, center_k, scale_k, shift_k, ACT, SLOPE, ACC
            )[0]  # fmt: skip
    to = dx + at(m, pixels, own, CL, ALIGN)[:, None] + along(k, pixels, CL, I64, ALIGN)[None, :]
    if PRE is not None:
        center_k, scale_k, shift_k = coefficients_of(before[2], own, k, kin)
        of_before = at(m, pixels, own, CL, ALIGN)[:, None] + along(k, pixels, CL, I64, ALIGN)[None, :]
        acc, first_sum, second_sum = passed_back(
            acc, fetch(before[0] + of_before, of_input), before[1], of_before, of_input,
            center_k, scale_k, shift_k, ACT_BEFORE, SLOPE_BEFORE, ACC,
        )  # fmt: skip
        tiles = tl.num_programs(0)
        of_tile = before[3] + k * tiles + tl.program_id(0)
        tl.store(of_tile, first_sum, mask=kin)
        tl.store(of_tile + own * tiles, second_sum * fetch(before[2] + 3 * own + k, kin), mask=kin)
    tl.store(to, acc.to(dx.dtype.element_ty), mask=of_input)


@triton.jit
def dx_kernel(
    dxs, channels, starts, blocks, dy, z, dz, residual, w, mean, var, gamma, beta, sum_dy, sum_dy_xhat, before,
    inverse_count: tl.float64, total, pixels, out_channels, depth, count,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, CHUNKS: tl.constexpr, ADD: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    SLOPE: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    m = pixel_range(tl.program_id(0), BM, I64)
    rows = m < total
    row = at(m, pixels, out_channels, CL, ALIGN)[:, None]
    parts = ()
    for chunk in tl.static_range(CHUNKS):
        n = chunk * BN + tl.arange(0, BN)
        outs = n < out_channels
        center, rstd, scale, shift = norm_of(mean, var, gamma, beta, n, outs, EPS, ACC)
        tilt, drop = batch_terms(sum_dy, sum_dy_xhat, inverse_count, rstd, scale, n, outs, ACC)
        offset = row + along(n, pixels, CL, I64, ALIGN)[None, :]
        mask = inside(rows, outs, EVEN_N, EVEN_M)
        grad, off = gradient_of(dy, z, residual, offset, mask, center, scale, shift, ACT, SLOPE, ACC)
        part = dz_of(grad, off, scale, tilt, drop, sum_dy is None).to(w.dtype.element_ty)
        if dz is not None:
            tl.store(dz + offset, part, mask=mask)
        parts = parts + (tf32(part, PRECISION),)  # type: ignore[assignment]
    # The input whose gradient goes on is the last.
    plain = count
    if PRE is not None:
        plain = blocks[PRE[0]]
    if PRE is None or len(dxs) > 1:
        for block in range(0, plain):
            dx_block(
                block, parts, dxs, channels, starts, blocks, dy, z, residual, w, mean, var, gamma, beta, None, m, row,
                rows, pixels, out_channels, depth,
                BM, BN, BK, CL, EVEN_M, EVEN_K, EVEN_N, PRECISION, ACC, I64, ALIGN, CHUNKS, ADD, EPS, ACT, SLOPE, None,
            )  # fmt: skip
    if PRE is not None:
        for block in range(plain, count):
            dx_block(
                block, parts, dxs, channels, starts, blocks, dy, z, residual, w, mean, var, gamma, beta, before, m, row,
                rows, pixels, out_channels, depth,
                BM, BN, BK, CL, EVEN_M, EVEN_K, EVEN_N, PRECISION, ACC, I64, ALIGN, CHUNKS, False, EPS, ACT, SLOPE, PRE,
            )  # fmt: skip


@triton.jit
def weight_kernel(
    xs, channels, starts, blocks, dz, dw, before, total, pixels, out_channels, depth, tiles_per_range,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    if PRE is not None:
        ACT_BEFORE: tl.constexpr = PRE[1]
        SLOPE_BEFORE: tl.constexpr = PRE[2]
    outs_blocks = tl.cdiv(out_channels, BN)
    block = tl.program_id(0) // outs_blocks
    n = tl.program_id(0) % outs_blocks * BN + tl.arange(0, BN)
    outs = n < out_channels
    x, own, start, first = input_of(xs, channels, starts, blocks, block)
    k = (block - first) * BK + tl.arange(0, BK)
    if PRE is not None:
        formed_here = is_of(block, blocks, PRE[0])
        center, scale, shift = coefficients_of(before[2], own, k, (k < own) & formed_here)
    acc = tl.zeros((BN, BK), ACC)
    begin = tl.program_id(1) * tiles_per_range
    for tile in range(begin, tl.minimum(begin + tiles_per_range, tl.cdiv(total, BM))):
        m = pixel_range(tile, BM, I64)
        rows = m < total
        left = dz + at(m, pixels, out_channels, CL, ALIGN)[:, None] + along(n, pixels, CL, I64, ALIGN)[None, :]
        right = x + at(m, pixels, own, CL, ALIGN)[:, None] + along(k, pixels, CL, I64, ALIGN)[None, :]
        a = fetch(left, inside(rows, outs, EVEN_N, EVEN_M))
        there = inside(rows, k < own, EVEN_K, EVEN_M)
        b = fetch(right, there)
        if PRE is not None:
            of_before = at(m, pixels, own, CL, ALIGN)[:, None] + along(k, pixels, CL, I64, ALIGN)[None, :]
            b = formed_if(
                formed_here, b, before[1], of_before, there, rows, k < own, center, scale, shift,
                EVEN_K, len(xs) == 1, ACT_BEFORE, SLOPE_BEFORE, ACC,
            )  # fmt: skip
        a, b = tl.trans(tf32(a, PRECISION)), tf32(b, PRECISION)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    to = dw + tl.program_id(1).to(tl.int64) * out_channels * depth + n[:, None] * depth + (start + k)[None, :]
    tl.store(to, acc.to(dw.dtype.element_ty), mask=outs[:, None] & (k < own)[None, :])


@triton.jit
def fused_kernel(
    xs, dxs, channels, starts, blocks, dy, z, residual, w, dw, mean, var, gamma, beta, sum_dy, sum_dy_xhat, before,
    inverse_count: tl.float64, total, pixels, out_channels, depth, tiles_per_range,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_M: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, EACH: tl.constexpr, DX: tl.constexpr, ADD: tl.constexpr, EPS: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """A program takes EACH blocks of input channels: all there are, or one, chosen by its number. Bit i of DX says that
    input i needs its gradient."""
    if PRE is not None:
        ACT_BEFORE: tl.constexpr = PRE[1]
        SLOPE_BEFORE: tl.constexpr = PRE[2]
    n = tl.arange(0, BN)
    outs = n < out_channels
    center, rstd, scale, shift = norm_of(mean, var, gamma, beta, n, outs, EPS, ACC)
    tilt, drop = batch_terms(sum_dy, sum_dy_xhat, inverse_count, rstd, scale, n, outs, ACC)
    accs, weights = (), ()
    firsts, seconds = (), ()  # type: ignore[var-annotated]
    for i in tl.static_range(EACH):
        columns, there_columns = columns_of(xs, channels, starts, blocks, i, n, outs, depth, BK, EACH)
        taken = fetch(w + columns, None if EVEN_N and EVEN_K else there_columns)
        accs = accs + (tl.zeros((BN, BK), ACC),)  # type: ignore[assignment]
        weights = weights + (tf32(taken, PRECISION),)  # type: ignore[assignment]
        if PRE is not None:
            zeros = (tl.zeros((BK,), ACC),)
            firsts, seconds = firsts + zeros, seconds + zeros  # type: ignore[assignment]
    begin = tl.program_id(1) * tiles_per_range
    for tile in range(begin, tl.minimum(begin + tiles_per_range, tl.cdiv(total, BM))):
        m = pixel_range(tile, BM, I64)
        rows = m < total
        row = at(m, pixels, out_channels, CL, ALIGN)[:, None]
        offset = row + along(n, pixels, CL, I64, ALIGN)[None, :]
        mask = inside(rows, outs, EVEN_N, EVEN_M)
        grad, off = gradient_of(dy, z, residual, offset, mask, center, scale, shift, ACT, SLOPE, ACC)
        dz = dz_of(grad, off, scale, tilt, drop, sum_dy is None)
        # Nothing times what does not fit the dtype would be no number.
        if not EVEN_M:
            dz = tl.where(rows[:, None], dz, 0.0)
        dz = tf32(dz.to(w.dtype.element_ty), PRECISION)
        sums, new_firsts, new_seconds = (), (), ()
        for i in tl.static_range(EACH):
            block = tl.program_id(0) * EACH + i
            x, own, _, first = input_of(xs, channels, starts, blocks, block)
            k = (block - first) * BK + tl.arange(0, BK)
            there = inside(rows, k < own, EVEN_K, EVEN_M)
            at_input = at(m, pixels, own, CL, ALIGN)[:, None] + along(k, pixels, CL, I64, ALIGN)[None, :]
            loaded = fetch(x + at_input, there)
            right = loaded
            if PRE is not None:
                here = is_of(block, blocks, PRE[0])
                center_b, scale_b, shift_b = coefficients_of(before[2], own, k, (k < own) & here)
                right = formed_if(
                    here, loaded, before[1], at_input, there, rows, k < own, center_b, scale_b, shift_b,
                    EVEN_K, len(xs) == 1, ACT_BEFORE, SLOPE_BEFORE, ACC,
                )  # fmt: skip
            right = tf32(right, PRECISION)
            added = tl.dot(tl.trans(dz), right, accs[i], input_precision=PRECISION, out_dtype=ACC)
            sums = sums + (added,)  # type: ignore[assignment]
            if DX:
                dx, _, _, _ = input_of(dxs, channels, starts, blocks, block)
                made = tl.dot(dz, weights[i], input_precision=PRECISION, out_dtype=ACC)
                if ADD:
                    # Where the block is not one of input 0, nothing is loaded.
                    of_first = tl.where(block < blocks[1], own, 0)
                    center_k, _, scale_k, shift_k = norm_of(mean, var, gamma, beta, k, k < of_first, EPS, ACC)
                    passed, _ = gradient_of(
                        dy, z, residual, row + along(k, pixels, CL, I64, ALIGN)[None, :],
                        inside(rows, k < of_first, False), center_k, scale_k, shift_k, ACT, SLOPE, ACC,
                    )  # fmt: skip
                    made += passed
                if PRE is not None:  # noqa: SIM102, before[3] is None of other kernels alone
                    if before[3] is not None:
                        # No condition of its own: the compiler's pipeline takes no sums inside one.
                        of_it = there if len(xs) == 1 else inside(rows & here, k < own, EVEN_K)
                        back, first_sum, second_sum = passed_back(
                            made, loaded, before[1], at_input, of_it, center_b, scale_b, shift_b,
                            ACT_BEFORE, SLOPE_BEFORE, ACC,
                        )  # fmt: skip
                        made = back if len(xs) == 1 else tl.where(here, back, made)
                        new_firsts = new_firsts + (firsts[i] + first_sum,)  # type: ignore[assignment]
                        new_seconds = new_seconds + (seconds[i] + second_sum,)  # type: ignore[assignment]
                if (1 << len(xs)) - 1 == DX:
                    tl.store(dx + at_input, made.to(dx.dtype.element_ty), mask=there)
                else:
                    wanted = tl.full((), False, tl.int1)
                    for j in tl.static_range(len(xs)):
                        wanted |= (block >= blocks[j]) & (block < blocks[j + 1]) & (((DX >> j) & 1) != 0)
                    tl.store(dx + at_input, made.to(dx.dtype.element_ty), mask=inside(rows, k < own, False) & wanted)
        accs = sums
        if PRE is not None:  # noqa: SIM102
            if before[3] is not None:
                firsts, seconds = new_firsts, new_seconds
    to = dw + tl.program_id(1).to(tl.int64) * out_channels * depth
    for i in tl.static_range(EACH):
        columns, there_columns = columns_of(xs, channels, starts, blocks, i, n, outs, depth, BK, EACH)
        tl.store(to + columns, accs[i].to(dw.dtype.element_ty), mask=there_columns)
        if PRE is not None:  # noqa: SIM102
            if before[3] is not None:
                block = tl.program_id(0) * EACH + i
                _, own, _, first = input_of(xs, channels, starts, blocks, block)
                k = (block - first) * BK + tl.arange(0, BK)
                kin, ranges = (k < own) & is_of(block, blocks, PRE[0]), tl.num_programs(1)
                of_range = before[3] + k * ranges + tl.program_id(1)
                tl.store(of_range, firsts[i], mask=kin)
                tl.store(of_range + own * ranges, seconds[i] * fetch(before[2] + 3 * own + k, kin), mask=kin)


@triton.jit
def weight_sum_kernel(partial, dw, size, ranges, B: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    acc = tl.zeros((R, B), ACC)
    for first in range(0, ranges, R):
        r = first + tl.arange(0, R)
        at_range = partial + r.to(tl.int64)[:, None] * size + i[None, :]
        acc += tl.load(at_range, mask=(r < ranges)[:, None] & (i < size)[None, :], other=0.0)
    tl.store(dw + i, tl.sum(acc, 0).to(dw.dtype.element_ty), mask=i < size)
