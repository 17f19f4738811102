"""Forward of the IDA node: z = sum_i W_i * x_i with a k x k kernel, any input upsampled as it is loaded.

M output pixels over all images, K = sum of the inputs' channels C_i, N output channels, T = k * k taps, b bytes a
value.

``inference_kernel``: y = act(gamma * (z + bias - mean) / sigma + beta), one launch.
``stage_kernel``: z, and per tile of pixels and channel (mean, M2, sum(z - mean)) of the z that is written.

- xs[i]: (images, H_i, W_i, C_i) channels_last, or (images, C_i, H_i, W_i) contiguous, as CL says; y and z the same with
  N channels. An input is plain (FACTORS[i] = 1, H_i = H) or lies at low resolution beside its kernel
- ups[i]: (C_i, 1, 2F, 2F), F = FACTORS[i], or None
- w: (N, K, k, k) in any memory format, by its strides
- mean, var, gamma, beta, bias: (N,) each, any dtype; the last three may be None
- partial: (3, N, tiles of pixels), accumulation dtype

An implicit product: a step takes one input, one tap and BK of its channels, and reads the pixels that the tap moves
the tile to, zero outside the map. So neither the concat nor a column buffer exists. Either kernel reads K + N values a
pixel (an upsampled input counts C_i / F^2) and writes N; 2TKN flops.

Where an input is upsampled on the way, each of its values costs four loads of x and four of the kernel. A 1 x 1 node
reads every value once for a tile of outputs and is bound by memory, so that pays. A 3 x 3 node reads it nine times and
does 18KN flops, 384 a byte at K = 2N = 128 in half precision, far over what memory bounds: there the map is upsampled
first, except in small maps, which wait for launches (:data:`ON_LOAD_PIXELS`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_fast import checks
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
from dla_fast.kernels.upsample import upsample
from dla_fast.ops.layout import empty_like_layout, node_channels_last

# Up to so many output pixels a 3 x 3 node upsamples on the way, in one launch. By reasoning, until a GPU is measured.
ON_LOAD_PIXELS = 2**14
_LARGE = 2**31


@triton.jit
def load_plain(
    x, image, top, left, k, there, kin, height, width, channels,
    CL: tl.constexpr, EVEN: tl.constexpr, I64: tl.constexpr,
):  # fmt: skip
    """Channels k of x at a pixel for each row of the tile; zero where ``there`` says no."""
    pixel = (image * height + top) * width + left
    offset = at(pixel, height * width, channels, CL)[:, None] + along(k, height * width, CL, I64)[None, :]
    return tl.load(x + offset, mask=inside(there, kin, EVEN), other=0.0)


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
        value = load_plain(x, image, row, column, k, exists, kin, height, width, channels, CL, EVEN, I64)
        weight = tl.load(up + tap + (corner // 2 * 2 * F * F + corner % 2 * F), mask=mask, other=0.0)
        acc += value.to(ACC) * weight.to(ACC)
    return acc.to(x.dtype.element_ty)


@triton.jit
def product(
    xs, ups, heights, widths, channels, starts, w, m, n, total, height, width, out_channels,
    stride_n, stride_k, stride_t,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    FACTORS: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    """A tile of z in one accumulator, over every input and tap."""
    acc = tl.zeros((BM, BN), ACC)
    rows, outs = m < total, n < out_channels
    x, y = m % width, m // width % height
    image = m // (width * height)
    for i in tl.static_range(len(xs)):
        for tap in range(KERNEL * KERNEL):
            top, left = y + tap // KERNEL - KERNEL // 2, x + tap % KERNEL - KERNEL // 2
            there = rows & (top >= 0) & (top < height) & (left >= 0) & (left < width)
            for first in range(0, channels[i], BK):
                k = first + tl.arange(0, BK)
                kin = k < channels[i]
                if FACTORS[i] > 1:
                    values = load_upsampled(
                        xs[i], ups[i], image, top, left, k, there, kin, heights[i], widths[i], channels[i],
                        CL, EVEN_K, I64, FACTORS[i], ACC,
                    )  # fmt: skip
                else:
                    values = load_plain(
                        xs[i], image, top, left, k, there, kin, height, width, channels[i], CL, EVEN_K, I64
                    )
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
    xs, ups, heights, widths, channels, starts, w, y, mean, var, gamma, beta, bias, total, height, width,
    out_channels, stride_n, stride_k, stride_t,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    FACTORS: tl.constexpr, KERNEL: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(out_channels, BN)
    m = pixel_range(tl.program_id(0) // blocks, BM, I64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    acc = product(
        xs, ups, heights, widths, channels, starts, w, m, n, total, height, width, out_channels,
        stride_n, stride_k, stride_t, BM, BN, BK, CL, EVEN_K, EVEN_N, PRECISION, ACC, I64, FACTORS, KERNEL,
    )  # fmt: skip
    outs = n < out_channels
    mask = inside(m < total, outs, EVEN_N)
    offset = at(m, height * width, out_channels, CL)[:, None] + along(n, height * width, CL, I64)[None, :]
    center = per_channel(mean, n, outs, 0.0, ACC) - per_channel(bias, n, outs, 0.0, ACC)
    scale = per_channel(gamma, n, outs, 1.0, ACC) * reciprocal_deviation(per_channel(var, n, outs, 1.0, ACC), EPS)
    u = (acc - center[None, :]) * scale[None, :] + per_channel(beta, n, outs, 0.0, ACC)[None, :]
    tl.store(y + offset, activate(u, ACT, SLOPE).to(y.dtype.element_ty), mask=mask)


@triton.jit
def stage_kernel(
    xs, ups, heights, widths, channels, starts, w, z, partial, total, height, width, out_channels,
    stride_n, stride_k, stride_t,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CL: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    FACTORS: tl.constexpr, KERNEL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(out_channels, BN)
    tile = tl.program_id(0) // blocks
    m = pixel_range(tile, BM, I64)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    acc = product(
        xs, ups, heights, widths, channels, starts, w, m, n, total, height, width, out_channels,
        stride_n, stride_k, stride_t, BM, BN, BK, CL, EVEN_K, EVEN_N, PRECISION, ACC, I64, FACTORS, KERNEL,
    )  # fmt: skip
    rows, outs = m < total, n < out_channels
    offset = at(m, height * width, out_channels, CL)[:, None] + along(n, height * width, CL, I64)[None, :]
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


@dataclass(frozen=True)
class _Plan:
    """Inputs in the layout of the node, and how its kernels are launched."""

    cfg: config.TileConfig
    grid: tuple[int]
    inputs: tuple[Any, ...]
    sizes: tuple[int, ...]
    constexprs: dict[str, Any]
    y: Tensor

    @property
    def total(self) -> int:
        """Output pixels over all images."""
        return self.sizes[0]

    @staticmethod
    def of(xs: Sequence[Tensor], up_weights: Sequence[Tensor], weight: Tensor, factors: Sequence[int]) -> "_Plan":
        """Plan a node.

        Raises:
            ValueError: no inputs, or channels that do not add up to the weight's.
        """
        if not xs:
            raise ValueError("xs: expected at least one input, got none")
        channels = tuple(int(x.shape[1]) for x in xs)
        if sum(channels) != weight.shape[1]:
            raise ValueError(f"weight: expected {sum(channels)} input channels, got {weight.shape[1]}")
        cl = node_channels_last(xs, weight)
        sides = [
            tuple(checks.upsampled(s, f) if f > 1 else int(s) for s in x.shape[2:])
            for x, f in zip(xs, factors, strict=True)
        ]
        (height, width), kernel = sides[0], int(weight.shape[2])
        total = int(xs[0].shape[0]) * height * width
        remaining = iter(up_weights)
        ups = [next(remaining).contiguous() if f > 1 else None for f in factors]
        maps = [host.arranged(x, cl) for x in xs]
        if kernel > 1 and total > ON_LOAD_PIXELS:
            maps = [x if up is None else upsample(x, up, f) for x, up, f in zip(maps, ups, factors, strict=True)]
            ups, factors = [None] * len(maps), [1] * len(maps)
            maps = [host.arranged(x, cl) for x in maps]
        out_channels, dtype = int(weight.shape[0]), weight.dtype
        step = config.channel_block(channels, 128)
        arch = config.arch_of(weight.device)
        cfg = config.choose("merge", total, sum(channels) * kernel**2, out_channels, dtype, arch, step)
        return _Plan(
            cfg=cfg,
            grid=(triton.cdiv(total, cfg.block_m) * triton.cdiv(out_channels, cfg.block_n),),
            inputs=(
                tuple(maps),
                tuple(ups),
                tuple(int(x.shape[2]) for x in maps),
                tuple(int(x.shape[3]) for x in maps),
                channels,
                tuple(sum(channels[:i]) for i in range(len(channels))),
                weight,
            ),
            sizes=(total, height, width, out_channels, weight.stride(0), weight.stride(1), weight.stride(3)),
            constexprs={
                "BM": cfg.block_m,
                "BN": cfg.block_n,
                "BK": cfg.block_k,
                "CL": cl,
                "EVEN_K": all(c % cfg.block_k == 0 for c in channels),
                "EVEN_N": out_channels % cfg.block_n == 0,
                "PRECISION": host.precision(dtype),
                "ACC": host.accumulator(dtype),
                "I64": (total + 1024) * max(*channels, out_channels) >= _LARGE,
                "FACTORS": tuple(factors),
                "KERNEL": kernel,
            },
            y=empty_like_layout(weight, (xs[0].shape[0], out_channels, height, width), cl),
        )


def _flat_taps(weight: Tensor) -> Tensor:
    """The weight with its taps evenly spaced, as every usual memory format has them."""
    if weight.stride(2) == weight.stride(3) * weight.shape[3]:
        return weight
    return weight.contiguous()


def merge_inference(
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    conv_bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    factors: Sequence[int],
    eps: float,
    act: str,
    slope: float,
) -> Tensor:
    """y of a node with folded batch norm: one launch, and one before it per input upsampled first.

    Args:
        xs: (N, C_i, H_i, W_i) each, one floating dtype.
        up_weights: (C_i, 1, 2f, 2f) of those inputs whose factor is not 1, in order.
        weight: (C_out, sum of C_i, k, k), k = 1 or 3.
        conv_bias: (C_out,) or None, like the norm's vectors.
        bn_weight: see ``conv_bias``.
        bn_bias: see ``conv_bias``.
        running_mean: (C_out,).
        running_var: (C_out,).
        factors: per input, 1 where it is taken as it is.
        eps: added to the variance.
        act: name of the activation.
        slope: of leaky_relu.

    Returns:
        (N, C_out, H, W), channels_last if every input or the weight is.

    Raises:
        ValueError: channels that do not fit the weight.
    """
    plan = _Plan.of(xs, up_weights, _flat_taps(weight), factors)
    norm = (running_mean, running_var, bn_weight, bn_bias, conv_bias)
    constexprs = plan.constexprs | {"EPS": eps, "ACT": act, "SLOPE": slope}
    launch.launch(inference_kernel, plan.grid, (*plan.inputs, plan.y, *norm, *plan.sizes), constexprs, plan.cfg)
    return plan.y


def merge_stage(
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    factors: Sequence[int],
    momentum: float,
    moments_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """z without the bias and the moments of its channels: two launches, and one before per input upsampled first.

    Args:
        xs: as in :func:`merge_inference`, like what is not named here.
        up_weights: see ``xs``.
        weight: see ``xs``.
        conv_bias: (C_out,) or None; it moves the running mean alone.
        running_mean: (C_out,), updated in place, or None.
        running_var: see ``running_mean``.
        factors: see ``xs``.
        momentum: weight of this batch in the running statistics.
        moments_wanted: whether moments are computed.

    Returns:
        z (N, C_out, H, W), mean and biased variance (C_out,) in the accumulation dtype, empty if not wanted.

    Raises:
        ValueError: channels that do not fit the weight.
    """
    plan = _Plan.of(xs, up_weights, _flat_taps(weight), factors)
    z, channels = plan.y, int(weight.shape[0])
    mean, var = host.vectors(z, channels if moments_wanted else 0)
    tiles = triton.cdiv(plan.total, plan.cfg.block_m)
    partial = mean.new_empty(3, channels, tiles) if moments_wanted else None
    launch.launch(stage_kernel, plan.grid, (*plan.inputs, z, partial, *plan.sizes), plan.constexprs, plan.cfg)
    if partial is not None:
        moments.finalise(
            partial, plan.total, plan.cfg.block_m, mean, var, conv_bias, running_mean, running_var, momentum
        )
    return z, mean, var


# Channels of either input and the output, side of the output at 512 x 512: the nodes of the IDA ladders.
_NODES = ((64, 128), (128, 64), (256, 32))


def _examples() -> Iterable[tuple[examples.Example, int, int]]:
    """A node, the factor of its second input, and its kernel."""
    for c, side in _NODES:
        for batch in (1, 16):
            yield examples.Example((c, c), c, side, batch, torch.bfloat16, True), 2, 3
        yield examples.Example((c, c), c, side, 16, torch.bfloat16, False), 2, 3
        yield examples.Example((c, c), c, side, 16, torch.float32, False), 2, 3
    yield examples.Example((64, 64), 64, 128, 16, torch.bfloat16, True), 4, 1
    yield examples.Example((64, 64), 64, 128, 16, torch.float16, True), 2, 3
    # Masked in every direction, and float64.
    yield examples.Example((24, 5), 24, 8, 2, torch.float32, True), 2, 3
    yield examples.Example((16, 16), 16, 8, 2, torch.float64, False), 2, 3


def specialisations() -> Iterable[launch.Specialisation]:
    """What ships: the nodes of the IDA ladders in both layouts, and float64 for gradient checks."""
    found = []
    for example, factor, kernel in _examples():
        fine, coarse = example.channels
        x = examples.tensor(example, fine)
        low = examples.tensor(replace(example, side=example.side // factor), coarse)
        up = torch.empty(coarse, 1, 2 * factor, 2 * factor, dtype=example.dtype, device="meta")
        weight = torch.empty(example.out_channels, fine + coarse, kernel, kernel, dtype=example.dtype, device="meta")
        weight = weight.contiguous(memory_format=host.format_of(example.channels_last))
        v = torch.empty(example.out_channels, device="meta")
        with examples.recording(example) as launches:
            merge_inference([x, low], [up], weight, None, v, v, v, v, [1, factor], 1e-5, "relu", 0.0)
            merge_stage([x, low], [up], weight, None, v, v, [1, factor], 0.1, True)
        for one in launches:
            if one.kernel in (inference_kernel, stage_kernel):
                op = "merge_inference" if one.kernel is inference_kernel else "merge_stage"
                label = f"{example.label} f{factor} k{kernel}"
                found.append(launch.specialisation(op, example.dtype, one, label))
    return launch.distinct(found)
