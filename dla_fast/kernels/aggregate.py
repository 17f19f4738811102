"""Forward of the aggregation node: z = sum_i W_i x_i without the concatenation, and what follows it.

M pixels over all images, K = sum of the inputs' channels C_i, N output channels, b bytes a value.

``inference_kernel``: y = act(gamma * (z + bias - mean) / sigma + beta + x_0), one launch.
``stage_kernel``: z, and per tile of pixels and channel (mean, M2, sum(z - mean)) of the z that is written.

- xs[i]: (M, C_i) channels_last, or (images, C_i, pixels) contiguous, as CL says; y and z the same with N channels
- w: (N, K), K contiguous
- mean, var, gamma, beta, bias: (N,) each, any dtype; the last three may be None
- partial: (3, N, tiles of pixels), accumulation dtype

Either reads K values a pixel (a residual is input 0 once more, from cache) and writes N: (K + N) b bytes, and 2KN
flops; the stage writes 12 N bytes a tile beside. Programs of one tile of pixels are neighbours, so that an input which
several of them read comes from memory once.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_fast.kernels import config, examples, host, launch, moments
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
def product(
    xs, channels, starts, w, m, n, total, pixels, out_channels, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """A tile of z in one accumulator, over every input."""
    acc = tl.zeros((BM, BN), ACC)
    rows, outs = m < total, n < out_channels
    for i in tl.static_range(len(xs)):
        x = xs[i] + at(m, pixels, channels[i], CL)[:, None]
        for first in range(0, channels[i], BK):
            k = first + tl.arange(0, BK)
            left = tl.load(
                x + along(k, pixels, CL, I64)[None, :], mask=inside(rows, k < channels[i], EVEN_K), other=0.0
            )
            weights = w + n[None, :] * depth + (starts[i] + k)[:, None]
            if EVEN_K and EVEN_N:
                right = tl.load(weights)
            else:
                right = tl.load(weights, mask=(k < channels[i])[:, None] & outs[None, :], other=0.0)
            left, right = tf32(left, PRECISION), tf32(right, PRECISION)
            acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def inference_kernel(
    xs, channels, starts, w, y, mean, var, gamma, beta, bias, total, pixels, out_channels, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    RESIDUAL: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(out_channels, BN)
    m = pixel_range(tl.program_id(0) // blocks, BM, I64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    acc = product(
        xs, channels, starts, w, m, n, total, pixels, out_channels, depth,
        BM, BN, BK, CL, EVEN_K, EVEN_N, PRECISION, ACC, I64,
    )  # fmt: skip
    outs = n < out_channels
    mask = inside(m < total, outs, EVEN_N)
    offset = at(m, pixels, out_channels, CL)[:, None] + along(n, pixels, CL, I64)[None, :]
    center = per_channel(mean, n, outs, 0.0, ACC) - per_channel(bias, n, outs, 0.0, ACC)
    scale = per_channel(gamma, n, outs, 1.0, ACC) * reciprocal_deviation(per_channel(var, n, outs, 1.0, ACC), EPS)
    u = (acc - center[None, :]) * scale[None, :] + per_channel(beta, n, outs, 0.0, ACC)[None, :]
    if RESIDUAL:
        u += tl.load(xs[0] + offset, mask=mask, other=0.0).to(ACC)
    tl.store(y + offset, activate(u, ACT, SLOPE).to(y.dtype.element_ty), mask=mask)


@triton.jit
def stage_kernel(
    xs, channels, starts, w, z, partial, total, pixels, out_channels, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(out_channels, BN)
    tile = tl.program_id(0) // blocks
    m = pixel_range(tile, BM, I64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    acc = product(
        xs, channels, starts, w, m, n, total, pixels, out_channels, depth,
        BM, BN, BK, CL, EVEN_K, EVEN_N, PRECISION, ACC, I64,
    )  # fmt: skip
    rows, outs = m < total, n < out_channels
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


def _forward(node: host.Node) -> tuple[config.TileConfig, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """What both kernels share: configuration, grid, sizes, constexprs."""
    cfg = config.choose("forward", node.total, node.depth, node.out_channels, node.dtype, node.arch, node.step)
    grid = (triton.cdiv(node.total, cfg.block_m) * triton.cdiv(node.out_channels, cfg.block_n),)
    sizes = (node.total, node.pixels, node.out_channels, node.depth)
    constexprs = {
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
    return cfg, grid, sizes, constexprs


# A call's plan by what it depends on, so that the next such call only fills in its tensors.
_plans: dict[Any, Any] = {}
_MOST_PLANS = 4096


def aggregate_inference(
    xs: Sequence[Tensor],
    weight: Tensor,
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: bool,
    act: str,
    slope: float,
) -> Tensor:
    """y of a node with folded batch norm: one launch.

    Args:
        xs: (N, C_i, H, W) each, one floating dtype.
        weight: (C_out, sum of C_i, 1, 1).
        conv_bias: (C_out,) or None, like the norm's vectors.
        bn_weight: see ``conv_bias``.
        bn_bias: see ``conv_bias``.
        running_mean: (C_out,).
        running_var: (C_out,).
        eps: added to the variance.
        residual: add ``xs[0]`` before the activation.
        act: name of the activation.
        slope: of leaky_relu.

    Returns:
        (N, C_out, H, W), channels_last if every input or the weight is.

    Raises:
        ValueError: channels that do not fit the weight.
    """
    norm = (running_mean, running_var, bn_weight, bn_bias, conv_bias)
    kinds = tuple([None if t is None else t.dtype for t in norm])
    key = (host.signature(xs, weight), kinds, eps, residual, act, slope)
    plan = _plans.get(key)
    if plan is None:
        node = host.Node.of(xs, weight)
        cfg, grid, sizes, constexprs = _forward(node)
        constexprs |= {"RESIDUAL": residual, "EPS": eps, "ACT": act, "SLOPE": slope}
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = node, cfg, grid, sizes, constexprs, launch.Memo()
    node, cfg, grid, sizes, constexprs, memo = plan
    xs, weight = node.arrange(xs), weight.contiguous()
    y = node.output(weight)
    args = (xs, node.channels, node.starts, weight, y, *norm, *sizes)
    tensors = (*xs, weight, y, *[t for t in norm if t is not None])
    launch.launch(inference_kernel, grid, args, constexprs, cfg, memo, tensors)
    return y


def aggregate_stage(
    xs: Sequence[Tensor],
    weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    moments_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """z without the bias, and the moments of each of its channels: two launches, or one without moments.

    Args:
        xs: (N, C_i, H, W) each, one floating dtype.
        weight: (C_out, sum of C_i, 1, 1).
        conv_bias: (C_out,) or None; it moves the running mean alone.
        running_mean: (C_out,), updated in place, or None.
        running_var: see ``running_mean``.
        momentum: weight of this batch in the running statistics.
        moments_wanted: whether moments are computed.

    Returns:
        z (N, C_out, H, W), mean and biased variance (C_out,) in the accumulation dtype, empty if not wanted.

    Raises:
        ValueError: channels that do not fit the weight.
    """
    node = host.Node.of(xs, weight)
    cfg, grid, sizes, constexprs = _forward(node)
    weight = weight.contiguous()
    z = node.output(weight)
    mean, var = host.vectors(z, node.out_channels if moments_wanted else 0)
    tiles = triton.cdiv(node.total, cfg.block_m)
    partial = mean.new_empty(3, node.out_channels, tiles) if moments_wanted else None
    launch.launch(
        stage_kernel, grid, (node.arrange(xs), node.channels, node.starts, weight, z, partial, *sizes), constexprs, cfg
    )
    if partial is not None:
        moments.finalise(partial, node.total, cfg.block_m, mean, var, conv_bias, running_mean, running_var, momentum)
    return z, mean, var


def specialisations() -> Iterable[launch.Specialisation]:
    """What ships of the forward: the roots of the DLA networks in both layouts, and the variants of the epilogue."""
    found = []
    for example in examples.roots():
        xs, weight, _ = examples.tensors(example)
        v = torch.empty(example.out_channels, device="meta")
        with examples.recording(example) as launches:
            _plans.clear()
            for act, residual in itertools.product(example.acts, example.residuals):
                aggregate_inference(xs, weight, None, v, v, v, v, 1e-5, residual, act, 0.0)
            for wanted in (True, False) if example.frozen else (True,):
                aggregate_stage(xs, weight, None, v, v, 0.1, wanted)
        _plans.clear()
        for one in launches:
            if one.kernel in (inference_kernel, stage_kernel):
                op = "aggregate_inference" if one.kernel is inference_kernel else "aggregate_stage"
                found.append(launch.specialisation(op, example.dtype, one, example.label))
    return launch.distinct(found)
