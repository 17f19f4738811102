"""Parity, gradients and contracts of ``merge``, per backend."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dla_fast import backend, functional, reference, use_backend
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

BACKENDS = [name for name in ("cpu",) if backend.can_run(name, "merge", "cpu", torch.float32) is None]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTS = ("relu", "identity", "silu", "leaky_relu", "hardswish")
# Low-resolution sizes: the last input is upsampled to that of the others.
SHAPES = (
    {"channels": (24, 24), "out_channels": 24, "batch": 3, "height": 1, "width": 1},
    {"channels": (5, 1), "out_channels": 5, "batch": 2, "height": 3, "width": 1},
    {"channels": (64, 5, 24), "out_channels": 64, "batch": 1, "height": 1, "width": 17},
    {"channels": (5,), "out_channels": 130, "batch": 1, "height": 5, "width": 3},
    {"channels": (24, 64), "out_channels": 24, "batch": 2, "height": 9, "width": 31},
)


@pytest.fixture(params=BACKENDS)
def served(request):
    with use_backend(request.param):
        yield request.param


def check(specs: Iterable[Spec]) -> None:
    pool = parity.Pool()
    for spec in specs:
        pool.add(parity.merge(spec))
    assert pool.cases
    assert not pool.failures(), "\n" + pool.failures()


def test_cpu_kernels_are_built():
    assert BACKENDS == ["cpu"], backend.can_run("cpu", "merge", "cpu", torch.float32)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['channels']}at{s['height']}x{s['width']}")
def test_parity(served, poisoned, dtype, layout, kernel, shape):
    draws = 1 if shape["height"] * shape["width"] > 100 else 4
    cases = itertools.product(ACTS, (True, False), (2, 3), (False, True), range(draws))
    if shape["width"] == 31:  # the reference takes long over these
        cases = (("relu", training, 2, bias, 0) for training in (True, False) for bias in (False, True))
    check(
        Spec(
            dtype=dtype,
            layout=layout,
            kernel=kernel,
            act=act,
            training=training,
            factor=f,
            conv_bias=bias,
            seed=seed,
            **shape,
        )
        for seed, (act, training, f, bias, _) in enumerate(cases)
    )


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
def test_parity_over_many_tiles(served, layout):
    shape = {"channels": (70, 64), "out_channels": 100, "batch": 1, "height": 33, "width": 65}
    check([Spec(layout=layout, kernel=3, **shape)])


def test_parity_of_any_shape(served):
    pools = {dtype: parity.Pool() for dtype in DTYPES}

    @given(
        channels=st.lists(st.integers(1, 40), min_size=1, max_size=4),
        out_channels=st.integers(1, 100),
        batch=st.integers(1, 2),
        height=st.integers(1, 9),
        width=st.integers(2, 30),
        kernel=st.sampled_from([1, 3]),
        factor=st.integers(2, 5),
        training=st.booleans(),
        layout=st.sampled_from(list(parity.LAYOUTS)),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=40, deadline=None, derandomize=True)
    def draw(channels, dtype, **rest):
        pools[dtype].add(parity.merge(Spec(channels=tuple(channels), dtype=dtype, **rest)))

    draw()
    for pool in pools.values():
        assert pool.cases > 0
        assert not pool.failures(), "\n" + pool.failures()


def _node(
    factors=(1, 2), kernel=3, dtype=torch.float64, layout=torch.contiguous_format, side=2
) -> tuple[list[Tensor], list[tuple[Tensor, int] | None], list[Tensor], list[Tensor]]:
    """Inputs of 3, 2, 3, 2 ... channels at ``side * max(factors)``, each so small that its factor leads there."""
    xs, ups = [], []
    for i, f in enumerate(factors):
        c, low = (3, 2)[i % 2], side * max(factors) // f
        xs.append(torch.randn(2, c, low, low, dtype=dtype).to(memory_format=layout))
        ups.append(None if f == 1 else (torch.randn(c, 1, 2 * f, 2 * f, dtype=dtype), f))
    depth = sum(x.shape[1] for x in xs)
    weight = torch.randn(4, depth, kernel, kernel, dtype=dtype)
    gamma, beta, mean = (torch.randn(4, dtype=dtype) for _ in range(3))
    return xs, ups, [weight, gamma, beta], [mean, torch.rand(4, dtype=dtype) + 0.5]


def _leaves(xs, ups, params) -> list[Tensor]:
    return [t.requires_grad_() for t in (*xs, *(up[0] for up in ups if up is not None), *params)]


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (4, 1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_any_input_may_be_upsampled(served, layout, kernel, factors, training):
    xs, ups, params, buffers = _node(factors, kernel, layout=parity.LAYOUTS[layout])
    leaves = _leaves(xs, ups, params)
    results = []
    for module in (functional, reference):
        stats = [b.clone() for b in buffers]
        y = module.merge(xs, *params, *stats, training=training, upsample=ups, act="silu")
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves), *stats])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        args = {"training": False, "upsample": ups, "act": "silu"}
        torch.testing.assert_close(
            functional.merge(xs, *params, *buffers, **args), reference.merge(xs, *params, *buffers, **args)
        )


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(served, layout, kernel, training):
    spec = Spec(
        dtype=torch.float64,
        layout=layout,
        channels=(1, 2),
        out_channels=2,
        height=1,
        width=2,
        kernel=kernel,
        act="silu",
        training=training,
        conv_bias=True,
    )
    run, inputs = parity.gradient_function(parity.merge(spec))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("kernel", [1, 3])
def test_only_what_is_needed_is_computed(served, kernel):
    xs, ups, params, buffers = _node((1, 2, 1), kernel)
    leaves = _leaves(xs, ups, params)

    def loss():
        y = functional.merge(xs, *params, *buffers, training=True, upsample=ups)
        return y.square().sum()

    every = torch.autograd.grad(loss(), leaves)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss(), leaves)
    whole = counter.get_total_flops()
    for i, leaf in enumerate(leaves):
        for t in leaves:
            t.requires_grad_(t is leaf)
        with FlopCounterMode(display=False) as counter:
            (alone,) = torch.autograd.grad(loss(), [leaf])
        torch.testing.assert_close(alone, every[i])
        assert counter.get_total_flops() < whole


def test_kernels_serve_the_gradients(served):
    """Parity could pass on the reference: so count what is called."""
    seen: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    xs, ups, params, buffers = _node()
    _leaves(xs, ups, params)
    with Record():
        functional.merge(xs, *params, *buffers, training=True, upsample=ups).sum().backward()
        with torch.no_grad():
            functional.merge(xs, *params, *buffers, training=False, upsample=ups)
    space = f"dla_fast_{served}"
    stage, backward, inference = (f"conv_norm_act_{part}" for part in ("stage", "backward", "inference"))
    expected = [stage, "tail", "tail_backward_reduce", backward, inference]
    assert [n for n in seen if n.startswith(space)] == [f"{space}::{n}" for n in expected]


def test_neither_concat_nor_upsampled_map_is_kept(served):
    xs, ups, params, buffers = _node(dtype=torch.float32, side=8)
    leaves = _leaves(xs, ups, params)
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = functional.merge(xs, *params, *buffers, training=True, upsample=ups)
    kept = sum(sizes.values())
    assert kept <= sum(t.untyped_storage().nbytes() for t in leaves) + y.untyped_storage().nbytes() + 256


@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_batch(served, kernel):
    xs, ups, params, buffers = _node(kernel=kernel, dtype=torch.float32)
    xs = [x[:0].clone() for x in xs]
    leaves = _leaves(xs, ups, params)
    before = [b.clone() for b in buffers]
    y = functional.merge(xs, *params, *buffers, training=True, upsample=ups)
    assert y.shape == (0, 4, 4, 4)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True))


def test_nan_passes(served):
    for kernel in (1, 3):
        xs, ups, params, buffers = _node(kernel=kernel, dtype=torch.float32)
        xs[0][0, 0, 0, 0] = torch.nan
        with torch.no_grad():
            y = functional.merge(xs, *params, *buffers, training=False, upsample=ups)
            assert y[0, :, 0, 0].isnan().all()
            assert not y[1].isnan().any()
            assert functional.merge(xs, *params, *buffers, training=True, upsample=ups).isnan().all()


def test_bad_input_names_the_argument():
    xs, ups, params, buffers = _node()
    with pytest.raises(ValueError, match=r"xs\[1\]: expected \(N, H, W\) = \(2, 4, 4\) after upsampling"):
        functional.merge(xs, *params, *buffers, training=True)
    with pytest.raises(ValueError, match="upsample: expected one entry per input"):
        functional.merge(xs, *params, *buffers, training=True, upsample=[None])
    with pytest.raises(ValueError, match=r"upsample\[1\] factor: expected an integer >= 2, got 1"):
        functional.merge(xs, *params, *buffers, training=True, upsample=[None, (ups[1][0], 1)])
    with pytest.raises(ValueError, match="weight: expected a 1x1 or 3x3 kernel"):
        functional.merge(
            xs, torch.randn(4, 5, 5, 5, dtype=torch.float64), *params[1:], *buffers, training=True, upsample=ups
        )
