"""The learned upsampling's host functions: tiles, partial sums, launches. upsample_kernels.py has what they cost."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
import triton
from torch import Tensor

from dla_fast import checks
from dla_fast.kernels import config, examples, host, launch
from dla_fast.kernels.upsample_kernels import backward_kernel, upsample_kernel, weight_gradient_kernel
from dla_fast.ops.layout import empty_like_layout, is_channels_last

_LARGE = 2**31
# Rows of an image that a program walks down at most, its weights in registers.
_ROWS = 32
# (channels, low-resolution side at 512x512, factor): the steps of the IDA ladders.
_STEPS = ((64, 64, 2), (128, 32, 2), (256, 16, 2), (64, 32, 4), (64, 16, 8))


def _sides(x: Tensor, factor: int) -> tuple[int, int]:
    return checks.upsampled(x.shape[2], factor), checks.upsampled(x.shape[3], factor)


def _choose(kernel: str, columns: int, x: Tensor, channels_last: bool) -> config.TileConfig:
    return config.choose(kernel, columns, 0, x.shape[1], x.dtype, config.arch_of(x.device), 0, channels_last)


def _constexprs(cfg: config.TileConfig, x: Tensor, channels_last: bool, factor: int) -> dict[str, object]:
    height, width = _sides(x, factor)
    return {
        "BM": cfg.block_m,
        "BN": cfg.block_n,
        "CL": channels_last,
        "EVEN": x.shape[1] % cfg.block_n == 0,
        "ACC": host.accumulator(x.dtype),
        # Images are counted in 64 bits anyway. A tile may reach past the last value before its mask says so.
        "I64": (height + 2 * factor) * (width + 1024) * x.shape[1] >= _LARGE,
        "ALIGN": math.gcd(width, 16),
        "F": factor,
    }


def _upsample(x: Tensor, skip: Tensor | None, weight: Tensor, factor: int) -> Tensor:
    cl = is_channels_last(x)
    images, channels, height, width = x.shape
    sides = _sides(x, factor)
    x = host.arranged(x, cl)
    skip = None if skip is None else host.arranged(skip, cl)
    y = empty_like_layout(x, (images, channels, *sides), cl)
    if y.numel() == 0:
        return y
    cfg = _choose("upsample", sides[1], x, cl)
    blocks, columns = triton.cdiv(channels, cfg.block_n), triton.cdiv(sides[1], cfg.block_m)
    shares = factor // (2 - factor % 2)
    alike = shares * blocks * columns * images
    each = max(1, min(alike * (height + 1) // (8 * config.PROGRAMS), _ROWS, height + 1))
    chunks = triton.cdiv(height + 1, each)
    each = triton.cdiv(height + 1, chunks)
    args = (x, weight.contiguous(), skip, y, height, width, channels, *sides, blocks, columns, chunks, each)
    launch.launch(upsample_kernel, (alike * chunks,), args, _constexprs(cfg, x, cl, factor), cfg)
    return y


def upsample(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """The upsampled map: one launch.

    Args:
        x: (N, C, H, W), floating.
        weight: (C, 1, 2f, 2f), dtype of ``x``.
        factor: f >= 2.

    Returns:
        (N, C, H', W') in the dtype and layout of ``x``, H' = (H - 1) f - 2 (f // 2) + 2 f.
    """
    return _upsample(x, None, weight, factor)


def upsample_add(x: Tensor, skip: Tensor, weight: Tensor, factor: int) -> Tensor:
    """The upsampled map plus another: one launch.

    Args:
        x: as in :func:`upsample`.
        skip: (N, C, H', W').
        weight: as in :func:`upsample`.
        factor: as in :func:`upsample`.

    Returns:
        The shape of ``skip``, in the layout of ``x``.
    """
    return _upsample(x, skip, weight, factor)


def upsample_backward(
    dy: Tensor, x: Tensor, weight: Tensor, factor: int, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight: one launch for dx, two with dW.

    Args:
        dy: gradient of the upsampled map.
        x: as in :func:`upsample`.
        weight: as in :func:`upsample`.
        factor: as in :func:`upsample`.
        need_dx: whether dx is wanted.
        need_dw: whether dW is wanted.

    Returns:
        dx in shape and layout of ``x``, and dW; an empty tensor for what is not wanted.
    """
    cl = is_channels_last(x)
    images, channels, height, width = x.shape
    x, dy = host.arranged(x, cl), host.arranged(dy, cl)
    dx = empty_like_layout(x, x.shape, cl) if need_dx else None
    dw = weight.new_empty(weight.shape) if need_dw else None
    taps, fx = 4 * factor**2, config.power_of_two(factor, 2, 2**16)
    if x.numel() == 0:
        return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dw is None else dw.zero_()
    cfg = _choose("upsample_backward", width * fx * fx // 2, x, cl)
    # A tile has all phases of its pixels, and stays as small as it was chosen.
    block_m = max(cfg.block_m, fx * fx // 2)
    cfg = replace(cfg, block_m=block_m, block_n=max(1, cfg.block_m * cfg.block_n // block_m))
    blocks, columns = triton.cdiv(channels, cfg.block_n), triton.cdiv(width * fx * fx // 2, cfg.block_m)
    # Rows of an image that a program walks down, and so many times: it leaves a partial dW of its own.
    steps = max(1, images * height * blocks * columns // (4 * config.PROGRAMS))
    each = triton.cdiv(height, triton.cdiv(height, min(steps, height)))
    chunks = images * triton.cdiv(height, each)
    most = max(1, steps // each)
    groups = triton.cdiv(chunks, most)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    tiles = groups * columns
    partial = x.new_empty((taps, channels, tiles), dtype=accumulate) if need_dw else None
    constexprs = _constexprs(cfg, x, cl, factor) | {"FX": fx}
    sizes = (images, height, width, channels, *_sides(x, factor), blocks, columns, groups, each, most)
    args = (dy, x, weight.contiguous(), dx, partial, *sizes)
    launch.launch(backward_kernel, (blocks * columns * groups,), args, constexprs, cfg)
    if partial is not None:
        cfg = config.merge(tiles, taps * channels)
        grid = (triton.cdiv(taps * channels, cfg.block_n),)
        sums = (partial, dw, channels, taps, tiles)
        launch.launch(weight_gradient_kernel, grid, sums, {"BC": cfg.block_n, "BT": cfg.block_m}, cfg)
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dw is None else dw


def _examples() -> Iterator[tuple[examples.Example, int]]:
    for channels, side, factor in _STEPS:
        for dtype, channels_last in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)):
            yield examples.Example((channels,), channels, side, 16, dtype, channels_last), factor
    yield examples.Example((64,), 64, 64, 16, torch.float16, True), 2
    yield examples.Example((64,), 64, 64, 16, torch.float32, True), 2
    # Masked in every direction, and float64.
    yield examples.Example((24,), 24, 9, 2, torch.float64, True), 3
    yield examples.Example((24,), 24, 9, 2, torch.float64, False), 2


def specialisations() -> Iterable[launch.Specialisation]:
    """What ships: the steps of the IDA ladders in both layouts, and float64 for gradient checks."""
    found = []
    for example, factor in _examples():
        x = examples.tensor(example, example.out_channels)
        weight = torch.empty(example.out_channels, 1, 2 * factor, 2 * factor, dtype=example.dtype, device="meta")
        with examples.recording(example) as launches:
            y = upsample(x, weight, factor)
            upsample_add(x, y, weight, factor)
            upsample_backward(y, x, weight, factor, True, True)
        names = ("upsample", "upsample_add", "upsample_backward", "upsample_backward")
        for op, one in zip(names, launches, strict=True):
            found.append(launch.specialisation(op, example.dtype, one, f"{example.label} f{factor} {op}"))
    return launch.distinct(found)
