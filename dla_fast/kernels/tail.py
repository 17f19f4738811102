"""The normalisation tail y = act(gamma * (z - mean) / sigma + beta + residual), and its backward.

M pixels over all images, C channels, b bytes a value, R = 1 with a residual and else 0. About 10 flops a value, so each
pass is bound by memory:

``tail_kernel`` reads z (and the residual), writes y: (2 + R) MCb bytes.
``reduce_kernel`` reads dy and z (and the residual): (2 + R) MCb bytes; per group of tiles and channel it writes
sum(g) and sum(g * x_hat), g the gradient before the activation. ``reduce_sum_kernel`` adds the groups in double. Where
the norm's own backward is left to another pass it writes g: (3 + R) MCb bytes.
``apply_kernel`` reads dy and z (and the residual), writes dz (and g, the residual's gradient): (3 + R + R) MCb bytes.

A program forms the coefficients of its channels once and takes several tiles, whole ones without masks; a thread has up
to four accesses of 16 bytes of each operand on their way at a time.

- z, y, dy, dz, residual, g: (M, C) channels_last, or (images, C, pixels) contiguous, as CL says
- where nothing is summed, a contiguous map whose planes are no multiples of 16 bytes is walked as (images, C pixels)
- mean, var: (C,), any dtype; gamma, beta: (C,) or None; sum_dy, sum_dy_xhat: (C,), accumulation dtype, or None
- partial: (2, C, groups), accumulation dtype

Sums run in a fixed order, so results are bitwise the same from run to run.
"""

import itertools
from collections.abc import Iterable

import triton
import triton.language as tl
from torch import Tensor

from dla_fast.kernels import config, examples, host, launch
from dla_fast.kernels.tile import (
    activate,
    along,
    at,
    batch_terms,
    dz_of,
    gradient_of,
    inside,
    multiple,
    norm_of,
    pixel_range,
    program_of,
    read,
)

# Tiles that a program takes one after the other at most: its coefficients are formed once.
_TILES = 8
# The same of the reduction, which keeps its sums in registers.
_TILES_PER_GROUP = 32


@triton.jit
def tail_tile(
    z, y, residual, tile, column, cols, center, scale, shift, total, pixels, channels,
    BM: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr, ALIGN: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    m = pixel_range(tile, BM, I64)
    mask = inside(m < total, cols, EVEN, WHOLE)
    offset = at(m, pixels, channels, CL, ALIGN)[:, None] + column
    u = (read(z + offset, mask, ACC) - center[None, :]) * scale[None, :] + shift[None, :]
    if residual is not None:
        u += read(residual + offset, mask, ACC)
    tl.store(y + offset, activate(u, ACT, SLOPE).to(y.dtype.element_ty), mask=mask)


@triton.jit
def tail_kernel(
    z, y, residual, mean, var, gamma, beta, total, pixels, channels, span, each,
    BM: tl.constexpr, BN: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    group, block = program_of(CL)
    c = block * BN + tl.arange(0, BN)
    cols = c < channels
    column = along(c, pixels, CL, I64, ALIGN)[None, :]
    total = multiple(total, ALIGN)
    center, _, scale, shift = norm_of(mean, var, gamma, beta, c // span, cols, EPS, ACC)
    first = group * each
    last = tl.minimum(first + each, total // BM)
    for tile in range(first, last):
        tail_tile(
            z, y, residual, tile, column, cols, center, scale, shift, total, pixels, channels,
            BM, CL, EVEN, ACC, I64, ALIGN, ACT, SLOPE, True,
        )  # fmt: skip
    # The last tile of all, where it is not a whole one.
    if (last < first + each) & (last * BM < total):
        tail_tile(
            z, y, residual, last, column, cols, center, scale, shift, total, pixels, channels,
            BM, CL, EVEN, ACC, I64, ALIGN, ACT, SLOPE, False,
        )  # fmt: skip


@triton.jit
def reduce_kernel(
    dy, z, residual, du, partial, mean, var, gamma, beta, total, pixels, channels, groups, each,
    BM: tl.constexpr, BN: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    group, block = program_of(CL)
    c = block * BN + tl.arange(0, BN)
    cols = c < channels
    column = along(c, pixels, CL, I64, ALIGN)[None, :]
    total = multiple(total, ALIGN)
    center, rstd, scale, shift = norm_of(mean, var, gamma, beta, c, cols, EPS, ACC)
    PART: tl.constexpr = BM // PARTS
    first = tl.zeros((PART, BN), ACC)
    second = tl.zeros((PART, BN), ACC)
    start = group * each
    last = tl.minimum(start + each, total // BM)
    for tile in range(start, last):
        for part in tl.static_range(PARTS):
            m = pixel_range(tile * PARTS + part, PART, I64)
            offset = at(m, pixels, channels, CL, ALIGN)[:, None] + column
            mask = inside(m < total, cols, EVEN, True)
            grad, off = gradient_of(dy, z, residual, offset, mask, center, scale, shift, ACT, SLOPE, ACC)
            if du is not None:
                tl.store(du + offset, grad.to(du.dtype.element_ty), mask=mask)
            first += grad
            second += grad * off
    # The last tile of all, where it is not a whole one.
    if (last < start + each) & (last * BM < total):
        for part in range(PARTS):
            m = pixel_range(last * PARTS + part, PART, I64)
            offset = at(m, pixels, channels, CL, ALIGN)[:, None] + column
            mask = inside(m < total, cols, EVEN)
            grad, off = gradient_of(dy, z, residual, offset, mask, center, scale, shift, ACT, SLOPE, ACC)
            if du is not None:
                tl.store(du + offset, grad.to(du.dtype.element_ty), mask=mask)
            first += grad
            second += grad * off
    # Once a group: what hundreds of values add up to keeps the digits that each of them had.
    to = partial + c * groups + group
    tl.store(to, tl.sum(first.to(tl.float64), 0).to(ACC), mask=cols)
    tl.store(to + channels * groups, (tl.sum(second.to(tl.float64), 0) * rstd).to(ACC), mask=cols)


@triton.jit
def reduce_sum_kernel(partial, sum_dy, sum_dy_xhat, channels, groups, BC: tl.constexpr, BT: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cols = c < channels
    first = tl.zeros((BC, BT), tl.float64)
    second = tl.zeros((BC, BT), tl.float64)
    for start in range(0, groups, BT):
        g = start + tl.arange(0, BT)
        mask = cols[:, None] & (g < groups)[None, :]
        at = partial + c[:, None] * groups + g[None, :]
        one = tl.load(at, mask=mask, other=0.0)
        other = tl.load(at + channels * groups, mask=mask, other=0.0)
        first += one.to(tl.float64)
        second += other.to(tl.float64)
    tl.store(sum_dy + c, tl.sum(first, 1).to(sum_dy.dtype.element_ty), mask=cols)
    tl.store(sum_dy_xhat + c, tl.sum(second, 1).to(sum_dy_xhat.dtype.element_ty), mask=cols)


@triton.jit
def apply_tile(
    dy, z, residual, dz, du, tile, column, cols, center, scale, shift, tilt, drop, total, pixels, channels,
    BM: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr, ALIGN: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, FROZEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    m = pixel_range(tile, BM, I64)
    mask = inside(m < total, cols, EVEN, WHOLE)
    offset = at(m, pixels, channels, CL, ALIGN)[:, None] + column
    grad, off = gradient_of(dy, z, residual, offset, mask, center, scale, shift, ACT, SLOPE, ACC)
    value = dz_of(grad, off, scale, tilt, drop, FROZEN)
    tl.store(dz + offset, value.to(dz.dtype.element_ty), mask=mask)
    if du is not None:
        tl.store(du + offset, grad.to(du.dtype.element_ty), mask=mask)


@triton.jit
def apply_kernel(
    dy, z, residual, dz, du, mean, var, gamma, beta, sum_dy, sum_dy_xhat, inverse_count: tl.float64,
    total, pixels, channels, span, each,
    BM: tl.constexpr, BN: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    group, block = program_of(CL)
    c = block * BN + tl.arange(0, BN)
    cols = c < channels
    column = along(c, pixels, CL, I64, ALIGN)[None, :]
    total = multiple(total, ALIGN)
    k = c // span
    center, rstd, scale, shift = norm_of(mean, var, gamma, beta, k, cols, EPS, ACC)
    tilt, drop = batch_terms(sum_dy, sum_dy_xhat, inverse_count, rstd, scale, k, cols, ACC)
    first = group * each
    last = tl.minimum(first + each, total // BM)
    for tile in range(first, last):
        apply_tile(
            dy, z, residual, dz, du, tile, column, cols, center, scale, shift, tilt, drop, total, pixels, channels,
            BM, CL, EVEN, ACC, I64, ALIGN, ACT, SLOPE, sum_dy is None, True,
        )  # fmt: skip
    # The last tile of all, where it is not a whole one.
    if (last < first + each) & (last * BM < total):
        apply_tile(
            dy, z, residual, dz, du, last, column, cols, center, scale, shift, tilt, drop, total, pixels, channels,
            BM, CL, EVEN, ACC, I64, ALIGN, ACT, SLOPE, sum_dy is None, False,
        )  # fmt: skip


def tail(
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
) -> Tensor:
    """y of the tail: one launch.

    Args:
        z: (N, C, H, W), floating.
        mean: (C,), any floating dtype, like the norm's other vectors.
        var: (C,), biased, without eps.
        bn_weight: (C,) or None.
        bn_bias: (C,) or None.
        residual: shape and dtype of ``z``, or None.
        eps: added to the variance.
        act: name of the activation.
        slope: of leaky_relu.

    Returns:
        Shape, dtype and layout of ``z``.
    """
    shape = host.Map.of(z)
    z, residual = host.arranged(z, shape.channels_last), host.optional(residual, shape.channels_last)
    y = host.like(z, shape.channels_last)
    shape = shape.flat()
    norm, each = host.Norm.of(mean, var, bn_weight, bn_bias), shape.each(_TILES)
    args = (z, y, residual, *norm, shape.total, shape.pixels, shape.channels, shape.span, each)
    constexprs = shape.constexprs() | host.epilogue(eps, act, slope)
    launch.launch(tail_kernel, shape.grid(each), args, constexprs, shape.cfg)
    return y


def tail_backward_reduce(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """sum(g) and sum(g * x_hat) of every channel, which are dbeta and dgamma: two launches.

    Args:
        dy: gradient of y, shape and dtype of ``z``.
        z: as in :func:`tail`, like the rest.
        mean: see :func:`tail`.
        var: see :func:`tail`.
        bn_weight: see :func:`tail`.
        bn_bias: see :func:`tail`.
        residual: see :func:`tail`.
        eps: see :func:`tail`.
        act: see :func:`tail`.
        slope: see :func:`tail`.

    Returns:
        Two (C,) tensors in the accumulation dtype.
    """
    return reduced(dy, z, host.Norm.of(mean, var, bn_weight, bn_bias), residual, (eps, act, slope), None)


def reduced(
    dy: Tensor,
    z: Tensor,
    norm: host.Norm,
    residual: Tensor | None,
    options: tuple[float, str, float],
    du: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sums of :func:`tail_backward_reduce`; g goes to ``du``, which lies as z does, where that is given."""
    shape = host.Map.of(z).halved()
    cl = shape.channels_last
    z, dy, residual = host.arranged(z, cl), host.arranged(dy, cl), host.optional(residual, cl)
    sums = host.vectors(z, shape.channels)
    each = shape.each(_TILES_PER_GROUP, 3)
    groups = triton.cdiv(shape.tiles, each)
    partial = sums[0].new_empty(2, shape.channels, groups)
    sizes = (shape.total, shape.pixels, shape.channels, groups, each)
    constexprs = shape.constexprs() | host.epilogue(*options) | {"PARTS": shape.parts}
    args = (dy, z, residual, du, partial, *norm, *sizes)
    launch.launch(reduce_kernel, shape.grid(each), args, constexprs, shape.cfg)
    add_up(partial, sums)
    return sums


def add_up(partial: Tensor, sums: tuple[Tensor, Tensor]) -> None:
    """Both sums of every channel from those of its groups, in order: one launch.

    Args:
        partial: (2, C, groups), accumulation dtype.
        sums: (C,) each, which are written.
    """
    _, channels, groups = partial.shape
    if groups == 0:
        sums[0].zero_()
        sums[1].zero_()
        return
    cfg = config.merge(groups, channels)
    grid = (triton.cdiv(channels, cfg.block_n),)
    args = (partial, *sums, channels, groups)
    launch.launch(reduce_sum_kernel, grid, args, {"BC": cfg.block_n, "BT": cfg.block_m}, cfg)


def tail_backward_apply(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: int,
    eps: float,
    act: str,
    slope: float,
    residual_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dz, and the residual's gradient where it is asked for: one launch.

    Args:
        dy: gradient of y, shape and dtype of ``z``.
        z: as in :func:`tail`, like what is not named here.
        mean: see :func:`tail`.
        var: see :func:`tail`.
        bn_weight: see :func:`tail`.
        bn_bias: see :func:`tail`.
        residual: see :func:`tail`.
        sum_dy: (C,), or None for frozen statistics, like ``sum_dy_xhat``.
        sum_dy_xhat: see ``sum_dy``.
        count: values per channel that the sums stand for.
        eps: see :func:`tail`.
        act: see :func:`tail`.
        slope: see :func:`tail`.
        residual_grad: whether the gradient of the residual is wanted.

    Returns:
        dz, shape, dtype and layout of ``z``; the residual's gradient likewise, or an empty tensor.
    """
    shape = host.Map.of(z)
    cl = shape.channels_last
    z, dy, residual = host.arranged(z, cl), host.arranged(dy, cl), host.optional(residual, cl)
    dz = host.like(z, cl)
    du = host.like(z, cl) if residual_grad else None
    norm = host.Norm.of(mean, var, bn_weight, bn_bias)
    sums = (*host.dense(sum_dy, sum_dy_xhat), host.inverse(count))
    shape = shape.flat().halved()
    each = shape.each(2 * _TILES)
    sizes = (shape.total, shape.pixels, shape.channels, shape.span, each)
    constexprs = shape.constexprs() | host.epilogue(eps, act, slope)
    args = (dy, z, residual, dz, du, *norm, *sums, *sizes)
    launch.launch(apply_kernel, shape.grid(each), args, constexprs, shape.cfg)
    return dz, z.new_empty(0) if du is None else du


def specialisations() -> Iterable[launch.Specialisation]:
    """What ships of the tail: the maps of the DLA networks in both layouts, with and without residual."""
    found = []
    for example in examples.maps():
        z = examples.tensor(example, example.out_channels)
        v = host.vectors(z, example.out_channels)[0]
        for act, with_residual in itertools.product(example.acts, example.residuals):
            residual = z if with_residual else None
            with examples.recording(example) as launches:
                tail(z, v, v, v, v, residual, 1e-5, act, 0.0)
                sums = tail_backward_reduce(z, z, v, v, v, v, residual, 1e-5, act, 0.0)
                tail_backward_apply(z, z, v, v, v, v, residual, *sums, 4, 1e-5, act, 0.0, with_residual)
                reduced(z, z, host.Norm(v, v, v, v), residual, (1e-5, act, 0.0), z)
            for one in launches:
                op = {tail_kernel: "tail", apply_kernel: "tail_backward_apply"}.get(one.kernel, "tail_backward_reduce")
                found.append(launch.specialisation(op, example.dtype, one, example.label))
    return launch.distinct(found)
