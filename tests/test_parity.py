"""The contract as code: how its problems are drawn."""

from __future__ import annotations

import pytest
import torch

from dla_fast import reference
from dla_fast.commands import verify
from dla_fast.proof import parity, tf32
from dla_fast.proof.parity import Spec

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


def test_products_with_rounded_operands():
    """TF32's error in convolutions and their gradients, and none in what multiplies nothing or doubles."""
    x, weight = torch.randn(2, 8, 4, 5, requires_grad=True), torch.randn(6, 8, 3, 3, requires_grad=True)
    dy = torch.randn(2, 6, 4, 5)
    exact = torch.nn.functional.conv2d(tf32.rounded(x.detach()), tf32.rounded(weight.detach()), padding=1)
    with tf32.RoundedProducts():
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        found = torch.autograd.grad(y, (x, weight), dy)
        up = torch.nn.functional.conv_transpose2d(x, weight.detach().transpose(0, 1))
        double = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    assert torch.equal(y, exact)
    operands = [tf32.rounded(t.detach()).requires_grad_() for t in (x, weight)]
    y = torch.nn.functional.conv2d(*operands, padding=1)
    for mine, expected in zip(found, torch.autograd.grad(y, operands, tf32.rounded(dy)), strict=True):
        assert torch.equal(mine, expected)
    assert torch.equal(up, torch.nn.functional.conv_transpose2d(x, weight.detach().transpose(0, 1)))
    assert torch.equal(double, torch.nn.functional.conv2d(x.double(), weight.double(), padding=1))


def test_the_switch_is_put_back():
    before = torch.backends.cudnn.conv.fp32_precision
    for precision in ("ieee", "tf32"):
        with pytest.raises(ZeroDivisionError), parity.fp32_precision(precision):
            1 / (torch.backends.cudnn.conv.fp32_precision != precision)
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_jobs_of_verify():
    jobs = verify.jobs(["aggregate", "upsample"])
    assert {"aggregate", "upsample"} == {job.op for job in jobs}
    assert {"float64", "float32", "gradcheck"} <= {job.kind for job in jobs}
    # Nothing on the CPU multiplies as TF32.
    assert not any(job.tf32 for job in jobs if job.device == "cpu")
    op, backend, device, dtype = jobs[0]
    assert (op, backend, device, dtype) == (jobs[0].op, jobs[0].backend, jobs[0].device, jobs[0][3])
    row = verify.check(jobs[-1])
    assert row.ok
    assert row.dtype == jobs[-1].kind
