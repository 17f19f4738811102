"""The contract as code: how its problems are drawn."""

from __future__ import annotations

import pytest
import torch

from dla_fast import reference
from dla_fast.commands import parity
from dla_fast.commands.parity import Spec

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", list(parity.PROBLEMS))
def test_values_drawn_on_a_device_lie_there_and_are_exact(op, dtype):
    spec = Spec(dtype, act="hardswish", residual=op != "merge", conv_bias=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    host, drawn, shapes = (parity.PROBLEMS[op](spec, device) for device in (None, "cpu", "meta"))
    for name, t in host.tensors.items():
        assert t.dtype == torch.float64
        for problem in (drawn, shapes):
            other = problem.tensors[name]
            assert (other.shape, other.dtype, other.device) == (t.shape, wide, problem.device)
        values = drawn.tensors[name]
        assert torch.equal(values.to(drawn.dtypes[name]).to(wide), values)
        assert name == "running_var" or values.numel() < 100 or 0.5 < values.std() / t.std() < 2
    dy = parity.safe_gradient(drawn, torch.device("cpu"))
    assert dy.dtype == wide
    assert torch.equal(dy.to(dtype).to(wide), dy)
    assert all(t.isfinite().all() for t in parity.execute(drawn, reference, dy, torch.float64).values())
    again = parity.PROBLEMS[op](spec, "cpu").tensors
    assert all(torch.equal(t, again[name]) for name, t in drawn.tensors.items())


@pytest.mark.parametrize("op", list(parity.PROBLEMS))
def test_meta_tensors_stand_for_shapes(op):
    meta = torch.device("meta")
    problem = parity.PROBLEMS[op](Spec(torch.bfloat16, batch=256), meta)
    found = parity.execute(problem, reference, parity.safe_gradient(problem, meta), None)
    assert all(t.is_meta for t in found.values())
