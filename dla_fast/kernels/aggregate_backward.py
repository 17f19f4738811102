"""Backward of the aggregation node's product: dx_i = W_i^T dz (+ g for a residual's input), dW_i = dz^T x_i.

M pixels over all images, K = sum of the inputs' channels C_i, N output channels, b bytes a value. dz is formed tile by
tile from dy and z, and never stored.

``weight_kernel`` with DX makes both: a program owns a block of an input's channels and walks a range of pixels, its
part of dW in registers. It reads dy and z (2N) and x_i (K), writes dx_i (K): 2N + 2K values a pixel, since the programs
of a range run side by side and dy and z come from memory once; 4KN flops. It needs all N channels of dz in a tile.
For larger nodes ``dx_kernel`` reads 2N and writes K, and ``weight_kernel`` without DX reads 2N + K; 2KN flops each.
A residual adds the read of x_0 (N) to each pass that does not read it anyway. ``weight_sum_kernel`` adds the ranges'
dW in order.

- dy, z, residual (which is x_0): (M, N) channels_last, or (images, N, pixels) contiguous, as CL says; xs[i], dxs[i] the
  same with C_i channels; only inputs that need it are among the dxs of ``dx_kernel``
- w, dw: (N, K), K contiguous; partial: (ranges, N, K), accumulation dtype
- mean, var, gamma, beta, sum_dy, sum_dy_xhat: (N,); all but the first two may be None
- blocks[i]: number of the first block of channels of input i; one more entry says how many blocks there are
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_fast.kernels import config, examples, host, launch
from dla_fast.kernels.tile import along, at, dz_of, inside, pixel_range, pre_activation_gradient, tf32
from dla_fast.ops.layout import empty_like_layout


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
        dz, _ = dz_of(
            dy, z, residual, offset, inside(rows, outs, EVEN_N), mean, var, gamma, beta, sum_dy, sum_dy_xhat,
            inverse_count, n, outs, EPS, ACT, SLOPE, ACC,
        )  # fmt: skip
        weights = w + n[:, None] * depth + (start + k)[None, :]
        right = tl.load(weights, mask=outs[:, None] & (k < own)[None, :], other=0.0)
        dz, right = tf32(dz.to(right.dtype), PRECISION), tf32(right, PRECISION)
        acc = tl.dot(dz, right, acc, input_precision=PRECISION, out_dtype=ACC)
    mask = inside(rows, k < own, EVEN_K)
    if ADD:  # noqa: SIM102, the inner condition is the device's
        if block < blocks[1]:
            grad, _, _ = pre_activation_gradient(
                dy, z, residual, pixel + along(k, pixels, CL, I64)[None, :], mask, mean, var, gamma, beta, k, k < own,
                EPS, ACT, SLOPE, ACC,
            )  # fmt: skip
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
    acc = tl.zeros((BN, BK), ACC)
    begin = tl.program_id(1) * tiles_per_range
    for tile in range(begin, tl.minimum(begin + tiles_per_range, tl.cdiv(total, BM))):
        m = pixel_range(tile, BM, I64)
        rows = m < total
        pixel = at(m, pixels, out_channels, CL)[:, None]
        dz, _ = dz_of(
            dy, z, residual, pixel + along(n, pixels, CL, I64)[None, :], inside(rows, outs, EVEN_N), mean, var, gamma,
            beta, sum_dy, sum_dy_xhat, inverse_count, n, outs, EPS, ACT, SLOPE, ACC,
        )  # fmt: skip
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
                grad, _, _ = pre_activation_gradient(
                    dy, z, residual, pixel + column, of_first, mean, var, gamma, beta, k,
                    k < own_of_first, EPS, ACT, SLOPE, ACC,
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


def _blocks(channels: Sequence[int], size: int) -> tuple[int, ...]:
    """Number of the first block of every input, and how many there are."""
    out = [0]
    for c in channels:
        out.append(out[-1] + triton.cdiv(c, size))
    return tuple(out)


def _constexprs(node: host.Node, cfg: config.TileConfig) -> dict[str, Any]:
    return {
        "BM": cfg.block_m,
        "BN": cfg.block_n,
        "BK": cfg.block_k,
        "CL": node.channels_last,
        "EVEN_K": all(c % cfg.block_k == 0 for c in node.channels),
        "EVEN_N": node.out_channels % cfg.block_n == 0,
        "PRECISION": node.precision,
        "ACC": node.acc,
        "I64": node.large,
    }


def _choose(kernel: str, node: host.Node) -> config.TileConfig:
    sizes = (node.total, node.depth, node.out_channels)
    return config.choose(kernel, *sizes, node.dtype, node.arch, node.step, node.channels_last, node.exact)


def aggregate_backward(
    dy: Tensor,
    xs: Sequence[Tensor],
    weight: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: float,
    eps: float,
    residual: bool,
    act: str,
    slope: float,
    need_dx: Sequence[bool],
    need_dw: bool,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of a node's inputs and weight: one launch for small nodes or for dx alone, two beside, at most three.

    Args:
        dy: gradient of y, (N, C_out, H, W).
        xs: (N, C_i, H, W) each, one floating dtype.
        weight: (C_out, sum of C_i, 1, 1).
        z: what the stage gave, shape of ``dy``.
        mean: (C_out,), of z, accumulation dtype.
        var: (C_out,), biased.
        bn_weight: (C_out,) or None.
        bn_bias: (C_out,) or None.
        sum_dy: what the tail's reduction gave, (C_out,); None with ``sum_dy_xhat`` for frozen statistics.
        sum_dy_xhat: see ``sum_dy``.
        count: values per channel that the sums stand for.
        eps: added to the variance.
        residual: whether ``xs[0]`` was added before the activation.
        act: name of the activation.
        slope: of leaky_relu.
        need_dx: per input whether its gradient is wanted; what is not wanted costs nothing.
        need_dw: whether the weight's is.

    Returns:
        The inputs' gradients in the node's layout, and the weight's; an empty tensor for each that is not wanted.

    Raises:
        ValueError: channels that do not fit the weight.
    """
    node = host.Node.of(xs, weight)
    inputs = node.arrange(xs)
    dxs = [
        empty_like_layout(x, x.shape, node.channels_last) if needed else x.new_empty(0)
        for x, needed in zip(xs, need_dx, strict=True)
    ]
    dw = torch.empty_like(weight) if need_dw else weight.new_empty(0)
    if node.total == 0:
        return dxs, dw.zero_()
    # Without a kink or curve in the activation the gradient does not depend on the residual.
    skip = inputs[0] if residual and act != "identity" else None
    maps = (host.arranged(dy, node.channels_last), host.arranged(z, node.channels_last), skip, weight.contiguous())
    norm = (mean, var, bn_weight, bn_bias, sum_dy, sum_dy_xhat, host.inverse(count))
    options = {"ADD": residual and need_dx[0], "EPS": eps, "ACT": act, "SLOPE": slope}
    fused = need_dw and any(need_dx) and config.fits_fused(node.depth, node.out_channels, node.dtype, node.exact)
    if any(need_dx) and not fused:
        _dx(node, dxs, need_dx, maps, norm, options)
    if need_dw:
        _weight(node, inputs, dxs, need_dx if fused else (), maps, norm, options, dw)
    return dxs, dw


def _dx(
    node: host.Node, dxs: list[Tensor], need_dx: Sequence[bool], maps: Any, norm: Any, options: dict[str, Any]
) -> None:
    cfg = _choose("dx", node)
    wanted = [i for i, needed in enumerate(need_dx) if needed]
    channels = tuple(node.channels[i] for i in wanted)
    blocks = _blocks(channels, cfg.block_k)
    of_inputs = (tuple(dxs[i] for i in wanted), channels, tuple(node.starts[i] for i in wanted), blocks)
    sizes = (node.total, node.pixels, node.out_channels, node.depth, blocks[-1])
    grid = (triton.cdiv(node.total, cfg.block_m) * blocks[-1],)
    launch.launch(dx_kernel, grid, (*of_inputs, *maps, *norm, *sizes), _constexprs(node, cfg) | options, cfg)


def _weight(
    node: host.Node,
    xs: tuple[Tensor, ...],
    dxs: list[Tensor],
    need_dx: Sequence[bool],
    maps: Any,
    norm: Any,
    options: dict[str, Any],
    dw: Tensor,
) -> None:
    cfg = _choose("fused" if need_dx else "dw", node)
    blocks = _blocks(node.channels, cfg.block_k)
    programs = blocks[-1] * triton.cdiv(node.out_channels, cfg.block_n)
    tiles = triton.cdiv(node.total, cfg.block_m)
    per_range = triton.cdiv(tiles, max(1, min(tiles, config.PROGRAMS // 2 // programs)))
    ranges = triton.cdiv(tiles, per_range)
    # A single range is the gradient itself.
    size = dw.numel()
    out = dw if ranges == 1 else norm[0].new_empty(ranges, size)
    mask = sum(1 << i for i, needed in enumerate(need_dx) if needed)
    # Something must stand where no gradient is written.
    targets = tuple(dx if mask >> i & 1 else x for i, (x, dx) in enumerate(zip(xs, dxs, strict=True)))
    args = (xs, targets, node.channels, node.starts, blocks, *maps, out, *norm)
    sizes = (node.total, node.pixels, node.out_channels, node.depth, per_range)
    constexprs = _constexprs(node, cfg) | {"DX": mask} | options
    constexprs["ADD"] = bool(mask) and options["ADD"]
    launch.launch(weight_kernel, (programs, ranges), (*args, *sizes), constexprs, cfg)
    if ranges > 1:
        summed = config.TileConfig(min(1024, config.power_of_two(size, 1, 1024)), 1)
        grid = (triton.cdiv(size, summed.block_m),)
        launch.launch(weight_sum_kernel, grid, (out, dw, size, ranges), {"B": summed.block_m, "ACC": node.acc}, summed)


def specialisations() -> Iterable[launch.Specialisation]:
    """What ships of the backward: every gradient wanted, batch statistics and, for one node, frozen ones."""
    found = []
    for example in examples.roots():
        xs, weight, z = examples.tensors(example)
        v = host.vectors(z, example.out_channels)[0]
        every = [True] * len(xs)
        with examples.recording(example) as launches:
            for act, residual in itertools.product(example.acts, example.residuals):
                for total in (v, None) if example.frozen else (v,):
                    aggregate_backward(
                        z, xs, weight, z, v, v, v, v, total, total, 4.0, 1e-5, residual, act, 0.0, every, True
                    )  # fmt: skip
        found += [launch.specialisation("aggregate_backward", example.dtype, o, example.label) for o in launches]
    return launch.distinct(found)
