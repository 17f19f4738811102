"""The counting of bytes behind benchmarks.gates.traffic, run in the interpreter: test_triton.py starts this file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from benchmarks.gates import passes as _passes
from benchmarks.gates import traffic
from benchmarks.gates.counting import counting
from benchmarks.gates.passes import Unit
from dla_fast.bench import Case
from dla_fast.kernels import tail


@triton.jit
def copy_kernel(x, y, size, B: tl.constexpr, TWICE: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    value = tl.load(x + i, mask=i < size)
    if TWICE:
        value = value + tl.load(x + i, mask=i < size)
    tl.store(y + i, value, mask=i < size)


@triton.jit
def block_kernel(x, y, rows, columns, B: tl.constexpr):
    block = tl.make_block_ptr(x, (rows, columns), (columns, 1), (0, 0), (B, B), (1, 0))
    tl.store(
        tl.make_block_ptr(y, (rows, columns), (columns, 1), (0, 0), (B, B), (1, 0)),
        tl.load(block, boundary_check=(0, 1)),
        boundary_check=(0, 1),
    )


@triton.jit
def atomic_kernel(x):
    tl.atomic_add(x, 1.0)


def node(**options) -> Unit:
    case = Case("node", (16, 8), 16, 8, 8, **options)
    return Unit(case, 4, torch.float32, "channels_last")


def test_known_traffic():
    x, y = torch.ones(100), torch.empty(100)
    with counting() as passes:
        copy_kernel[(4,)](x, y, 90, B=32, TWICE=False)
        copy_kernel[(4,)](x, y, 90, B=32, TWICE=True)
    once, twice = passes
    assert (once.kernel, once.programs) == ("copy_kernel", 4)
    # What the mask leaves out is not moved.
    assert (once.operand("x").read, once.operand("y").written) == (360, 360)
    assert once.operand("x").moved == twice.operand("x").moved == 360
    # A repeated load is issued and not moved.
    assert (once.operand("x").issued, twice.operand("x").issued) == (360, 720)
    assert (y[:90] == 2).all()


def test_block_pointers_count_too():
    x, y = torch.ones(5, 7, dtype=torch.float16), torch.empty(5, 7, dtype=torch.float16)
    with counting() as passes:
        block_kernel[(1,)](x, y, 5, 7, B=8)
    assert (passes[0].operand("x").read, passes[0].operand("y").written) == (70, 70)


def test_what_cannot_be_counted_is_an_error():
    with counting(), pytest.raises(Exception, match="atomic operations are not counted"):
        atomic_kernel[(1,)](torch.zeros(1))
    with counting() as passes:
        copy_kernel[(1,)](torch.ones(8), torch.empty(8), 8, B=8, TWICE=False)
    (counted,) = passes
    with pytest.raises(IndexError, match="outside of every operand"):
        counted.find(np.array([8], dtype=np.uint64), 4)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("mode", _passes.MODES)
def test_an_aggregation_node_moves_its_floor(mode, layout):
    unit = Unit(Case("node", (16, 16), 16, 16, 16, residual=True), 8, torch.float32, layout)
    *kernels, whole = _passes.measure(unit, mode)
    # 8 images of 256 pixels, 4 bytes: what the design's table says, written out.
    values = {"inference": 32 + 16, "forward": (32 + 16) + (2 + 1) * 16, "backward": 3 * 16 + (2 * 16 + 2 * 32)}
    assert whole.floor == 8 * 256 * 4 * values[mode]
    assert not _passes.over([whole], traffic.LIMIT), whole
    assert all(r.issued >= r.moved for r in kernels)
    assert sum(r.weights for r in kernels) > 0


@pytest.mark.parametrize(
    ("case", "mode", "values"),
    [
        (Case("up", (8,), 8, 16, 16, op="upsample"), "forward", (1 + 4) * 8 / 4),
        (Case("up", (8,), 8, 16, 16, op="upsample"), "backward", (2 + 4) * 8 / 4),
        (Case("add", (8,), 8, 16, 16, op="upsample_add"), "forward", (1 + 8) * 8 / 4),
        (Case("norm", (8,), 8, 16, 16, op="batch_norm_act"), "backward", 5 * 8),
        (Case("link", (32,), 16, 16, 16, op="chain"), "forward", 32 + 16),
        (Case("link", (32, 16), 16, 16, 16, op="chain", residual=True), "forward", 32 + 16 + 16 + 32),
        (Case("link", (32, 16), 16, 16, 16, op="chain", residual=True), "backward", 3 * 32 + 2 * 16 + 2 * 48 + 4 * 32),
        (Case("link", (32,), 16, 16, 16, op="chain", residual=True), "backward", 2 * 16 + 2 * 32 + 32),
        (Case("norm", (8,), 8, 16, 16, op="batch_norm_act", residual=True), "forward", 4 * 8),
        (Case("ida", (8, 8), 8, 16, 16, op="merge", kernel=3), "inference", 8 + 8 / 4 + 8),
    ],
    ids=str,
)
def test_the_other_ops_move_their_floor(case, mode, values):
    whole = _passes.measure(Unit(case, 2, torch.float32, "channels_last"), mode)[-1]
    assert whole.floor == 2 * 256 * 4 * values
    assert whole.ratio == pytest.approx(1, abs=0.05)


def test_a_node_that_upsamples_first_is_held_to_two_passes(monkeypatch):
    monkeypatch.setattr(_passes.conv_norm_act, "ON_LOAD_PIXELS", 0)
    case = Case("ida", (8, 8), 8, 16, 16, op="merge", kernel=3)
    rows = _passes.measure(Unit(case, 2, torch.float32, "channels_last"), "inference")
    assert [r.what for r in rows] == ["inference: upsample_kernel", "inference: inference_kernel", "inference"]
    assert rows[-1].floor == 2 * 256 * 4 * ((8 / 4 + 8) + (16 + 8))


def test_an_extra_load_fails(monkeypatch, capsys):
    """A tail that reads one more map than it has to."""
    right = tail.tail

    def wasteful(z, mean, var, gamma, beta, residual, *rest):
        return right(z, mean, var, gamma, beta, torch.ones_like(z) if residual is None else residual, *rest)

    monkeypatch.setattr(tail, "tail", wasteful)
    whole = _passes.measure(node(), "forward")[-1]
    assert whole.ratio > traffic.LIMIT
    assert _passes.over([whole], traffic.LIMIT) == [whole]
    assert "over" in traffic.table([whole])


def test_less_than_the_floor_is_no_result():
    row = _passes.Row("node", "forward", moved=90.0, floor=100.0, weights=0.0, issued=90.0, gated=True)
    assert _passes.over([row], traffic.LIMIT) == [row]


def test_other_kernels_than_at_the_real_size_are_an_error(monkeypatch):
    monkeypatch.setattr(_passes, "counted_passes", lambda *args: [])
    with pytest.raises(RuntimeError, match="should have run in inference"):
        _passes.measure(node(), "inference")


def test_the_command(capsys):
    arguments = ["--suites", "roots", "--networks", "dla34", "--layouts", "channels_last", "--modes", "inference"]
    assert traffic.main([*arguments, "--only", "64+64 -> 64", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 passes of 1 ops within 1.05 of the floor; worst 1.000" in out
    assert traffic.main(["--only", "no such op"]) == 2
    everything = traffic.units(traffic.SUITES, traffic.NETWORKS, ["channels_last"], "bfloat16")
    assert {u.case.op for u in everything} == {
        "aggregate",
        "merge",
        "upsample",
        "upsample_add",
        "batch_norm_act",
        "chain",
    }
    assert len(everything) > 60
