"""The backward of bfloat16 nodes on the CPU: the boundaries of the forward (test_cpu_bf16.py), and sums over pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from test_cpu_bf16 import CHANNELS, LAYOUTS, PRODUCTS, SIZES, amid_nan, isa, node, passes_with
from torch import Tensor

from dla_fast import _extension
from dla_fast.proof import parity

pytestmark = pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")


@dataclasses.dataclass
class Backward:
    """What the backward of a node is given, and what it should make of that; dz is rounded to bfloat16."""

    xs: list[Tensor]
    weight: Tensor
    dy: Tensor
    z: Tensor
    norm: tuple[Tensor, ...]  # mean, variance, weight, bias, sums of dy and of dy * x_hat
    residual: bool

    @classmethod
    def of(cls, channels, out_channels, size, layout, residual=False, dtype=torch.bfloat16):
        xs, (weight, _, gamma, beta, var) = node(channels, out_channels, size, layout, dtype)
        of_output = torch.empty(size[0], out_channels, *size[1:])
        dy, z = (
            torch.randn_like(of_output).to(dtype).contiguous(memory_format=parity.LAYOUTS[layout]) for _ in range(2)
        )
        mean = torch.randn(out_channels)
        x_hat = (z.float() - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
        sums = [dy.float().sum((0, 2, 3)), (dy.float() * x_hat).sum((0, 2, 3))]
        return cls(xs, weight, dy, z, (mean, var, gamma, beta, *sums), residual)

    def run(self, need_dx: list[bool] | None = None, need_dw: bool = True) -> list[Tensor]:
        count, inputs = self.z.numel() // self.z.shape[1], len(self.xs)
        dxs, _, dw, *_ = torch.ops.dla_fast_cpu.conv_norm_act_backward(
            self.dy,
            self.xs,
            [],
            self.weight,
            None,
            self.z,
            *self.norm,
            [1] * inputs,
            1,
            1,
            1,
            0 if self.residual else -1,
            count,
            1e-5,
            "identity",
            0.0,
            [True] * inputs if need_dx is None else need_dx,
            [],
            need_dw,
            False,
        )
        return [*dxs, dw]

    def expected(self) -> list[Tensor]:
        mean, var, gamma, _, sum_dy, sum_dy_xhat = (t.double().view(-1, 1, 1) for t in self.norm)
        dy, z, count = self.dy.double(), self.z.double(), self.z.numel() // self.z.shape[1]
        rstd = (var + 1e-5).rsqrt()
        dz = gamma * rstd * (dy - sum_dy / count - (z - mean) * rstd * sum_dy_xhat / count)
        if isa() in PRODUCTS:
            dz = dz.to(torch.bfloat16).double()
        self.largest = float(dz.abs().max())
        x = torch.cat(self.xs, 1).double()
        dx = list(
            torch.einsum("nohw,oi->nihw", dz, self.weight.double().flatten(1)).split([x.shape[1] for x in self.xs], 1)
        )
        if self.residual:
            dx[0] = dx[0] + dy
        return [*dx, torch.einsum("nohw,nihw->oi", dz, x)[..., None, None]]

    def check(self, found: list[Tensor], message: str) -> None:
        # dz in float and in double round differently where they lie next to the middle of two values: a value or so.
        for i, (g, e) in enumerate(zip(found, self.expected(), strict=True)):
            other = float((self.xs[0] if i == len(self.xs) else self.weight).abs().max())
            torch.testing.assert_close(
                g.double(),
                e,
                rtol=2**-8,
                atol=2**-8 * self.largest * other + 1e-5,
                msg=lambda m, i=i: f"{message}, {i}: {m}",
            )


@contextlib.contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Several tiles to sum over, of which the last is not full, and several images in a tile.
BACKWARD_SIZES = (*SIZES, (1, 33, 65), (40, 3, 3), (2, 14, 14))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", BACKWARD_SIZES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_backward_at_every_boundary(poisoned, channels, size, layout):
    for out_channels, threads in zip((1, 15, channels[0], 32, 72, 150), itertools.cycle((1, 2, 3)), strict=False):
        case = Backward.of(channels, out_channels, size, layout, residual=out_channels == channels[0])
        with threads_of(threads):
            found = case.run()
        case.check(found, f"to {out_channels}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True])
def test_backward_of_what_needs_it(poisoned, layout, residual):
    case = Backward.of((40, 31, 64), 40, (2, 9, 9), layout, residual)
    whole = case.run()
    for need in itertools.product((False, True), repeat=4):
        for got, full, wanted in zip(case.run(list(need[:3]), need[3]), whole, need, strict=True):
            assert torch.equal(got, full) if wanted else got.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(("channels", "size"), [((32,), (3, 40, 40)), ((64, 40), (4, 14, 14)), ((256, 96), (1, 7, 7))])
def test_backward_is_the_same_from_run_to_run(layout, threads, channels, size):
    case = Backward.of(channels, 64, size, layout)
    with threads_of(threads):
        first = case.run()
        for _ in range(3):
            assert all(map(torch.equal, case.run(), first))
    with threads_of(1):
        alone = case.run()
    assert all(map(torch.equal, first[:-1], alone[:-1]))
    torch.testing.assert_close(first[-1], alone[-1], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stay_where_they_belong(layout, value):
    case = Backward.of((33, 64), 40, (3, 5, 7), layout)
    expected = case.run()
    case.dy[1, 39, 4, 6] = value
    *dxs, dw = case.run()
    for dx, e in zip(dxs, expected, strict=False):
        assert not dx[1, :, 4, 6].isfinite().any()
        dx[1, :, 4, 6] = e[1, :, 4, 6]
        assert torch.equal(dx, e)
    assert not dw[39].isfinite().any()
    assert torch.equal(dw[:39], expected[-1][:39])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_of_nothing(layout):
    for size in ((0, 5, 5), (2, 0, 5)):
        case = Backward.of((33, 64), 40, size, layout)
        *dxs, dw = case.run()
        assert [dx.shape for dx in dxs] == [x.shape for x in case.xs]
        assert not dw.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [(32, 64), (31, 5), (32, 7)], ids=str)
def test_neighbours_do_not_leak(layout, channels):
    case = Backward.of(channels, 24, (1, 5, 5), layout)
    expected = case.run()
    case.xs, case.weight = [amid_nan(x) for x in case.xs], amid_nan(case.weight)
    case.dy, case.z = amid_nan(case.dy), amid_nan(case.z)
    assert all(map(torch.equal, case.run(), expected))


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512"])
def test_other_products_hold_too(name):
    if isa() != "amx":
        pytest.skip("nothing lesser here than what the other tests have run")
    passes_with(name, __file__)


def test_other_products_with_tiles_hold_too():
    passes_with("amx_emulated", __file__, every=7)
