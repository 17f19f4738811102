"""Parity, gradients and contracts of ``aggregate``, per backend."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import DTYPES, HALF, INTERPRETED, NAMES, backends, served_by, thinned
from torch import Tensor

from dla_fast import backend, functional, reference
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

served = served_by("aggregate")
ACTS = ("relu", "identity", "silu", "leaky_relu", "hardswish")
# Odd everything: 1, 3, 17 and 31 pixels, channels 1, 5, 24 and 64, one to eight inputs. Fewer than three values per
# channel would only compare luck: the norm then divides by a difference of two roundings.
SHAPES = (
    {"channels": (24,), "out_channels": 24, "batch": 9, "height": 1, "width": 1},
    {"channels": (5, 1), "out_channels": 5, "batch": 1, "height": 3, "width": 1},
    {"channels": (64, 24, 5), "out_channels": 64, "batch": 1, "height": 1, "width": 17},
    {"channels": (1, 5, 24, 64, 24, 5, 1, 64), "out_channels": 1, "batch": 1, "height": 31, "width": 1},
    {"channels": (24, 64), "out_channels": 24, "batch": 1 if INTERPRETED else 3, "height": 17, "width": 31},
)


def shape_id(shape: dict) -> str:
    size = "x".join(str(shape[side]) for side in ("batch", "height", "width"))
    return f"{'+'.join(map(str, shape['channels']))}to{shape['out_channels']}at{size}"


def check(specs: Iterable[Spec]) -> None:
    pool = parity.Pool()
    for spec in specs:
        pool.add(parity.aggregate(spec))
    assert not pool.failures(), "\n" + pool.failures()


def test_the_backends_asked_for_are_here():
    assert backends("aggregate") == NAMES, [backend.can_run(n, "aggregate", "cpu", torch.float32) for n in NAMES]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_parity(served, poisoned, dtype, layout, shape):
    residuals = (False, True) if shape["channels"][0] == shape["out_channels"] else (False,)
    # A handful of values says little about an error: small shapes are drawn more often.
    draws = 1 if shape["height"] * shape["width"] > 100 else 8
    cases = itertools.product(range(draws), ACTS, residuals, (True, False))
    check(
        Spec(dtype=dtype, layout=layout, act=act, residual=residual, training=training, seed=seed, **shape)
        for seed, (_, act, residual, training) in thinned(enumerate(cases), 10 if draws == 1 else 34)
    )


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", range(1, 9))
def test_parity_of_one_to_eight_inputs(served, poisoned, dtype, layout, inputs):
    channels = (24, 5, 64, 1, 24, 17, 3, 8)[:inputs]
    check(
        Spec(dtype=dtype, layout=layout, channels=channels, residual=residual, training=training, seed=seed)
        for residual, training, seed in thinned(itertools.product((False, True), (True, False), range(3)), 6, inputs)
    )


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_parity_of_norm_variants(served, poisoned, dtype, layout, training):
    variants = itertools.product((False, True), repeat=3)
    size = {"height": 9, "width": 9, "residual": True}
    check(
        Spec(dtype=dtype, layout=layout, training=training, conv_bias=bias, affine=affine, half_norm=half, **size)
        for bias, affine, half in thinned(variants, 3, offset=2)
    )


def test_parity_of_any_shape(served):
    pools = {dtype: parity.Pool() for dtype in DTYPES}

    @given(
        channels=st.lists(st.integers(1, 70), min_size=1, max_size=8),
        out_channels=st.integers(1, 130),
        batch=st.integers(1, 3),
        height=st.integers(1, 19),
        width=st.integers(2, 19),
        act=st.sampled_from(ACTS),
        residual=st.booleans(),
        training=st.booleans(),
        layout=st.sampled_from(["channels_last", "contiguous"]),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=4 if INTERPRETED else 100, deadline=None, derandomize=True)
    def draw(channels, out_channels, residual, dtype, **rest):
        if residual:
            channels = [out_channels, *channels[1:]]
        spec = Spec(channels=tuple(channels), out_channels=out_channels, residual=residual, dtype=dtype, **rest)
        pools[dtype].add(parity.aggregate(spec))
        assert not (dtype == torch.float64 and pools[dtype].failures()), pools[dtype].failures()

    draw()
    for pool in pools.values():
        assert pool.cases > 0
        assert not pool.failures(), "\n" + pool.failures()


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=shape_id)
def test_inference(served, poisoned, dtype, layout, shape):
    largest = {"error": 0.0, "peer": 0.0}
    residuals = (False, True) if shape["channels"][0] == shape["out_channels"] else (False,)
    for act, residual, bias in thinned(itertools.product(ACTS, residuals, (False, True)), 4):
        options = {"act": act, "residual": residual, "training": False, "conv_bias": bias}
        problem = parity.aggregate(Spec(dtype=dtype, layout=layout, **options, **shape))
        with torch.no_grad():
            exact = problem.call(reference, problem.materialise(torch.float64, torch.device("cpu")), None)
            tensors = problem.materialise(None, torch.device("cpu"))
            peer = problem.call(reference, tensors, None)
            mine = problem.call(functional, tensors, None)
        for name, y in (("error", mine), ("peer", peer)):
            largest[name] = max(largest[name], ((y.double() - exact).abs().max() / exact.abs().max()).item())
    eps = torch.finfo(dtype).eps
    bound = 1e-10 if dtype == torch.float64 else 2 * largest["peer"] + eps / 2
    assert largest["error"] <= bound, largest


def _node(
    channels=(4, 3), out_channels=4, dtype=torch.float64, size=(2, 3, 3), layout=torch.contiguous_format
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    n, h, w = size
    xs = [torch.randn(n, c, h, w, dtype=dtype).to(memory_format=layout) for c in channels]
    weight = torch.randn(out_channels, sum(channels), 1, 1, dtype=dtype)
    norm = [torch.randn(out_channels, dtype=dtype) for _ in range(3)]
    return xs, [weight, *norm[:2]], [norm[2], torch.rand(out_channels, dtype=dtype) + 0.5]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "silu", "hardswish", "leaky_relu"])
def test_gradcheck(served, layout, training, act):
    spec = Spec(
        dtype=torch.float64,
        layout=layout,
        channels=(3, 2),
        out_channels=3,
        height=2,
        width=3,
        act=act,
        training=training,
        residual=True,
        conv_bias=True,
    )
    run, inputs = parity.gradient_function(parity.aggregate(spec))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=INTERPRETED)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=INTERPRETED)


def test_kernels_serve_the_gradients(served, monkeypatch):
    """Parity could pass on the reference: so count what is called."""
    seen: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    xs, params, buffers = _node()
    for t in xs + params:
        t.requires_grad_()
    with Record():
        functional.aggregate(xs, *params, *buffers, training=True).sum().backward()
        with torch.no_grad():
            functional.aggregate(xs, *params, *buffers, training=False)
    space = f"dla_fast_{served}"
    names = [n for n in seen if n.startswith(space)]
    stage, backward, inference = (f"conv_norm_act_{part}" for part in ("stage", "backward", "inference"))
    expected = [stage, "tail", "tail_backward_reduce", backward, inference]
    assert names == [f"{space}::{n}" for n in expected]


def test_only_what_is_needed_is_computed(served):
    xs, params, buffers = _node(channels=(4, 3, 5))
    xs[1].requires_grad_()
    y = functional.aggregate(xs, *params, *buffers, training=True, residual=True)
    (grad,) = torch.autograd.grad(y.square().sum(), [xs[1]])
    xs64 = [x.detach().requires_grad_() for x in xs]
    y = reference.aggregate(xs64, *params, *buffers, training=True, residual=True)
    (expected,) = torch.autograd.grad(y.square().sum(), [xs64[1]])
    torch.testing.assert_close(grad, expected)


def test_expanded_and_sliced_inputs(served):
    xs, params, buffers = _node(channels=(4, 3))
    wide = torch.randn(2, 9, 3, 6, dtype=torch.float64)
    xs = [wide[:, 1:8:2, :, ::2], torch.randn(1, 3, 1, 1, dtype=torch.float64).expand(2, 3, 3, 3)]
    before = wide.clone()
    mine = functional.aggregate(xs, *params, *buffers, training=False)
    torch.testing.assert_close(mine, reference.aggregate(xs, *params, *buffers, training=False))
    assert torch.equal(wide, before)


def test_expanded_gradient(served):
    xs, params, buffers = _node()
    xs[0].requires_grad_()
    functional.aggregate(xs, *params, *buffers, training=True).sum().backward()
    mine, xs[0].grad = xs[0].grad, None
    reference.aggregate(xs, *params, *buffers, training=True).sum().backward()
    torch.testing.assert_close(mine, xs[0].grad)


@pytest.mark.parametrize("layouts", list(itertools.product(["channels_last", "contiguous"], repeat=3)))
def test_output_layout_follows_eager(served, layouts):
    first, second, third = (parity.LAYOUTS[name] for name in layouts)
    xs, params, buffers = _node(dtype=torch.float32)
    xs = [xs[0].to(memory_format=first), xs[1].to(memory_format=second)]
    params[0] = params[0].to(memory_format=third)
    for training in (True, False):
        mine = functional.aggregate(xs, *params, *buffers, training=training)
        assert mine.stride() == reference.aggregate(xs, *params, *buffers, training=training).stride()


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(served, training):
    xs, params, buffers = _node(size=(0, 3, 3))
    before = [b.clone() for b in buffers]
    for t in xs + params:
        t.requires_grad_()
    y = functional.aggregate(xs, *params, *buffers, training=training)
    assert y.shape == (0, 4, 3, 3)
    y.sum().backward()
    assert all(torch.equal(b, c) for b, c in zip(buffers, before, strict=True))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params)
    with torch.no_grad():
        assert functional.aggregate(xs, *params, *buffers, training=False).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_through(served, act, dtype):
    xs, params, buffers = _node(dtype=dtype)
    xs[0][0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        y = functional.aggregate(xs, *params, *buffers, training=False, act=act)
        assert y[0, :, 0, 0].isnan().all()
        assert not y[1].isnan().any()
        assert functional.aggregate(xs, *params, *buffers, training=True, act=act).isnan().all()


@pytest.mark.parametrize("training", [True, False])
def test_zero_and_negative_gamma(served, training):
    outcomes = []
    for module in (functional, reference):
        torch.manual_seed(1)
        xs, params, buffers = _node()
        params[1] = torch.tensor([0.0, -1.0, -0.0, 2.0], dtype=torch.float64)
        for t in xs + params:
            t.requires_grad_()
        y = module.aggregate(xs, *params, *buffers, training=training, residual=True)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), xs + params)])
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_moments_far_from_zero(served):
    """Mean over deviation of 1000: the variance of the z that was written, to 1e-6."""
    for layout in parity.LAYOUTS.values():
        x = (torch.randn(2 if INTERPRETED else 8, 16, 28, 28) + 1000.0).to(memory_format=layout)
        weight = torch.eye(16).reshape(16, 16, 1, 1)
        ops = getattr(torch.ops, f"dla_fast_{served}")
        z, mean, var = ops.conv_norm_act_stage([x], [], weight, None, None, None, [1], 1, 1, 1, 0.1, True)
        exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
        assert ((var - exact_var).abs() / exact_var).max() < 1e-6
        assert ((mean - exact_mean).abs() / exact_mean).max() < 1e-7


def test_deterministic(served):
    xs, params, buffers = _node(
        channels=(64, 64), out_channels=64, dtype=torch.float32, size=(1 if INTERPRETED else 4, 28, 28)
    )

    def run() -> list[Tensor]:
        tensors = [t.detach().clone().requires_grad_() for t in xs + params]
        y = functional.aggregate(tensors[:2], *tensors[2:], *[b.clone() for b in buffers], training=True)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    first = run()
    for _ in range(1 if INTERPRETED else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_thread_counts_agree(served):
    """Every split of the work holds the bound."""
    size = {"channels": (64, 24), "out_channels": 130, "batch": 2, "height": 17, "width": 5}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            check(Spec(layout=layout, seed=seed, **size) for layout in parity.LAYOUTS for seed in range(4))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_parity_of_deep_nodes(served, poisoned, dtype, threads):
    """Few pixels, many channels: the weight gradient is computed from all pixels at once."""
    torch.set_num_threads(threads)
    try:
        size = {"channels": (64, 130, 16, 200), "out_channels": 64, "height": 13, "width": 13}
        draws = thinned(itertools.product((False, True), (True, False), range(3)), 12, offset=6)
        check(Spec(dtype=dtype, residual=res, training=mode, seed=seed, **size) for res, mode, seed in draws)
    finally:
        torch.set_num_threads(1)


def test_autocast(served):
    xs, params, buffers = _node(dtype=torch.float32)
    for t in xs + params:
        t.requires_grad_()

    def run(module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=HALF):
            y = module.aggregate(xs, *params, *[b.clone() for b in buffers], training=True)
        return [y, *torch.autograd.grad(y.float().square().sum(), xs + params)]

    for mine, theirs in zip(run(functional), run(reference), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-2 * theirs.abs().max().item())


def test_inputs_stay_and_buffers_move_as_in_torch(served):
    xs, params, buffers = _node(dtype=torch.float32)
    before = [t.clone() for t in xs + params]
    mine, theirs = [b.clone() for b in buffers], [b.clone() for b in buffers]
    bias = torch.randn(4)
    functional.aggregate(xs, *params, *mine, training=True, momentum=0.3, conv_bias=bias)
    reference.aggregate(xs, *params, *theirs, training=True, momentum=0.3, conv_bias=bias)
    torch.testing.assert_close(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(before, xs + params, strict=True))
