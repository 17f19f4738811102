"""Float products of an aggregation node on the CPU, made of bfloat16 products of three parts where that is faster.

All of it holds for the float instructions too, so other processors run it as well, and once more over emulated tiles.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from test_cpu_bf16 import LAYOUTS, amid_nan, isa, node, passes_with
from test_cpu_bf16_backward import Backward, threads_of
from torch import Tensor
from torch.nn import functional as F

from dla_fast import _extension, functional, use_backend
from dla_fast.proof import parity

pytestmark = pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")

# Of the sum of the terms' magnitudes; float sums of these depths stay below.
BOUND = 2.0**-21
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def _on_cpu():
    with use_backend("cpu"):
        yield


def forward(xs: list[Tensor], weight: Tensor) -> Tensor:
    """The sum of products alone."""
    one = torch.ones(weight.shape[0])
    with torch.no_grad():
        return functional.aggregate(xs, weight, one, 0 * one, 0 * one, one, training=False, act="identity", eps=1e-30)


def products(xs: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, and the sum of the terms' magnitudes."""
    x, w = torch.cat([x.double() for x in xs], 1), weight.double()
    return F.conv2d(x, w), F.conv2d(x.abs(), w.abs())


# Pixels around a block (16) and a step (32), few and many tiles (128 pixels), several images to a tile.
SIZES = ((1, 1, 1), (1, 1, 17), (1, 4, 8), (3, 7, 7), (1, 10, 13), (2, 16, 17), (5, 1, 3), (2, 23, 29), (17, 5, 5))
CHANNELS = ((64,), (64, 31, 33), (32, 128, 96), (70, 63), (1, 150))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_every_boundary(poisoned, channels, size, layout):
    for out_channels in (64, 65, 81, 128, 150):
        xs, (weight, *_) = node(channels, out_channels, size, layout, FLOAT)
        z, magnitude = products(xs, weight)
        assert ((forward(xs, weight) - z).abs() <= BOUND * magnitude).all(), out_channels


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_products(layout):
    """One term a sum: the loss of any of the six products of parts would show, the middle ones' up to 2^-18 of it."""
    xs, _ = node((64, 64), 128, (2, 9, 9), layout, FLOAT)
    weight = torch.diag(torch.randn(128)).view(128, 128, 1, 1)
    z, magnitude = products(xs, weight)
    assert ((forward(xs, weight) - z).abs() <= 2.0**-23 * magnitude).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_of_every_size(layout):
    """Each value is split for itself: large ones leave the small ones of another channel alone."""
    xs, (weight, *_) = node((64, 64), 64, (2, 9, 9), layout, FLOAT)
    scale = torch.exp2(torch.randint(-60, 60, (128,)).float())
    scaled = [x * s.view(-1, 1, 1) for x, s in zip(xs, scale.split(64), strict=True)]
    for other in (1 / scale, torch.ones(128)):
        w = weight * other.view(1, -1, 1, 1)
        z, magnitude = products(scaled, w)
        assert ((forward(scaled, w) - z).abs() <= BOUND * magnitude).all()


def test_values_that_round_up():
    """Where rounding the high part carries into the exponent, or lies half way, the other parts make up for it."""
    patterns = [0x3F7FFFFF, 0x3F7F8000, 0x3F808000, 0x3F817FFF, 0x3F80FF80, 0x00800000, 0x7F7F7FFF, 0x3F800001]
    x = torch.tensor(patterns, dtype=torch.int32).view(torch.float32).repeat(8).view(1, 64, 1, 1)
    x = torch.cat([x, -x])
    # One term a sum, so that it has to come out exactly.
    y = forward([x], torch.eye(64).view(64, 64, 1, 1))
    normal = x.abs() > 1e-30
    assert torch.equal(y[normal], x[normal])
    assert (y[~normal] - x[~normal]).abs().max() < 1.2e-38


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38], ids=str)
@pytest.mark.parametrize("size", [(3, 5, 7), (3, 13, 17)], ids=str)
def test_what_is_not_finite_stays_where_it_belongs(layout, value, size):
    xs, (weight, *_) = node((33, 64), 70, size, layout, FLOAT)
    expected = forward(xs, weight)
    xs[1][1, 63, 4, 6] = value
    y = forward(xs, weight)
    assert not (y[1, :, 4, 6].isfinite() & (y[1, :, 4, 6].abs() < 1e30)).any()
    y[1, :, 4, 6] = expected[1, :, 4, 6]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex)
def test_every_nan_stays_one(bits):
    x = torch.ones(1, 64, 1, 1)
    x[0, 5] = torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32).view(torch.float32)
    assert forward([x], torch.rand(64, 64, 1, 1)).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 7, 7), (4, 7, 7), (2, 30, 40)], ids=str)
def test_neighbours_do_not_leak(layout, size):
    xs, (weight, *_) = node((33, 64), 70, size, layout, FLOAT)
    assert torch.equal(forward([amid_nan(x) for x in xs], amid_nan(weight)), forward(xs, weight))


def check_backward(case: Backward, found: list[Tensor], message: str) -> None:
    mean, var, gamma, _, sum_dy, sum_dy_xhat = (t.double().view(-1, 1, 1) for t in case.norm)
    dy, z, count = case.dy.double(), case.z.double(), case.z.numel() // case.z.shape[1]
    rstd = (var + 1e-5).rsqrt()
    x_hat = (z - mean) * rstd
    terms = [dy, -sum_dy / count, -x_hat * sum_dy_xhat / count]
    weight, x = case.weight.double().flatten(1), torch.cat(case.xs, 1).double()

    def gradients(dz: Tensor, w: Tensor, x: Tensor, skip: Tensor) -> list[Tensor]:
        dx = list(torch.einsum("nohw,oi->nihw", dz, w).split([x.shape[1] for x in case.xs], 1))
        if case.residual:
            dx[0] = dx[0] + skip
        return [*dx, torch.einsum("nohw,nihw->oi", dz, x)[..., None, None]]

    right = gradients(gamma * rstd * sum(terms), weight, x, dy)
    # dz itself rounds as its terms are large, (z - mean) among them.
    size = [t.abs() for t in terms[:2]] + [(z.abs() + mean.abs()) * rstd * (sum_dy_xhat / count).abs()]
    magnitude = gradients((gamma * rstd).abs() * sum(size), weight.abs(), x.abs(), dy.abs())
    for i, (g, e, m) in enumerate(zip(found, right, magnitude, strict=True)):
        assert ((g - e).abs() <= 2 * BOUND * m).all(), f"{message}, gradient {i}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [*SIZES, (1, 33, 65), (2, 14, 14)], ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_backward_at_every_boundary(poisoned, channels, size, layout):
    for out_channels, threads in zip((64, channels[0], 81, 150), itertools.cycle((1, 2, 3)), strict=False):
        case = Backward.of(channels, out_channels, size, layout, out_channels == channels[0], FLOAT)
        with threads_of(threads):
            found = case.run()
        check_backward(case, found, f"to {out_channels}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [(2, 9, 9), (4, 16, 16)], ids=str)
def test_backward_of_what_needs_it(poisoned, layout, residual, size):
    case = Backward.of((64, 31, 33), 64, size, layout, residual, FLOAT)
    whole = case.run()
    for need in itertools.product((False, True), repeat=4):
        for got, full, wanted in zip(case.run(list(need[:3]), need[3]), whole, need, strict=True):
            assert torch.equal(got, full) if wanted else got.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize(("channels", "size"), [((64,), (3, 40, 40)), ((64, 70), (4, 14, 14)), ((256, 96), (1, 7, 7))])
def test_backward_is_the_same_from_run_to_run(poisoned, layout, threads, channels, size):
    """With more threads than tiles, too."""
    case = Backward.of(channels, 64, size, layout, dtype=FLOAT)
    with threads_of(threads):
        first = case.run()
        for _ in range(3):
            assert all(map(torch.equal, case.run(), first))
    check_backward(case, first, f"{threads} threads")
    with threads_of(1):
        alone = case.run()
    assert all(map(torch.equal, first[:-1], alone[:-1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(3, 5, 7), (3, 20, 20)], ids=str)
def test_gradients_that_are_not_finite_stay_where_they_belong(layout, size):
    case = Backward.of((33, 64), 64, size, layout, dtype=FLOAT)
    expected = case.run()
    case.dy[1, 39, 4, 6] = float("nan")
    *dxs, dw = case.run()
    for dx, e in zip(dxs, expected, strict=False):
        assert not dx[1, :, 4, 6].isfinite().any()
        dx[1, :, 4, 6] = e[1, :, 4, 6]
        assert torch.equal(dx, e)
    assert not dw[39].isfinite().any()
    dw[39] = expected[-1][39]
    assert torch.equal(dw, expected[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 5, 5), (2, 20, 20)], ids=str)
def test_neighbours_of_the_backward_do_not_leak(layout, size):
    case = Backward.of((31, 40), 64, size, layout, dtype=FLOAT)
    expected = case.run()
    case.xs, case.weight = [amid_nan(x) for x in case.xs], amid_nan(case.weight)
    case.dy, case.z = amid_nan(case.dy), amid_nan(case.z)
    assert all(map(torch.equal, case.run(), expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity(poisoned, layout):
    pool = parity.Pool()
    for residual, training, (batch, side) in itertools.product((False, True), (False, True), ((1, 7), (8, 7), (2, 28))):
        pool.add(
            parity.aggregate(
                parity.Spec(
                    layout=layout,
                    channels=(96, 96, 32, 96),
                    out_channels=96,
                    batch=batch,
                    height=side,
                    width=side,
                    residual=residual,
                    training=training,
                )
            )
        )
    assert pool.failures() == ""


def test_other_products_hold_too():
    if isa() != "amx":
        pytest.skip("the tests above ran with float instructions")
    passes_with("avx512", __file__)


def test_other_products_with_tiles_hold_too():
    """The source of the products with AMX, over emulated tiles."""
    passes_with("amx_emulated", __file__, every=3)
