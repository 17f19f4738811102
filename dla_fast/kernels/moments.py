"""Moments of every channel: per tile, then merged.

``moments_kernel`` reads z once (M pixels, C channels, b bytes a value: MCb bytes, about 4 flops a value) and writes,
for each group of tiles of pixels and each channel, a shift, the sum of squares around it, and the sum of differences
from it: 12 bytes a group and channel (24 in double), of which there are about a thousand, over all channels, for a
large map. ``finalise_kernel`` merges them by the formula of Chan, Golub and LeVeque (1979), in double: all groups of a
channel are loaded at once and stay in registers up to 2048 of them, past that they are read twice, the second time from
cache. It also moves the running statistics.

- z: (M, C) channels_last, or (images, C, pixels) contiguous, as CL says
- partial: (3, C, groups), accumulation dtype: shift, M2, rest. A group stands for ``size`` pixels, the last for fewer
- mean, var: (C,), accumulation dtype; bias: (C,) or None; running_mean, running_var: (C,) or None, any dtype

Sums run in a fixed order, so results are bitwise the same from run to run.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_fast.kernels import config, examples, host, launch
from dla_fast.kernels.tile import along, at, finite_or_zero, inside, multiple, pixel_range, program_of, read

# Tiles that a program takes one after the other at most, its sums in registers.
_TILES_PER_GROUP = 16


@triton.jit
def moments_kernel(
    z, partial, total, pixels, channels, groups, each,
    BM: tl.constexpr, BN: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    ALIGN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    group, block = program_of(CL)
    c = block * BN + tl.arange(0, BN)
    cols = c < channels
    column = along(c, pixels, CL, I64, ALIGN)[None, :]
    total = multiple(total, ALIGN)
    PART: tl.constexpr = BM // PARTS
    start = group * each
    last = tl.minimum(start + each, total // BM)
    # Sums are taken around the mean of the group's first pixels: any value near the others would do.
    m = pixel_range(start * PARTS, PART, I64)
    rows = m < total
    value = read(z + at(m, pixels, channels, CL, ALIGN)[:, None] + column, inside(rows, cols, EVEN), ACC)
    shift = finite_or_zero(tl.sum(value, 0) / tl.sum(rows.to(tl.int32), 0).to(ACC))
    rest = tl.zeros((PART, BN), ACC)
    squares = tl.zeros((PART, BN), ACC)
    for tile in range(start, last):
        for part in tl.static_range(PARTS):
            m = pixel_range(tile * PARTS + part, PART, I64)
            mask = inside(m < total, cols, EVEN, True)
            off = read(z + at(m, pixels, channels, CL, ALIGN)[:, None] + column, mask, ACC) - shift[None, :]
            rest += off
            squares += off * off
    # The last tile of all, where it is not a whole one.
    if (last < start + each) & (last * BM < total):
        for part in range(PARTS):
            m = pixel_range(last * PARTS + part, PART, I64)
            rows = m < total
            value = read(z + at(m, pixels, channels, CL, ALIGN)[:, None] + column, inside(rows, cols, EVEN), ACC)
            off = tl.where(rows[:, None], value - shift[None, :], 0.0)
            rest += off
            squares += off * off
    to = partial + c * groups + group
    tl.store(to, shift, mask=cols)
    tl.store(to + channels * groups, tl.sum(squares, 0), mask=cols)
    tl.store(to + 2 * channels * groups, tl.sum(rest, 0), mask=cols)


@triton.jit
def group_of(partial, c, cols, g, plane, total, channels, groups, size):
    """A block of partial moments, in double: shift, M2, rest, the groups' pixels, and 1 / those.

    What is no group has no pixels. All groups but the last are alike, so that nothing is divided here.
    """
    mask = cols[:, None] & (g < groups)[None, :]
    at = partial + c[:, None] * groups + g[None, :]
    shift, m2 = tl.load(at, mask=mask, other=0.0), tl.load(at + plane, mask=mask, other=0.0)
    rest = tl.load(at + 2 * plane, mask=mask, other=0.0)
    full = tl.full((), 0.0, tl.float64) + size
    left = tl.full((), 0.0, tl.float64) + total - (groups - 1.0) * full
    count = tl.where(g < groups - 1, full, tl.where(g < groups, left, 0.0))
    share = tl.where(g < groups - 1, 1.0 / full, 1.0 / left)
    return shift.to(tl.float64), m2.to(tl.float64), rest.to(tl.float64), count[None, :], share[None, :]


@triton.jit
def finalise_kernel(
    partial, mean, var, bias, running_mean, running_var, momentum: tl.float64, total, channels, groups, size,
    BC: tl.constexpr, BT: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    cols = c < channels
    plane = channels * groups
    many = tl.full((), 0.0, tl.float64) + total
    if ONCE:
        # All groups at once, which stay in registers.
        g = tl.arange(0, BT)
        shift, m2, rest, count, share = group_of(partial, c, cols, g, plane, total, channels, groups, size)
        mu = tl.sum(count * shift + rest, 1) / many
        off = shift + rest * share - mu[:, None]
        sums = m2 - rest * rest * share + count * off * off
    else:
        sums = tl.zeros((BC, BT), tl.float64)
        for first in range(0, groups, BT):
            g = first + tl.arange(0, BT)
            shift, m2, rest, count, share = group_of(partial, c, cols, g, plane, total, channels, groups, size)
            sums += count * shift + rest
        mu = tl.sum(sums, 1) / many
        sums = tl.zeros((BC, BT), tl.float64)
        for first in range(0, groups, BT):
            g = first + tl.arange(0, BT)
            shift, m2, rest, count, share = group_of(partial, c, cols, g, plane, total, channels, groups, size)
            off = shift + rest * share - mu[:, None]
            sums += m2 - rest * rest * share + count * off * off
    sigma2 = tl.sum(sums, 1) / many
    # A maximum that lets NaN through.
    sigma2 = tl.where(sigma2 < 0, 0.0, sigma2)
    # What the caller sees is what the running statistics move towards, rounding included.
    mu = mu.to(mean.dtype.element_ty)
    sigma2 = sigma2.to(var.dtype.element_ty)
    tl.store(mean + c, mu, mask=cols)
    tl.store(var + c, sigma2, mask=cols)
    if running_mean is not None:
        target = mu.to(tl.float64)
        if bias is not None:
            target += tl.load(bias + c, mask=cols, other=0.0).to(tl.float64)
        before = tl.load(running_mean + c, mask=cols, other=0.0).to(tl.float64)
        after = (1 - momentum) * before + momentum * target
        tl.store(running_mean + c, after.to(running_mean.dtype.element_ty), mask=cols)
        unbiased = sigma2.to(tl.float64) * (many / (many - 1.0))
        before = tl.load(running_var + c, mask=cols, other=0.0).to(tl.float64)
        after = (1 - momentum) * before + momentum * unbiased
        tl.store(running_var + c, after.to(running_var.dtype.element_ty), mask=cols)


def finalise(partial: Tensor, total: int, size: int, mean: Tensor, var: Tensor, running: host.Running) -> None:
    """Merge partial moments into ``mean`` and ``var`` and move the running statistics: one launch.

    Args:
        partial: (3, C, groups), see the module.
        total: pixels; with none the moments are 0 and the running statistics stay.
        size: pixels of a group.
        mean: (C,), written.
        var: (C,), written: the biased variance.
        running: what moves with them.
    """
    _, channels, groups = partial.shape
    if total == 0:
        mean.zero_()
        var.zero_()
        return
    cfg = config.merge(groups, channels, 3)
    constexprs = {"BC": cfg.block_n, "BT": cfg.block_m, "ONCE": groups <= cfg.block_m}
    bias, *moved = host.dense(running.bias, running.mean, running.var)
    args = (partial, mean, var, bias, *moved, float(running.momentum))
    grid = (triton.cdiv(channels, cfg.block_n),)
    sizes = (total, channels, groups, size)
    launch.launch(finalise_kernel, grid, (*args, *sizes), constexprs, cfg)
    for given, after in zip((running.mean, running.var), moved, strict=True):
        if given is not None and after is not None and after is not given:
            given.copy_(after)


def of(z: Tensor, running: host.Running) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of z, and what moves with them: two launches."""
    shape = host.Map.of(z)
    z = host.arranged(z, shape.channels_last)
    mean, var = host.vectors(z, shape.channels)
    each = shape.each(_TILES_PER_GROUP, 3)
    groups = triton.cdiv(shape.tiles, each)
    partial = mean.new_empty(3, shape.channels, groups)
    args = (z, partial, shape.total, shape.pixels, shape.channels, groups, each)
    launch.launch(moments_kernel, shape.grid(each), args, shape.constexprs() | {"PARTS": shape.parts}, shape.cfg)
    finalise(partial, shape.total, each * shape.cfg.block_m, mean, var, running)
    return mean, var


def moments(
    z: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel: two launches.

    Args:
        z: (N, C, H, W), floating.
        running_mean: (C,), updated in place, or None.
        running_var: see ``running_mean``.
        momentum: weight of this batch in them.

    Returns:
        Two (C,) tensors in the accumulation dtype.
    """
    return of(z, host.Running(None, running_mean, running_var, momentum))


def specialisations() -> Iterable[launch.Specialisation]:
    """What ships: both kernels for the maps of the DLA networks, and the finalisation behind every training node."""
    found = []
    for example in examples.maps():
        z = examples.tensor(example, example.out_channels)
        v = torch.empty(example.out_channels, device="meta")
        with examples.recording(example) as launches:
            moments(z, v, v, 0.1)
            moments(z, None, None, 0.1)
        found += [launch.specialisation("moments", example.dtype, one, example.label) for one in launches]
    return launch.distinct(found)
