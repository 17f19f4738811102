"""Parity, gradients and contracts of ``batch_norm_act``, per backend: the shared tail on its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from serving import DTYPES, INTERPRETED, served_by, thinned

from dla_fast import functional, reference
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

served = served_by("batch_norm_act")
ACTS = ("relu", "identity", "silu", "leaky_relu", "hardswish")
SIZES = ((2, 1, 1), (1, 3, 1), (1, 1, 17), (1, 31, 1), (1 if INTERPRETED else 3, 17, 31))


def check(specs: Iterable[Spec]) -> None:
    pool = parity.Pool()
    for spec in specs:
        pool.add(parity.batch_norm_act(spec))
    assert not pool.failures(), "\n" + pool.failures()


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity(served, dtype, layout, size):
    batch, height, width = size
    common = {"dtype": dtype, "layout": layout, "batch": batch, "height": height, "width": width}
    cases = itertools.product((1, 5, 24, 64), ACTS, (False, True), (True, False))
    # The smallest maps need a pool: two values of a channel can be close to each other in one draw.
    keep = 4 if height * width < 17 else 13
    check(
        Spec(**common, out_channels=channels, act=act, residual=residual, training=training, seed=seed)
        for seed, (channels, act, residual, training) in thinned(enumerate(cases), keep)
    )


def test_parity_over_many_tiles(served):
    sizes = ((300, 5), (3, 100), (40, 30))
    check(
        Spec(layout=layout, out_channels=channels, height=height, width=100, residual=True)
        for layout, (channels, height) in thinned(itertools.product(parity.LAYOUTS, sizes), 3)
    )


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_gradcheck(served, layout, training, act):
    spec = Spec(
        dtype=torch.float64, layout=layout, out_channels=3, height=2, width=3, act=act, training=training, residual=True
    )
    run, inputs = parity.gradient_function(parity.batch_norm_act(spec))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=INTERPRETED)


def test_compile_fullgraph(served):
    torch._dynamo.reset()
    x = torch.randn(2, 4, 3, 5, requires_grad=True)
    gamma, beta = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)

    def run(x, mean, var):
        return functional.batch_norm_act(x, gamma, beta, mean, var, training=True, residual=x, act="silu")

    outcomes = []
    for fn in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        mean, var = torch.zeros(4), torch.ones(4)
        y = fn(x, mean, var)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), [x, gamma, beta]), mean, var])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


def test_moments_far_from_zero(served):
    for layout in parity.LAYOUTS.values():
        z = (torch.randn(2 if INTERPRETED else 8, 16, 56, 56) + 1000.0).to(memory_format=layout)
        mean, var = getattr(torch.ops, f"dla_fast_{served}").moments(z, None, None, 0.1)
        exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
        assert ((var - exact_var).abs() / exact_var).max() < 1e-6
        assert ((mean - exact_mean).abs() / exact_mean).max() < 1e-7


def test_empty_batch(served):
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    gamma, beta = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    functional.batch_norm_act(x, gamma, beta, mean, var, training=True).sum().backward()
    assert torch.equal(gamma.grad, torch.zeros(3))
    assert torch.equal(mean, torch.zeros(3))


def test_input_is_not_written(served):
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    for training in (True, False):
        functional.batch_norm_act(x, None, None, torch.zeros(3), torch.ones(3), training=training)
    assert torch.equal(x, before)
    expected = reference.batch_norm_act(x, None, None, None, None, training=True)
    torch.testing.assert_close(functional.batch_norm_act(x, None, None, None, None, training=True), expected)
