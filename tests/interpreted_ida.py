"""Triton's kernels of the IDA ladders in the interpreter: test_triton.py starts this file in its own process."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch

from dla_fast import functional, models, nn, ops, use_backend
from dla_fast.kernels import config, conv_norm_act, host, launch, upsample
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

DTYPES = (torch.float64, torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("triton"):
        yield


def check(op: str, specs) -> None:
    pool = parity.Pool()
    for spec in specs:
        pool.add(parity.PROBLEMS[op](spec))
    assert pool.cases
    assert not pool.failures(), "\n" + pool.failures()


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["upsample", "upsample_add"])
def test_parity_of_upsampling(op, dtype, layout):
    sizes = ((24, 1, 3), (5, 7, 4))
    factors = (4, 4) if op == "upsample_add" else (2, 3) if layout == "contiguous" else (3, 2)
    check(
        op,
        (
            Spec(dtype=dtype, layout=layout, out_channels=c, height=h, width=w, factor=f, seed=h)
            for f, (c, h, w) in zip(factors, sizes, strict=True)
        ),
    )


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("on_load", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_parity_of_the_node(monkeypatch, kernel, on_load, layout):
    if not on_load:
        monkeypatch.setattr(conv_norm_act, "ON_LOAD_PIXELS", 0)
    config.install({})  # forgets plans
    modes = [("relu", True), ("silu", False), ("silu", True)][: 3 if kernel == 1 else 2]
    # Gradients by differences cover float64.
    for dtype in (torch.float32, torch.float16) if on_load and kernel == 1 else (torch.float32,):
        check(
            "merge",
            (
                Spec(
                    dtype=dtype,
                    layout=layout,
                    kernel=kernel,
                    channels=(5, 17),
                    out_channels=24,
                    height=3,
                    width=4,
                    act=act,
                    training=training,
                    conv_bias=training,
                    seed=seed,
                )
                for seed, (act, training) in enumerate(modes)
            ),
        )


@pytest.mark.parametrize("op", ["upsample", "upsample_add", "merge"])
def test_gradients_by_differences(op):
    options = {"channels": (1, 1), "out_channels": 1, "batch": 1, "height": 1, "width": 2, "kernel": 3}
    spec = Spec(dtype=torch.float64, act="silu", **options)
    with launch.count() as names:
        run, inputs = parity.gradient_function(parity.PROBLEMS[op](spec))
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        # Nine taps take nine times as long, and what is differentiated twice is not the kernels' product.
        run, inputs = parity.gradient_function(parity.PROBLEMS[op](replace(spec, kernel=1)))
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert {"backward_kernel", "weight_gradient_kernel"} <= set(names)


def tensors(kernel=3):
    x, low = torch.randn(2, 16, 4, 4, requires_grad=True), torch.randn(2, 16, 2, 2, requires_grad=True)
    up = torch.randn(16, 1, 4, 4, requires_grad=True)
    weight = torch.randn(16, 32, kernel, kernel, requires_grad=True)
    gamma, beta = (torch.randn(16, requires_grad=True) for _ in range(2))
    return [x, low], [weight, gamma, beta, torch.zeros(16), torch.ones(16)], [None, (up, 2)]


def test_upsampling_is_one_launch_and_its_backward_two():
    (x, low), _, (_, (up, f)) = tensors()
    with launch.count() as names:
        y = functional.upsample_add(low, x, up, f)
    assert names == ["upsample_kernel"]
    with launch.count() as names:
        torch.autograd.grad(y.sum(), [low, x, up], retain_graph=True)
    assert names == ["backward_kernel", "weight_gradient_kernel"]
    with launch.count() as names:
        torch.autograd.grad(y.sum(), [low])
    # Which gradients are needed is known from the call, not from what is asked for now.
    assert names == ["backward_kernel", "weight_gradient_kernel"]
    up.requires_grad_(False)
    y = functional.upsample(low, up, f)
    with launch.count() as names:
        y.sum().backward()
    assert names == ["backward_kernel"]


@pytest.mark.parametrize("kernel", [1, 3])
def test_launches_of_the_node(monkeypatch, kernel):
    xs, rest, ups = tensors(kernel)
    with torch.no_grad(), launch.count() as names:
        functional.merge(xs, *rest, training=False, upsample=ups)
    assert names == ["inference_kernel"]
    with launch.count() as names:
        y = functional.merge(xs, *rest, training=True, upsample=ups)
    assert names == ["stage_kernel", "finalise_kernel", "tail_kernel"]
    with launch.count() as names:
        y.sum().backward()
    assert names[:2] == ["reduce_kernel", "reduce_sum_kernel"]
    assert names[-2:] == ["backward_kernel", "weight_gradient_kernel"]
    monkeypatch.setattr(conv_norm_act, "ON_LOAD_PIXELS", 0)
    config.install({})  # forgets plans
    with torch.no_grad(), launch.count() as names:
        functional.merge(xs, *rest, training=False, upsample=ups)
    assert names == (["inference_kernel"] if kernel == 1 else ["upsample_kernel", "inference_kernel"])


def test_offsets_of_64_bits(monkeypatch):
    """As where a tensor passes 2^31 values: to the bit the same."""

    def run():
        torch.manual_seed(1)
        xs, rest, ups = tensors()
        leaves = [*xs, ups[1][0], *rest[:3]]
        y = functional.merge(xs, *rest, training=True, upsample=ups)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    expected = run()
    monkeypatch.setattr(host, "_LARGE", 0)
    monkeypatch.setattr(upsample, "_LARGE", 0)
    config.install({})  # forgets plans
    assert all(torch.equal(a, b) for a, b in zip(expected, run(), strict=True))


def test_empty_batches():
    xs, rest, ups = tensors()
    xs = [x[:0].detach().requires_grad_() for x in xs]
    y = functional.merge(xs, *rest, training=True, upsample=ups)
    grads = torch.autograd.grad(y.sum(), [*xs, ups[1][0], rest[0]])
    assert all(g.abs().sum() == 0 for g in grads)
    assert functional.upsample(xs[1], *ups[1]).shape == (0, 16, 4, 4)


def run_both(module, make):
    """Outputs and gradients on Triton and on the reference."""
    outcomes = []
    for name in ("triton", "reference"):
        twin, leaves = copy.deepcopy(module), make()
        with use_backend(name), launch.count() as names:
            y = twin(leaves)
            y = y[0] if isinstance(y, tuple) else y
            grads = torch.autograd.grad(y.square().mean(), [p for p in twin.parameters() if p.requires_grad])
        assert bool(names) == (name == "triton")
        outcomes.append([y, *grads])
    return outcomes


def test_ladders_end_to_end():
    module = nn.DLAUp((8, 12, 16)).double()
    torch.manual_seed(2)
    layers = [torch.randn(1, c, 8 >> i, 8 >> i, dtype=torch.float64) for i, c in enumerate((8, 12, 16))]
    for mine, expected in zip(*run_both(module, lambda: layers), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.skipif("DLA_FAST_SLOW_TESTS" not in os.environ, reason="takes minutes: DLA_FAST_SLOW_TESTS=1 runs it")
def test_dla34up_end_to_end():
    # Evaluation statistics: one image of this size has one value a channel at its coarsest level.
    module = models.create_model("dla34up", classes=2, down_ratio=4).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for mine, expected in zip(*run_both(module, lambda: images), strict=True):
        scale = expected.abs().max().clamp_min(1e-12)
        assert ((mine - expected).abs().max() / scale).item() < 1e-8


def test_the_operators_are_registered():
    assert ops.missing("triton", "merge") is None
    assert ops.missing("triton", "upsample_add") is None
