"""Products of float32 under the switch, in the interpreter: test_triton.py starts this file in its own process.

The kernels round operands in integer arithmetic, which the interpreter runs as a GPU does, so its results carry the
very error that TF32 will have there.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dla_fast import use_backend
from dla_fast.commands import verify
from dla_fast.kernels import config, conv_norm_act, launch, product, product_backward, tile
from dla_fast.proof import parity, tf32
from dla_fast.proof.parity import Spec


@pytest.fixture(autouse=True)
def _switched_on():
    with use_backend("triton"), parity.fp32_precision("tf32"):
        yield


@triton.jit
def round_kernel(x, y, size: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, size)
    tl.store(y + i, tile.tf32(tl.load(x + i), PRECISION))


@triton.jit
def cut(x, PRECISION: tl.constexpr):
    """What a matrix unit makes of operands that nobody rounded."""
    if PRECISION == "tf32":
        x = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return x


def rounded(x: torch.Tensor, precision: str = "tf32") -> torch.Tensor:
    y = torch.empty_like(x)
    round_kernel[(1,)](x, y, x.numel(), precision)
    return y


def some_floats() -> np.ndarray:
    """Bit patterns of all kinds: ties and their neighbours, denormals, the ends of the range, infinities, NaN."""
    special = [0, 0x1000, 0x0FFF, 0x1001, 0x2000, 0x3000, 0x7FFFFF, 0x7FEFFF, 0x7FF000, 0x800000, 0x3F800000]
    special += [0x3F801000, 0x3F800FFF, 0x3F801001, 0x3F803000, 0x3FFFF000, 0x3FFFEFFF, 0x7F7FEFFF, 0x7F7FF000]
    special += [0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7FBFFFFF]
    patterns = np.array([*special, *(0x80000000 | s for s in special)], np.uint32)
    drawn = np.random.default_rng(0).integers(0, 2**32, 2**13 - len(patterns), np.uint32)
    return np.concatenate([patterns, drawn]).view(np.float32)


def test_rounds_to_nearest_and_ties_away_from_zero():
    x = some_floats()
    mine = rounded(torch.from_numpy(x)).numpy()
    numbers = np.isfinite(x)
    exact = np.where(numbers, x, 0).astype(np.float64)
    # The distance of TF32's neighbours: ten bits behind the leading one, of denormals those of the smallest normal.
    unit = np.exp2(np.maximum(np.frexp(exact)[1] - 1, -126) - 10.0)
    with np.errstate(over="ignore"):
        expected = np.copysign(np.trunc(np.abs(exact) / unit + 0.5) * unit, exact).astype(np.float32)
    expected = np.where(numbers, expected, x)
    assert np.isinf(expected[numbers]).any()
    assert np.array_equal(mine.view(np.uint32), expected.view(np.uint32))
    yardstick = tf32.rounded(torch.from_numpy(x)).numpy()
    assert np.array_equal(mine.view(np.uint32), yardstick.view(np.uint32))


def test_leaves_alone_what_is_not_multiplied_as_tf32():
    x = torch.from_numpy(some_floats())
    assert torch.equal(rounded(x, "ieee").view(torch.int32), x.view(torch.int32))
    for dtype in (torch.float64, torch.float16):
        values = torch.randn(64, dtype=dtype)
        assert torch.equal(rounded(values), values)


# A depth of many terms; masks; float32's own tiles for the fused backward, and one pass each for dx and dW.
AGGREGATE = {"channels": (64, 24, 5), "out_channels": 64, "height": 9, "width": 11}
MERGE = {"channels": (17, 24), "out_channels": 24, "height": 4, "width": 5}


def specs(op: str, **changes) -> list[Spec]:
    options = AGGREGATE if op == "aggregate" else MERGE
    return [
        Spec(layout=layout, act=act, training=training, residual=act == "silu", seed=seed, **{**options, **changes})
        for seed, (layout, (act, training)) in enumerate(
            itertools.product(parity.LAYOUTS, (("relu", True), ("silu", False), ("silu", True)))
        )
    ]


def pooled(op: str, cases: list[Spec]) -> parity.Pool:
    pool = parity.Pool()
    with launch.count() as names:
        for spec in cases:
            pool.add(parity.PROBLEMS[op](spec))
    assert "stage_kernel" in names
    return pool


@functools.cache
def right(op: str, kernel: int) -> parity.Pool:
    """What the kernels give as they are, for whoever needs it."""
    config.install({})  # forgets plans
    return pooled(op, specs(op, kernel=kernel))


@pytest.mark.parametrize(("op", "kernel"), [("aggregate", 1), ("merge", 1), ("merge", 3)])
@pytest.mark.parametrize("split", [False, True])
def test_no_worse_than_rounded_operands(monkeypatch, op, kernel, split):
    if split:
        monkeypatch.setattr(config, "fits_fused", lambda *args: False)
        monkeypatch.setattr(conv_norm_act, "ON_LOAD_PIXELS", 0)
    config.install({})  # forgets plans
    # Both layouts and all three modes are among every second.
    pool = pooled(op, specs(op, kernel=kernel)[::2]) if split else right(op, kernel)
    assert pool.worst() < 0.75, pool.failures() or pool.errors
    # It is TF32 that was measured.
    rows = {norm: (error, peer) for norm, error, peer, _ in pool.errors["y"].rows()}
    assert all(1e-6 < value < 1e-3 for pair in rows.values() for value in pair)


@pytest.mark.parametrize("op", ["aggregate", "merge"])
def test_operands_that_are_cut_off_miss_the_bound(monkeypatch, op):
    exact = right(op, 1)
    for part in (product, product_backward):
        monkeypatch.setattr(part, "tf32", cut)
    wrong = pooled(op, specs(op, kernel=1))
    ratios = {
        name: wrong.errors[name].rows()[1][1] / exact.errors[name].rows()[1][1] for name in ("y", "d x0", "d weight")
    }
    assert all(ratio > 1.5 for ratio in ratios.values()), ratios
    assert ratios["y"] > 1.8
    assert "y (" in wrong.failures()
    assert "running_var (rms)" in wrong.failures()


@pytest.mark.parametrize("op", ["aggregate", "merge"])
def test_exact_without_the_switch(op):
    with parity.fp32_precision("ieee"):
        pool = pooled(op, specs(op)[:3])
    assert not pool.failures(), pool.failures()
    assert all(error < 1e-6 for e in pool.errors.values() for _, error, _, _ in e.rows())


def test_ops_without_products_do_not_follow_the_switch():
    for op in ("batch_norm_act", "upsample", "upsample_add"):
        pool = parity.Pool()
        pool.add(parity.PROBLEMS[op](Spec()))
        assert not pool.failures()
        assert all(error < 1e-6 for e in pool.errors.values() for _, error, _, _ in e.rows())


def test_verify_does_both():
    found = [job for job in verify.jobs(["aggregate"]) if job.backend == "triton" and job.dtype == torch.float32]
    assert [job.label for job in found] == ["aggregate triton float32", "aggregate triton tf32"]
    assert not [job for job in verify.jobs(["upsample"]) if job.tf32]
    assert not [job for job in verify.jobs() if job.tf32 and job.backend != "triton"]
