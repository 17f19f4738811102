"""The learned upsampling: depthwise transposed convolution, kernel 2F, stride F, padding F // 2; and its backward.

P low-resolution values (pixels times channels), b bytes a value. Output o of a side takes the inputs o' // F and
o' // F - 1 with the kernel's rows o' % F and that plus F, where o' = o + F // 2. So *position* (i, j), 0 <= i <= H and
0 <= j <= W, stands for the F x F outputs that take x at i, i - 1 and j, j - 1.

``upsample_kernel`` holds those four values and writes the F x F phases from registers: (1 + F^2) P b bytes, and F^2 P b
more where a map is added; 8 F^2 P flops. ``backward_kernel`` takes a tile of x: for each of the 4 F^2 taps one tile of
dy gives its part of dx, and of dW, summed over the tile: (2 + F^2) P b bytes for both, 16 F^2 P flops; a value of dy is
met four times, by neighbours. It writes 16 F^2 bytes a tile and channel besides, the parts of dW, which
``weight_gradient_kernel`` reads again and adds in double.

- x, dx: (images, H, W, C) channels_last, or (images, C, H, W), as CL says; y, skip, dy the same with H', W'
- w, dw: (C, 1, 2F, 2F)
- partial: (4 F^2, C, tiles), accumulation dtype

Sums run in a fixed order, so results are bitwise the same from run to run.
"""

from collections.abc import Iterable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dla_fast import checks
from dla_fast.kernels import config, examples, host, launch
from dla_fast.kernels.tile import along, at, inside, pixel_range
from dla_fast.ops.layout import empty_like_layout, is_channels_last


@triton.jit
def load_input(
    x, image, i, j, column, rows, cols, height, width, channels, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """x at one position of each row of the tile; zero outside the map."""
    there = rows & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    pixel = (image * height + i) * width + j
    return tl.load(
        x + at(pixel, height * width, channels, CL)[:, None] + column, mask=inside(there, cols, EVEN), other=0.0
    ).to(ACC)


@triton.jit
def upsample_kernel(
    x, w, skip, y, total, height, width, channels, out_height, out_width,
    BM: tl.constexpr, BN: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    m = pixel_range(tl.program_id(0), BM, I64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    rows, cols = m < total, c < channels
    j, i = m % (width + 1), m // (width + 1) % (height + 1)
    image = m // ((width + 1) * (height + 1))
    column = along(c, height * width, CL, I64)[None, :]
    out_column = along(c, out_height * out_width, CL, I64)[None, :]
    x00 = load_input(x, image, i, j, column, rows, cols, height, width, channels, CL, EVEN, ACC)
    x01 = load_input(x, image, i, j - 1, column, rows, cols, height, width, channels, CL, EVEN, ACC)
    x10 = load_input(x, image, i - 1, j, column, rows, cols, height, width, channels, CL, EVEN, ACC)
    x11 = load_input(x, image, i - 1, j - 1, column, rows, cols, height, width, channels, CL, EVEN, ACC)
    for phase in range(F * F):
        ky, kx = phase // F, phase % F
        tap = w + c * (4 * F * F) + ky * (2 * F) + kx
        value = x00 * tl.load(tap, mask=cols, other=0.0).to(ACC)[None, :]
        value += x01 * tl.load(tap + F, mask=cols, other=0.0).to(ACC)[None, :]
        value += x10 * tl.load(tap + 2 * F * F, mask=cols, other=0.0).to(ACC)[None, :]
        value += x11 * tl.load(tap + 2 * F * F + F, mask=cols, other=0.0).to(ACC)[None, :]
        top, left = i * F - F // 2 + ky, j * F - F // 2 + kx
        there = rows & (top >= 0) & (top < out_height) & (left >= 0) & (left < out_width)
        pixel = (image * out_height + top) * out_width + left
        offset = at(pixel, out_height * out_width, channels, CL)[:, None] + out_column
        mask = inside(there, cols, EVEN)
        if skip is not None:
            value += tl.load(skip + offset, mask=mask, other=0.0).to(ACC)
        tl.store(y + offset, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy, x, w, dx, partial, total, height, width, channels, out_height, out_width,
    BM: tl.constexpr, BN: tl.constexpr, CL: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, I64: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    m = pixel_range(tl.program_id(0), BM, I64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    rows, cols = m < total, c < channels
    j, i = m % width, m // width % height
    image = m // (width * height)
    mask = inside(rows, cols, EVEN)
    offset = at(m, height * width, channels, CL)[:, None] + along(c, height * width, CL, I64)[None, :]
    out_column = along(c, out_height * out_width, CL, I64)[None, :]
    tiles = tl.cdiv(total, BM)
    if partial is not None:
        value = tl.load(x + offset, mask=mask, other=0.0).to(ACC)
    acc = tl.zeros((BM, BN), ACC)
    for tap in range(4 * F * F):
        top, left = i * F - F // 2 + tap // (2 * F), j * F - F // 2 + tap % (2 * F)
        grad = load_input(dy, image, top, left, out_column, rows, cols, out_height, out_width, channels, CL, EVEN, ACC)
        if dx is not None:
            acc += grad * tl.load(w + c * (4 * F * F) + tap, mask=cols, other=0.0).to(ACC)[None, :]
        if partial is not None:
            to = partial + (tap * channels + c) * tiles + tl.program_id(0)
            tl.store(to, tl.sum(grad * value, 0), mask=cols)
    if dx is not None:
        tl.store(dx + offset, acc.to(dx.dtype.element_ty), mask=mask)


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


_LARGE = 2**31
# (channels, low-resolution side at 512x512, factor): the steps of the IDA ladders.
_STEPS = ((64, 64, 2), (128, 32, 2), (256, 16, 2), (64, 32, 4), (64, 16, 8))


def _choose(kernel: str, m: int, channels: int, x: Tensor, channels_last: bool) -> config.TileConfig:
    return config.choose(kernel, m, 0, channels, x.dtype, config.arch_of(x.device), 0, channels_last)


def _sides(x: Tensor, factor: int) -> tuple[int, int]:
    return checks.upsampled(x.shape[2], factor), checks.upsampled(x.shape[3], factor)


def _constexprs(cfg: config.TileConfig, x: Tensor, channels_last: bool, largest: int, factor: int) -> dict[str, object]:
    return {
        "BM": cfg.block_m,
        "BN": cfg.block_n,
        "CL": channels_last,
        "EVEN": x.shape[1] % cfg.block_n == 0,
        "ACC": host.accumulator(x.dtype),
        "I64": largest >= _LARGE,
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
    total = images * (height + 1) * (width + 1)
    cfg = _choose("upsample", total, channels, x, cl)
    # A tile may reach past the last pixel before its mask says so.
    constexprs = _constexprs(cfg, x, cl, (total + 1024) * factor**2 * channels, factor)
    grid = (triton.cdiv(total, cfg.block_m), triton.cdiv(channels, cfg.block_n))
    args = (x, weight.contiguous(), skip, y, total, height, width, channels, *sides)
    launch.launch(upsample_kernel, grid, args, constexprs, cfg)
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
    total, taps = images * height * width, 4 * factor**2
    if x.numel() == 0:
        return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if dw is None else dw.zero_()
    cfg = _choose("upsample_backward", total, channels, x, cl)
    tiles = triton.cdiv(total, cfg.block_m)
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty((taps, channels, tiles), dtype=accumulate) if need_dw else None
    constexprs = _constexprs(cfg, x, cl, (total + 1024) * factor**2 * channels, factor)
    args = (dy, x, weight.contiguous(), dx, partial, total, height, width, channels, *_sides(x, factor))
    launch.launch(backward_kernel, (tiles, triton.cdiv(channels, cfg.block_n)), args, constexprs, cfg)
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
