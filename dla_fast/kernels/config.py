"""Tile configurations: a measured table where there is one, a heuristic behind it, and never a search in a call.

:func:`choose` is asked with what decides a kernel's speed, (kernel, M, K, N, dtype, architecture), and answers from the
table (:mod:`dla_fast.kernels.table`) or computes; :func:`install` adds to the table.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import torch

from dla_fast.kernels.table import TABLE, Key, TileConfig, measured

# What the heuristic was worked out for, and what is assumed where no device is there to ask.
DEFAULT_ARCH = 90
# Multiprocessors of a large GPU, an H100 or H200.
PROCESSORS = 132
# Programs that keep it busy; decides how far a small problem is split.
PROGRAMS = 2 * PROCESSORS


# Changes with the table, so that a plan which was made with another is not used.
generation = 0


def install(entries: Mapping[Key, TileConfig]) -> None:
    """Put measured configurations into the table; calls after this use them."""
    global generation
    TABLE.update(entries)
    generation += 1
    choose.cache_clear()


_assumed = DEFAULT_ARCH


@contextlib.contextmanager
def assume(arch: int) -> Iterator[None]:
    """Choose for another architecture where there is no device to ask."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        arch_of.cache_clear()
        install({})
        yield
    finally:
        _assumed = before
        arch_of.cache_clear()
        install({})


@lru_cache(maxsize=256)
def arch_of(device: torch.device) -> int:
    """The architecture of a device as a number, 90 for sm_90, 94 for gfx942; the assumed one where there is none."""
    if device.type != "cuda":
        return _assumed
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


@lru_cache(maxsize=256)
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a device; a large GPU's where there is none to ask."""
    if device.type != "cuda":
        return PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tiles_per_program(tiles: int, blocks: int, cfg: TileConfig, device: torch.device) -> int:
    """Tiles of pixels that a program walks, so that all programs are resident at a time.

    Args:
        tiles: of pixels.
        blocks: of channels, each of which has programs of its own.
        cfg: how many fit on a multiprocessor.
        device: the tensors'.
    """
    slots = processors_of(device) * cfg.resident
    each = max(1, math.ceil(tiles * blocks / slots))
    # A few tiles each would leave slots empty in the last round; programs of one tile fill them as they come free.
    return each if tiles * blocks >= 0.85 * each * slots else 1


def power_of_two(n: int, least: int, most: int) -> int:
    """The power of two not below ``n``, held between two others."""
    return min(max(1 << max(0, n - 1).bit_length(), least), most)


def channel_block(channels: tuple[int, ...], most: int) -> int:
    """A step through the channels of every input: the largest power of two that divides them all, if 16 does."""
    common = math.gcd(*channels, most)
    return common if common >= 16 else power_of_two(max(channels, default=1), 16, min(most, 32))


# Forward products: of one tap, with a residual, with moments, of contiguous maps whose pixels come one by one; of
# several taps; with inputs that are upsampled on the way.
FLAT = ("forward", "added", "stage", "torn")
FORWARD = (*FLAT, "conv", "conv_added", "conv_stage", "merge")


def _wide(kernel: str, n: int, channels_last: bool) -> TileConfig:
    """Tiles of a forward product in half precision for many pixels, on processors with warpgroup instructions.

    A tile holds all output channels where it can, so that inputs are read once; the weight is read again for every
    tile of pixels, by the second-level cache, so that wide tiles are long. Two programs a multiprocessor hide each
    other's epilogue. Moments leave fewer registers, as do the addresses of a contiguous map, or of several taps.
    """
    if n <= 64:
        return TileConfig(128, 64, 64, 4, 4 if channels_last and kernel in ("forward", "stage") else 3, resident=2)
    if kernel.startswith("conv"):
        if kernel == "conv":
            return TileConfig(128, 128, 32, 4, 4, resident=2) if n <= 128 else TileConfig(128, 256, 64, 8, 4)
        return TileConfig(128, 128, 64, 8, 3) if kernel == "conv_stage" else TileConfig(128, 128, 32, 8, 4)
    if n > 128 and kernel == "forward":
        return TileConfig(128, 256, 64 if channels_last else 32, 8, 4)
    return TileConfig(128, 128, 64 if channels_last else 32, 4, 3, resident=2)


def _narrow(m: int, n: int, step: int, dtype: torch.dtype) -> TileConfig:
    """Tiles of a forward product that keep a large GPU busy however few pixels there are."""
    if dtype == torch.float64:
        return TileConfig(power_of_two(m, 16, 32), power_of_two(n, 16, 64), min(step, 16), 4, 2)
    block_n, block_m = power_of_two(n, 16, 128), power_of_two(m, 16, 128)
    # Narrow tiles before short ones: a tile of few pixels leaves as many bytes of moments behind as one of many.
    while block_m * block_n > 64 * 64 and math.ceil(m / block_m) * math.ceil(n / block_n) < PROGRAMS:
        block_m, block_n = (block_m // 2, block_n) if block_m > 64 else (block_m, max(block_n // 2, 16))
    if block_m > 32 and math.ceil(m / block_m) * math.ceil(n / block_n) < PROGRAMS // 2:
        block_m = 32
    warps = 8 if block_m * block_n >= 64 * 128 else 4
    return TileConfig(block_m, block_n, min(step, 64 if dtype.itemsize == 2 else 32), warps, 3, resident=8 // warps)


def _product(kernel: str, m: int, n: int, step: int, dtype: torch.dtype, arch: int, channels_last: bool) -> TileConfig:
    """Forward product; chosen on sm_90 by the model of benchmarks.gates.predict, not by measuring."""
    looked_at = kernel in FLAT[:3] or (channels_last and kernel.startswith("conv"))
    if dtype.itemsize == 2 and arch == 90 and looked_at:
        wide = _wide(kernel, n, channels_last)
        if math.ceil(m / wide.block_m) * math.ceil(n / wide.block_n) >= PROCESSORS * wide.resident:
            return replace(wide, block_n=power_of_two(n, 16, wide.block_n), block_k=min(step, wide.block_k))
    narrow = _narrow(m, n, step, dtype)
    if dtype == torch.float64 or kernel in FLAT:
        return narrow
    # Several taps, or inputs that are upsampled on the way: addresses and masks take registers of their own.
    most = 128 if dtype.itemsize == 2 and channels_last else 64
    return TileConfig(min(narrow.block_m, 64), min(narrow.block_n, most), min(narrow.block_k, 32), 8, 2)


def _backward(
    kernel: str, m: int, n: int, step: int, dtype: torch.dtype, arch: int, channels_last: bool, exact: bool
) -> TileConfig:
    """Tiles of the backward products; block_n of ``fused`` must hold every output channel, block_n of ``dx`` is the
    part of them that is formed at a time."""
    half, slow = dtype.itemsize == 2, dtype == torch.float64 or exact
    modern = arch >= 90 and half
    if kernel == "fused":
        # Warpgroup instructions want 64 pixels; others leave more of a thread's registers to the accumulators.
        block_n = power_of_two(n, 16, 128)
        block_m = power_of_two(m, 16, 64 if modern or (half and block_n <= 64) else 32)
        narrow = arch == 90 and half and block_n == step == 64
        stages, resident = 3 if modern else 2, 2 if narrow else 1
        return TileConfig(
            block_m, block_n, min(step, 64 if narrow else 128), 4 if narrow else 8, stages, resident=resident
        )
    if slow:
        block_m = power_of_two(m, 16, 16 if kernel == "dx" else 32)
        return TileConfig(block_m, power_of_two(n, 16, 32), min(step, 32), 4, 1)
    if kernel == "dx":
        if modern and n <= 128:
            return TileConfig(power_of_two(m, 16, 128), power_of_two(n, 16, 64), min(step, 64), 4, 2)
        return TileConfig(power_of_two(m, 16, 64 if half else 32), power_of_two(n, 16, 64), min(step, 64), 4, 2)
    # A contiguous map's tile is turned round in registers.
    most = 128 if channels_last else 64
    warps, stages = (4, 3) if modern else (8, 2)
    return TileConfig(
        power_of_two(m, 16, 64 if half else 32), power_of_two(n, 16, most), min(step, most), warps, stages, resident=2
    )


def fused_values(arch: int) -> int:
    """Values of dW that the threads of a program may hold beside a tile; several blocks of it spill but on sm_90."""
    return 64 * 128 if arch == 90 else 0


def holds_dz(n: int, dtype: torch.dtype, exact: bool = False) -> bool:
    """Whether a tile of dz with all its channels fits a program: four parts of the width that is chosen for dx."""
    return n <= (128 if dtype == torch.float64 or exact else 256)


def fits_fused(k: int, n: int, dtype: torch.dtype, exact: bool = False) -> bool:
    """Whether one pass may make dx and dW: all of dW and a tile's dz must stay in registers and shared memory."""
    most = 32 if dtype == torch.float64 or exact else 128
    return n <= most and n * k * 4 <= 128 * 1024


def _elementwise(m: int, n: int, channels_last: bool, dtype: torch.dtype) -> TileConfig:
    """Passes over every value: tiles that are long along memory, up to four accesses of 16 bytes a thread at once."""
    values = 8192 // dtype.itemsize
    while values > 2048 // dtype.itemsize and m * n < PROGRAMS * values:
        values //= 2
    if channels_last:
        block_m = power_of_two(m, 1, values // power_of_two(n, 1, 64))
        return TileConfig(block_m, power_of_two(n, 1, values // block_m), 0, 4, 1)
    block_m = power_of_two(m, 1, 512)
    return TileConfig(block_m, power_of_two(n, 1, max(1, values // block_m)), 0, 4, 1)


def _upsample(kernel: str, m: int, n: int, channels_last: bool, dtype: torch.dtype) -> TileConfig:
    """Tiles of ``m`` columns and n channels, small ones: each thread holds the weights of all its values."""
    values = 2048 // dtype.itemsize if kernel == "upsample" else 256 if dtype == torch.float64 else 512
    if channels_last:
        block_n = power_of_two(n, 1, 64)
        return TileConfig(power_of_two(m, 1, values // block_n), block_n, 0, 4, 1)
    block_m = power_of_two(m, 1, min(128, values))
    return TileConfig(block_m, power_of_two(n, 1, values // block_m), 0, 4, 1)


# Not an NVIDIA number: AMD's gfx942, as PyTorch counts it.
_CDNA3 = 94


def _fitted(kernel: str, cfg: TileConfig, dtype: torch.dtype, arch: int) -> TileConfig:
    """What compiles without spilling on each architecture, and fits its shared memory.

    Found by compiling ahead of time (benchmarks.gates.aot), not by measuring.
    """
    if arch == _CDNA3:
        # 64 KB of shared memory; a warp is 64 threads wide.
        if kernel in FORWARD and kernel not in FLAT:
            short = kernel == "merge" or dtype.itemsize > 2
            block_k = min(cfg.block_k, 16 if kernel == "merge" and dtype.itemsize > 2 else 32)
            cfg = replace(
                cfg, block_m=min(cfg.block_m, 16 if short else 32), block_n=min(cfg.block_n, 32), block_k=block_k
            )
            return replace(cfg, num_stages=1 if short else min(cfg.num_stages, 2))
        masked = cfg.block_m
        if kernel in FLAT:
            masked = 16 if cfg.block_k <= 32 else min(masked, 64 if cfg.block_n >= 128 else 128)
        rows = {"fused": 16, "dw": 32, "elementwise": cfg.block_m // 4, "upsample": cfg.block_m // 2}.get(
            kernel, masked
        )
        cfg = replace(cfg, block_m=max(1, min(cfg.block_m, rows)))
        warps = 8 if kernel in FLAT else cfg.num_warps
        if kernel == "fused":
            warps = 8 if cfg.block_n <= 64 else 4
        return replace(cfg, num_warps=warps, num_stages=min(cfg.num_stages, 2))
    if kernel in ("elementwise", "upsample", "upsample_backward"):
        return cfg
    if arch == 90 and kernel in FORWARD and cfg.num_warps == 4:
        return cfg
    if arch >= 100 and kernel in FLAT and cfg.block_n >= 128:
        cfg = replace(cfg, block_m=min(cfg.block_m, 64))
    if arch >= 100 and kernel == "fused" and cfg.block_k <= 32:
        cfg = replace(cfg, block_m=min(cfg.block_m, 32))
    if arch != 90 and kernel in FORWARD and kernel not in FLAT:
        rows = 32 if arch < 90 or dtype == torch.float32 else 64
        cfg = replace(cfg, block_m=min(cfg.block_m, rows), block_n=min(cfg.block_n, 64))
    if arch != 90 and kernel == "merge":
        rows = 16 if dtype == torch.float64 else 32
        cfg = replace(cfg, block_m=min(cfg.block_m, rows), block_n=min(cfg.block_n, 32 if arch >= 100 else 64))
    # Left alone the compiler takes few registers and spills some bytes, so that more blocks fit.
    limited = {80: ("dx", "dw", "fused", "merge"), 90: ("merge",), 100: ("dx", "dw", "merge", "fused")}
    if kernel in limited.get(arch, ()) or cfg.num_warps < 8:
        cfg = replace(cfg, max_registers=255)
    return cfg


def forms_on_load(arch: int) -> bool:
    """Whether kernels there form an input as they load it: AMD's spill with it, so that a pass before them is less."""
    return arch != _CDNA3


def forms_in_backward(inputs: int, fused: bool) -> bool:
    """Whether dW takes an input that is formed on load, and no pass before it.

    By the model of benchmarks.gates.predict, not by measuring: a pass that makes all gradients of several inputs at
    once waits for it longer than a pass before takes.
    """
    return inputs == 1 or not fused


def passes_back(inputs: int, fused: bool) -> bool:
    """Whether the kernel of dx also takes that input's gradient back through the norm's activation.

    By the same model only beside dW of one input, where nothing more is read: its sums wait, and in ``dx_kernel`` the
    loads of z do.
    """
    return inputs == 1 and fused


def with_prologue(kernel: str, cfg: TileConfig, arch: int, residual: bool) -> TileConfig:
    """The configuration of a kernel that forms an input on load, from that of the same without: as :func:`_fitted`.

    An input's residual is loaded beside it: a stage less, for as much shared memory. In the backward more threads share
    a tile, which is there in several forms at a time; in the forward they do a wide one, so that moments are carried:
    no pass follows beside whose bytes those of a group for each tile, 6 % of a link's, would be few.

    Args:
        kernel: "stage", "fused", "dx" or "dw".
        cfg: its configuration.
        arch: see :func:`arch_of`.
        residual: whether the input has one.
    """
    if arch < 90 and (kernel == "fused" or (kernel == "stage" and cfg.block_n >= 128)):
        cfg = replace(cfg, block_m=min(cfg.block_m, 32 if kernel == "fused" else 64))
    if kernel == "stage" and cfg.block_m * cfg.block_n >= 128 * 128:
        cfg = replace(cfg, num_warps=8, resident=1)
    if kernel == "fused":
        cfg = replace(cfg, block_k=min(cfg.block_k, 64))
    if kernel != "stage" and cfg.block_m * cfg.block_k >= 64 * 64:
        cfg = replace(cfg, num_warps=8)
    return replace(cfg, num_stages=min(cfg.num_stages, 2)) if residual else cfg


@lru_cache(maxsize=1024)
def merge(groups: int, channels: int, operands: int = 1) -> TileConfig:
    """For adding up partial results: block_m groups at once, all of them if they fit, and block_n channels.

    Few steps, since each waits for memory; a thread holds eight values in double of each of three operands.
    """
    most = 2048 if operands > 1 else 4096
    at_once = power_of_two(groups, 1, most)
    block_n = power_of_two(channels, 1, max(1, min(8, most // at_once)))
    # A GPU has room for more programs than there are blocks of eight channels.
    while block_n > 1 and channels < block_n * PROGRAMS:
        block_n //= 2
    values = at_once * block_n
    return TileConfig(at_once, block_n, 0, 8 if values >= 2048 else 4 if values >= 256 else 1, 1)


@lru_cache(maxsize=1024)
def weight_sum(size: int, ranges: int) -> TileConfig:
    """For adding up parts of dW: block_m values, and block_n ranges at once, so that their loads overlap."""
    block_m = power_of_two(size, 1, 256)
    return TileConfig(block_m, power_of_two(ranges, 1, 16), 0, 4, 1)


@lru_cache(maxsize=4096)
def choose(
    kernel: str,
    m: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    arch: int,
    step: int = 0,
    channels_last: bool = True,
    exact: bool = False,
) -> TileConfig:
    """The configuration of a kernel for a problem.

    Args:
        kernel: one of :data:`FORWARD`, "fused", "dx", "dw", "elementwise", "upsample" or "upsample_backward".
        m: pixels, over all images.
        k: input channels, over all inputs; 0 where nothing is multiplied.
        n: output channels.
        dtype: of the tensors.
        arch: see :func:`arch_of`.
        step: the largest step through input channels, see :func:`channel_block`.
        channels_last: layout.
        exact: float32 is multiplied as such, without matrix instructions; what was measured with them says nothing.
    """
    found = None if exact else measured(kernel, m, k, n, dtype, arch)
    if found is not None:
        return found
    if kernel in FORWARD:
        cfg = _product(kernel, m, n, step, dtype, arch, channels_last)
    elif kernel == "elementwise":
        cfg = _elementwise(m, n, channels_last, dtype)
    elif kernel in ("upsample", "upsample_backward"):
        cfg = _upsample(kernel, m, n, channels_last, dtype)
    else:
        cfg = _backward(kernel, m, n, step, dtype, arch, channels_last, exact)
    return _fitted(kernel, cfg, dtype, arch)
