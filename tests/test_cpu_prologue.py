"""Units that read z of the unit before, and form y of it while they multiply, beside those that read y itself."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
from test_cpu_bf16 import passes_with
from torch import Tensor

from dla_fast import _extension
from dla_fast.ops.layout import accumulation_dtype
from dla_fast.proof import parity

pytestmark = pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")

# Every so many of the combinations, in the processes that repeat them.
EVERY = int(os.environ.get("DLA_FAST_TEST_EVERY", "1"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# In units of what a value may be off, of sums of a few hundred products; half precision rounds y, or does not.
SLACK = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Geometry(NamedTuple):
    """Inputs' channels, which of them is given as z, and the convolution."""

    channels: tuple[int, ...]
    first: int
    out: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1


# Both products of 3x3 kernels, whole and ragged vectors, rows that are computed one by one.
GEOMETRIES = (
    Geometry((64,), 0, 48, kernel=1),
    Geometry((13, 70, 3), 1, 150, kernel=1),
    Geometry((16, 16), 0, 16, kernel=1, stride=2),
    Geometry((256,), 0, 513, kernel=1),
    Geometry((64,), 0, 70),
    Geometry((33, 40), 1, 32),
    Geometry((200,), 0, 136),
    Geometry((16,), 0, 16),
    Geometry((16,), 0, 32, stride=2),
    Geometry((5, 70), 1, 66, stride=2, dilation=2),
    Geometry((7, 5), 0, 17, dilation=2),
    Geometry((3,), 0, 16, kernel=7),
)
SIZES = ((2, 1, 1), (3, 5, 9), (2, 14, 11), (1, 12, 230))
ACTS = ("relu", "silu", "identity", "leaky_relu", "hardswish")


class Problem:
    """A unit behind another."""

    def __init__(self, geometry: Geometry, size: tuple[int, int, int], dtype: torch.dtype, layout: str, act: str,
                 residual: bool):  # fmt: skip
        n, h, w = size
        form = parity.LAYOUTS[layout]
        sums = accumulation_dtype(dtype)
        channels, first, out, kernel, stride, dilation = geometry

        def tensor(*size: int) -> Tensor:
            return torch.randn(size).to(dtype).contiguous(memory_format=form)

        def vectors(n: int) -> tuple[Tensor, ...]:
            return tuple(t.to(sums) for t in (torch.randn(n), torch.rand(n) + 0.5, torch.rand(n) + 0.5, torch.randn(n)))

        self.first, self.op, depth = first, torch.ops.dla_fast_cpu, sum(channels) * kernel**2
        self.xs = [tensor(n, c, h, w) for c in channels]
        self.weight = (tensor(out, sum(channels), kernel, kernel) * depth**-0.5).contiguous(memory_format=form)
        self.geometry = ([1] * len(channels), stride, dilation, 1)
        self.added = tensor(n, channels[first], h, w) if residual else None
        self.ending = (*vectors(channels[first]), 1e-5, act, 0.1)
        high, wide = (h - 1) // stride + 1, (w - 1) // stride + 1
        self.dy, self.norm, self.count = tensor(n, out, high, wide), vectors(out), n * high * wide
        self.sums = tuple(torch.randn(out, dtype=sums) for _ in range(2))

    @property
    def prologue(self) -> tuple[Any, ...]:
        return (self.first, self.added, *self.ending)

    def formed(self) -> list[Tensor]:
        """The inputs, with y."""
        xs = list(self.xs)
        xs[self.first] = self.op.tail(xs[self.first], *self.ending[:4], self.added, *self.ending[4:])
        return xs

    def forward(self, xs: list[Tensor], *prologue: Any) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = self.op.conv_norm_act_stage(
            xs, [], self.weight, None, None, None, *self.geometry, 0.1, True, *prologue
        )
        return found

    def backward(self, xs: list[Tensor], residual_input: int, *prologue: Any) -> Any:
        z = torch.ones_like(self.dy) if residual_input < 0 else self.dy * 0.5
        return self.op.conv_norm_act_backward(
            self.dy, xs, [], self.weight, None, z, *self.norm, *self.sums, *self.geometry, residual_input, self.count,
            1e-5, "silu", 0.0, [True] * len(xs), [], True, False, *prologue,
        )  # fmt: skip

    def through(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dy' and its sums from the gradient of y."""
        z, norm, rest = self.xs[self.first], self.ending[:4], self.ending[4:]
        sums = self.op.tail_backward_reduce(dy, z, *norm, self.added, *rest)
        return (self.op.tail_backward_apply(dy, z, *norm, self.added, None, None, 0, *rest, True)[1], *sums)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: Any) -> None:
    assert found.shape == expected.shape, what
    off = (found.double() - expected.double()).abs().max().item()
    assert off <= SLACK[dtype] * (expected.double().abs().max().item() + 1e-3), what


def combinations() -> list[tuple[tuple[int, int, int], bool]]:
    return [(size, residual) for size in SIZES for residual in (False, True)]


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(map(str, g)))
def test_reading_z_is_reading_y(geometry, dtype, layout):
    torch.manual_seed(0)
    for index, (size, residual) in enumerate(combinations()):
        if index % EVERY:
            continue
        problem = Problem(geometry, size, dtype, layout, ACTS[index % len(ACTS)], residual)
        xs = problem.formed()
        for found, expected in zip(problem.forward(problem.xs, *problem.prologue), problem.forward(xs), strict=True):
            close(found, expected, dtype, (size, residual))
        dxs, _, dw, _, _ = problem.backward(xs, -1)
        plain = problem.backward(problem.xs, -1, *problem.prologue, False)
        assert not plain[4]
        for found, expected in zip((*plain[0], plain[2]), (*dxs, dw), strict=True):
            close(found, expected, dtype, (size, residual))
        du, *sums = problem.through(dxs[problem.first])
        on = problem.backward(problem.xs, -1, *problem.prologue, True)
        again = problem.backward(problem.xs, -1, *problem.prologue, True)
        dxs[problem.first] = du
        for found, expected in zip((*on[0], on[2]), (*dxs, dw), strict=True):
            close(found, expected, dtype, (size, residual))
        for found, expected in zip(on[4], sums, strict=True):
            close(found, expected, dtype, (size, residual))
        for one, other in zip((*on[0], on[2], *on[4]), (*again[0], again[2], *again[4]), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("residual_input", [0, 1])
def test_an_input_that_is_the_residual_too(kernel, layout, residual_input):
    """What is read twice is formed as a map."""
    torch.manual_seed(0)
    problem = Problem(Geometry((40, 40), 0, 40, kernel), (2, 9, 11), torch.float64, layout, "relu", True)
    dxs, _, dw, _, _ = problem.backward(problem.formed(), residual_input)
    found = problem.backward(problem.xs, residual_input, *problem.prologue, True)
    dxs[0], *sums = problem.through(dxs[0])
    for one, other in zip((*found[0], found[2], *found[4]), (*dxs, dw, *sums), strict=True):
        close(one, other, torch.float64, residual_input)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_nan_passes(kernel, layout):
    problem = Problem(Geometry((33,), 0, 33, kernel), (1, 9, 11), torch.float32, layout, "relu", False)
    problem.xs[0][0, 3, 4, 5] = float("nan")
    found, expected = problem.forward(problem.xs, *problem.prologue)[0], problem.forward(problem.formed())[0]
    assert expected.isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())


def allocated(call: Any, size: int) -> int:
    """How many tensors of so many bytes a call allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() == size for event in events)


FORMED_ON_LOAD = (
    Geometry((64,), 0, 80, 1),
    Geometry((64,), 0, 80),
    Geometry((64,), 0, 80, stride=2),
    Geometry((8,), 0, 24, 7),
)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("geometry", FORMED_ON_LOAD, ids=lambda g: f"{g.kernel}-{g.stride}")
def test_no_y_is_written(geometry, layout):
    from dla_fast import _C

    if _C.cpu_isa() == "generic" and (geometry.stride > 1 or geometry.kernel > 3):
        pytest.skip("the library's convolution")
    if _C.cpu_isa().startswith("amx") and (geometry.stride > 1 or geometry.kernel != 3):
        pytest.skip("products of bfloat16 parts, which read y")
    problem = Problem(geometry, (2, 16, 20), torch.float32, layout, "relu", geometry.kernel == 1)
    y = problem.xs[0].nbytes
    assert allocated(lambda: problem.forward(problem.xs, *problem.prologue), y) == 0
    # That of dx.
    assert allocated(lambda: problem.backward(problem.xs, -1, *problem.prologue, True), y) == 1


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx_emulated"])
def test_other_products(isa):
    passes_with(isa, __file__, every=7)
