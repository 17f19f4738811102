"""Kernels with known faults, listed as the package lists its own: what test_aot.py compiles."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from dla_fast.kernels import launch
from dla_fast.kernels.config import TileConfig


@triton.jit
def good_kernel(a, b, c, B: tl.constexpr):
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def no_matrix_instruction_kernel(a, b, c, B: tl.constexpr):
    i = tl.arange(0, B)
    row, column = tl.load(a + i).to(tl.float32), tl.load(b + i).to(tl.float32)
    tl.store(c + i[:, None] * B + i[None, :], row[:, None] * column[None, :])


@triton.jit
def spilling_kernel(a, b, c, B: tl.constexpr):
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    left, right = tl.load(a + at).to(tl.float32), tl.load(b + at).to(tl.float32)
    # Both tiles have to stay until their sums are known.
    sums = tl.sum(left, 0)[None, :] + tl.sum(right, 1)[:, None]
    tl.store(c + at, tl.exp(left * sums) + tl.exp(right - sums))


@triton.jit
def large_kernel(a, b, c, B: tl.constexpr):
    acc = tl.zeros((B, B), tl.float32)
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    for step in range(0, 8):
        acc = tl.dot(tl.load(a + at + step), tl.load(b + at + step), acc)
    tl.store(c + at, acc)


@triton.jit
def broken_kernel(a, b, c, B: tl.constexpr):
    tl.static_assert(B == 0, "never compiles")


def specialisations() -> Iterable[launch.Specialisation]:
    half = torch.empty(1, dtype=torch.float16, device="meta")
    full = torch.empty(1, device="meta")
    with launch.record() as launches:
        for kernel, tile in (
            (good_kernel, TileConfig(64, 64, 64, 4, 1)),
            (no_matrix_instruction_kernel, TileConfig(64, 64, 64, 4, 1)),
            (spilling_kernel, TileConfig(128, 128, 0, 1, 1)),
            (large_kernel, TileConfig(256, 256, 256, 8, 4)),
            (broken_kernel, TileConfig(16, 16)),
        ):
            launch.launch(kernel, (1,), (half, half, full), {"B": tile.block_m}, tile)
    return [launch.specialisation("toy", torch.float16, one) for one in launches]
