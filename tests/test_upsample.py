"""Parity, gradients and contracts of ``upsample`` and ``upsample_add``, per backend."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dla_fast import backend, functional, ops, use_backend
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

BACKENDS = [name for name in ("cpu",) if backend.can_run(name, "upsample", "cpu", torch.float32) is None]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FACTORS = (2, 3, 4, 5, 8, 16)
OPS = ("upsample", "upsample_add")


@pytest.fixture(params=BACKENDS)
def served(request):
    with use_backend(request.param):
        yield request.param


def check(op: str, specs: Iterable[Spec]) -> None:
    pool = parity.Pool()
    for spec in specs:
        pool.add(parity.PROBLEMS[op](spec))
    assert pool.cases
    assert not pool.failures(), "\n" + pool.failures()


def test_cpu_kernels_are_built():
    assert BACKENDS == ["cpu"], backend.can_run("cpu", "upsample", "cpu", torch.float32)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", FACTORS)
def test_parity(served, poisoned, op, dtype, layout, factor):
    sizes = ((1, 1, 1), (2, 1, 3), (1, 17, 1), (2, 3, 5), (1, 7 if factor < 8 else 2, 31))
    check(
        op,
        (
            Spec(dtype=dtype, layout=layout, out_channels=c, batch=b, height=h, width=w, factor=factor, seed=seed)
            for seed, (c, (b, h, w)) in enumerate(itertools.product((1, 5, 24, 70), sizes))
        ),
    )


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("factor", [2, 3])
def test_parity_of_large_maps(served, layout, factor):
    """Longer than any block the kernels work in."""
    check("upsample", [Spec(layout=layout, out_channels=130, batch=2, height=40, width=150, factor=factor)])


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("factor", [2, 3, 4, 8, 16])
def test_is_the_transposed_convolution(served, layout, factor):
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64).to(memory_format=parity.LAYOUTS[layout])
    weight = torch.randn(6, 1, 2 * factor, 2 * factor, dtype=torch.float64)
    y = functional.upsample(x, weight, factor)
    expected = F.conv_transpose2d(x, weight, stride=factor, padding=factor // 2, groups=6)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    assert y.is_contiguous(memory_format=parity.LAYOUTS[layout])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("factor", [2, 3])
def test_gradcheck(served, op, layout, factor):
    spec = Spec(dtype=torch.float64, layout=layout, out_channels=2, batch=2, height=2, width=3, factor=factor)
    run, inputs = parity.gradient_function(parity.PROBLEMS[op](spec))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
def test_only_what_is_needed_is_computed(served, layout):
    x = torch.randn(2, 3, 4, 5).to(memory_format=parity.LAYOUTS[layout])
    weight, skip = torch.randn(3, 1, 4, 4), torch.randn(2, 3, 8, 10)
    tensors = {"x": x, "weight": weight, "skip": skip}
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y = functional.upsample_add(leaves["x"], leaves["skip"], leaves["weight"], 2)
    every = dict(zip(leaves, torch.autograd.grad(y.square().sum(), list(leaves.values())), strict=True))
    for name in tensors:
        alone = {**tensors, name: tensors[name].clone().requires_grad_()}
        with FlopCounterMode(display=False) as counter:
            y = functional.upsample_add(alone["x"], alone["skip"], alone["weight"], 2)
            y.square().sum().backward()
        torch.testing.assert_close(alone[name].grad, every[name])
        products = 8 * 4 * x.numel()
        assert counter.get_total_flops() == y.numel() + products * (1 if name == "skip" else 2)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
def test_opcheck(served, layout):
    namespace = ops.namespace(served)
    x = torch.randn(2, 3, 4, 5).to(memory_format=parity.LAYOUTS[layout])
    weight, skip = torch.randn(3, 1, 6, 6), torch.randn(2, 3, 13, 16)
    opcheck(namespace.upsample_backward.default, (skip, x, weight, 3, True, False))
    opcheck(namespace.upsample_backward.default, (skip, x, weight, 3, False, True))
    x.requires_grad_()
    weight.requires_grad_()
    opcheck(namespace.upsample.default, (x, weight, 3))
    opcheck(namespace.upsample_add.default, (x, skip.requires_grad_(), weight, 3))


def test_compile_fullgraph(served):
    torch._dynamo.reset()
    x, weight = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(3, 1, 4, 4, requires_grad=True)
    skip = torch.randn(2, 3, 8, 10, requires_grad=True)

    def run(x, skip, weight):
        return functional.upsample(x, weight, 2) * functional.upsample_add(x, skip, weight, 2)

    outcomes = []
    for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        y = fn(x, skip, weight)
        outcomes.append([y, *torch.autograd.grad(y.sum(), [x, skip, weight])])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_empty(served, size):
    x, weight = torch.randn(size, requires_grad=True), torch.randn(size[1], 1, 4, 4, requires_grad=True)
    y = functional.upsample(x, weight, 2)
    assert y.shape == (*size[:2], 8, 10)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_autocast_casts_as_for_a_convolution(served):
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(2, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.upsample(x, weight, 2)
    assert y.dtype == torch.bfloat16


def test_repeats_bitwise_on_any_number_of_threads(served):
    x, weight = torch.randn(2, 16, 31, 17, requires_grad=True), torch.randn(16, 1, 4, 4, requires_grad=True)
    outcomes = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        try:
            y = functional.upsample(x.to(memory_format=torch.channels_last), weight, 2)
            outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, weight])])
        finally:
            torch.set_num_threads(1)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_bad_input_names_the_argument():
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match="factor: expected an integer >= 2, got 1"):
        functional.upsample(x, weight, 1)
    with pytest.raises(TypeError, match=r"factor: expected an integer >= 2, got 2\.0"):
        functional.upsample(x, weight, 2.0)
    with pytest.raises(ValueError, match=r"weight: expected shape \(2, 1, 6, 6\)"):
        functional.upsample(x, weight, 3)
    with pytest.raises(ValueError, match=r"skip: expected shape \(1, 2, 6, 6\)"):
        functional.upsample_add(x, torch.randn(1, 2, 6, 5), weight, 2)
