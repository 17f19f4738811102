"""3x3 products of floats on the CPU, made of bfloat16 products of three parts where that is faster.

All of it holds for the float instructions too, so other processors run it as well, and once more over emulated tiles.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from test_cpu_bf16 import LAYOUTS, amid_nan, isa, passes_with
from test_cpu_bf16_backward import threads_of
from torch import Tensor
from torch.nn import functional as F

from dla_fast import _extension, functional, use_backend
from dla_fast.ops import packed
from dla_fast.proof import parity

pytestmark = pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")

# Of the sum of the terms' magnitudes: a few roundings, of the transforms too. A product of parts that is left out costs
# 2^-16 of a term or more.
BOUND = 2.0**-20


@pytest.fixture(autouse=True)
def _on_cpu():
    with use_backend("cpu"):
        yield


@dataclass
class Case:
    """A convolution of several maps alone, the gradient of its output, and what float64 makes of them."""

    xs: list[Tensor]
    weight: Tensor
    dy: Tensor

    @staticmethod
    def of(channels: tuple[int, ...], out_channels: int, size: tuple[int, int, int], layout: str) -> Case:
        n, h, w = size
        memory = parity.LAYOUTS[layout]
        xs = [torch.randn(n, c, h, w).contiguous(memory_format=memory) for c in channels]
        weight = torch.randn(out_channels, sum(channels), 3, 3).contiguous(memory_format=memory)
        return Case(xs, weight, torch.randn(n, out_channels, h, w).contiguous(memory_format=memory))

    def run(self, need: list[bool] | None = None) -> list[Tensor]:
        """Output and gradients of the inputs and the weight, or of those that are needed."""
        leaves = [t.detach().requires_grad_() for t in (*self.xs, self.weight)]
        one = torch.ones(len(self.weight))
        y = functional.merge(leaves[:-1], leaves[-1], one, 0 * one, 0 * one, one, training=False, act="identity", eps=0)
        wanted = [t for t, n in zip(leaves, need or [True] * len(leaves), strict=True) if n]
        return [y.detach(), *torch.autograd.grad(y, wanted, self.dy)]

    def expected(self, magnitude: bool = False) -> list[Tensor]:
        *xs, weight, dy = (t.double() for t in (*self.xs, self.weight, self.dy))
        if magnitude:
            xs, weight, dy = [x.abs() for x in xs], weight.abs(), dy.abs()
        leaves = [t.requires_grad_() for t in (*xs, weight)]
        y = F.conv2d(torch.cat(leaves[:-1], 1), leaves[-1], padding=1)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    def check(self, found: list[Tensor], message: str = "") -> None:
        for i, (f, e, m) in enumerate(zip(found, self.expected(), self.expected(True), strict=True)):
            # What a transform mixes into a result comes from the pixels around it.
            around = F.max_pool2d(m, 5, 1, 2) if m.shape[-1] != 3 else F.max_pool2d(m, 3).expand_as(m)
            assert ((f - e).abs() <= BOUND * around).all(), f"{message} result {i}"


def convolved(xs: list[Tensor], weight: Tensor, stride: int, dilation: int) -> Tensor:
    """The output alone."""
    one = torch.ones(len(weight))
    norm = (one, 0 * one, 0 * one, one)
    geometry = {"stride": stride, "dilation": dilation}
    return functional.conv_norm_act(xs, weight, *norm, training=False, act="identity", eps=0, **geometry)


# Tiles of 2x2 pixels around a block (16) and a step (32), blocks that are multiplied together and alone, many of them.
# Of fewer than 128 pixels floats are multiplied.
SIZES = ((129, 1, 1), (5, 7, 7), (33, 3, 2), (3, 3, 33), (2, 14, 13), (1, 19, 41))
CHANNELS = ((64,), (64, 31, 33), (1, 150), (48, 40))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_every_boundary(poisoned, channels, size, layout):
    for out_channels, threads in ((65, 1), (130, 2)) if len(channels) == 2 else ((64, 3), (49, 2)):
        case = Case.of(channels, out_channels, size, layout)
        with threads_of(threads):
            case.check(case.run(), f"to {out_channels}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_every_size(layout):
    """Each value is split for itself: large ones leave the small ones of another channel alone."""
    case = Case.of((64, 64), 64, (2, 9, 9), layout)
    scale = torch.exp2(torch.randint(-60, 60, (128,)).float())
    case.xs = [x * s.view(-1, 1, 1) for x, s in zip(case.xs, scale.split(64), strict=True)]
    case.weight /= scale.view(1, -1, 1, 1)
    case.check(case.run())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [(64, 31, 33), (70, 63)], ids=str)
def test_only_what_is_needed(poisoned, layout, channels):
    case = Case.of(channels, 64, (3, 8, 8), layout)
    whole = case.run()
    for i in range(len(channels) + 1):
        y, grad = case.run([j == i for j in range(len(channels) + 1)])
        assert torch.equal(y, whole[0])
        assert torch.equal(grad, whole[1 + i])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_where_it_belongs(layout):
    """A pixel that is not reaches the tiles of 2x2 outputs that read it, in its own image."""
    for value in (float("nan"), float("inf"), 3.4e38):
        case = Case.of((64, 33), 64, (5, 7, 9), layout)
        expected = case.run()[0]
        case.xs[1][1, 5, 3, 4] = value
        y = case.run()[0]
        assert not (y[1, :, 2:5, 3:6].isfinite() & (y[1, :, 2:5, 3:6].abs() < 1e30)).any()
        y[1, :, 2:6, 2:6] = expected[1, :, 2:6, 2:6]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 7, 7), (1, 19, 40)], ids=str)
def test_neighbours_do_not_leak(layout, size):
    case = Case.of((33, 64), 70, size, layout)
    expected = case.run()
    case.xs, case.weight, case.dy = [amid_nan(x) for x in case.xs], amid_nan(case.weight), amid_nan(case.dy)
    assert all(map(torch.equal, case.run(), expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_the_same_from_run_to_run(poisoned, layout, threads):
    case = Case.of((64, 70), 64, (3, 21, 22), layout)
    with threads_of(threads):
        first = case.run()
        assert all(map(torch.equal, case.run(), first))
    with threads_of(1):
        assert all(map(torch.equal, case.run()[:-1], first[:-1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity(poisoned, layout):
    """The last input is upsampled on the way."""
    for channels, out_channels, factor in (((64, 64), 64, 2), ((70, 5, 66), 130, 3), ((256,), 48, 2)):
        pool = parity.Pool()
        sizes = ((1, 6, 11), (2, 5, 7))
        for training, (batch, height, width), seed in itertools.product((False, True), sizes, range(3)):
            problem = parity.merge(
                parity.Spec(
                    layout=layout,
                    channels=channels,
                    out_channels=out_channels,
                    batch=batch,
                    height=height,
                    width=width,
                    kernel=3,
                    factor=factor,
                    training=training,
                    seed=seed,
                )
            )
            pool.add(problem)
            pool.add_inference(problem)
        assert pool.failures() == "", channels


# Kernel, stride, dilation.
GEOMETRIES = ((3, 2, 1), (3, 1, 2), (3, 2, 3), (3, 3, 1), (5, 1, 1), (5, 3, 2), (7, 2, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(6, 13, 14), (1, 37, 40), (33, 5, 4)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry(poisoned, geometry, size, layout):
    """The forward of strided, dilated and larger kernels, with blocks of several images and of parts of one."""
    kernel, stride, dilation = geometry
    for channels, out_channels, threads in (((64,), 130, 1), ((70, 31, 33), 65, 3)):
        case = Case.of(channels, out_channels, size, layout)
        case.xs = [amid_nan(x) for x in case.xs]
        weight = torch.randn(out_channels, sum(channels), kernel, kernel)
        weight = amid_nan(weight.contiguous(memory_format=parity.LAYOUTS[layout]))
        with threads_of(threads), torch.no_grad():
            y = convolved(case.xs, weight, stride, dilation)
        x = torch.cat(case.xs, 1).double()
        z, magnitude = (
            F.conv2d(x, w, None, stride, dilation * (kernel // 2), dilation)
            for x, w in ((x, weight.double()), (x.abs(), weight.double().abs()))
        )
        assert ((y - z).abs() <= BOUND / 2 * magnitude).all(), out_channels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_the_pixels_that_read_it(layout):
    (x,), weight = Case.of((64,), 64, (2, 19, 21), layout).xs, torch.randn(64, 64, 3, 3)
    with torch.no_grad():
        expected = convolved([x], weight, 2, 1)
        x[1, 5, 6, 9] = float("nan")
        y = convolved([x], weight, 2, 1)
    assert y[1, :, 3, 4:6].isnan().all()
    y[1, :, 3, 4:6] = expected[1, :, 3, 4:6]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_of_strides(poisoned, layout):
    for geometry in ({"stride": 2}, {"dilation": 2}, {"stride": 2, "dilation": 2, "residual": True}):
        pool = parity.Pool()
        for training, seed in itertools.product((False, True), range(2)):
            problem = parity.conv_norm_act(
                parity.Spec(
                    layout=layout,
                    channels=(64, 70),
                    out_channels=66,
                    batch=3,
                    height=15,
                    width=18,
                    kernel=3,
                    training=training,
                    seed=seed,
                    **geometry,
                )
            )
            pool.add(problem)
            pool.add_inference(problem)
        assert pool.failures() == "", geometry


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", [(1, 1, 1), (3, 1, 1), (3, 2, 1)], ids=str)
def test_packed_weights(layout, geometry):
    """What is packed once gives what is packed in the call, for few pixels and for many."""
    kernel, stride, dilation = geometry
    memory = parity.LAYOUTS[layout]
    weight = torch.randn(130, 134, kernel, kernel).contiguous(memory_format=memory)
    one = torch.ones(130)
    for size in ((1, 14, 12), (3, 19, 21)):
        xs = [torch.randn(size[0], c, *size[1:]).contiguous(memory_format=memory) for c in (64, 70)]
        with torch.no_grad():
            expected = convolved(xs, weight, stride, dilation)
        way = packed.way_of(xs, [], weight, [1, 1], stride, dilation, 1, False)
        kept = packed.pack(weight, [64, 70], way)
        call = packed.Call(weight, kept, way, one, 0 * one, [1, 1], stride, dilation, 1, -1, -1, "identity", 0.0)
        found = packed.run(call, xs, [], None)
        assert torch.equal(found, expected), size


def test_other_products_hold_too():
    if isa() != "amx":
        pytest.skip("the tests above ran with float instructions")
    passes_with("avx512", __file__)


def test_other_products_with_tiles_hold_too():
    passes_with("amx_emulated", __file__, every=5)
