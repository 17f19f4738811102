"""What holds for Triton's kernels alone, run in the interpreter: test_triton.py starts this file in its own process."""

from __future__ import annotations

import itertools

import pytest
import torch
from serving import DTYPES
from triton.runtime import interpreter

from benchmarks.gates import quick_interpreter
from dla_fast import backend, functional, ops, reference, use_backend
from dla_fast.kernels import config, host, launch, moments, table
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("triton"):
        yield


def check(*specs: Spec) -> None:
    pool = parity.Pool()
    for spec in specs:
        pool.add(parity.aggregate(spec))
    assert not pool.failures(), "\n" + pool.failures()


def node(channels=(24, 5), out_channels=24, dtype=torch.float32, size=(2, 7, 5)):
    n, h, w = size
    xs = [torch.randn(n, c, h, w, dtype=dtype, requires_grad=True) for c in channels]
    weight = torch.randn(out_channels, sum(channels), 1, 1, dtype=dtype, requires_grad=True)
    gamma, beta = (torch.randn(out_channels, dtype=dtype, requires_grad=True) for _ in range(2))
    return xs, weight, gamma, beta, torch.zeros(out_channels, dtype=dtype), torch.ones(out_channels, dtype=dtype)


def large(monkeypatch) -> None:
    """Send small nodes the way of large ones: dx and dW in a pass each."""
    monkeypatch.setattr(config, "fits_fused", lambda *args: False)


def test_inference_is_one_launch():
    xs, *rest = node()
    with torch.no_grad(), launch.count() as names:
        functional.aggregate(xs, *rest, training=False, residual=True)
    assert names == ["inference_kernel"]
    with torch.no_grad(), launch.count() as names:
        functional.batch_norm_act(xs[0], *rest[1:], training=False)
    assert names == ["tail_kernel"]


def test_training_is_three_launches_forward_and_at_most_five_backward(monkeypatch):
    # So many that pixels are shared among them.
    monkeypatch.setattr(config, "processors_of", lambda device: 132)
    xs, *rest = node(size=(2, 17, 31))
    with launch.count() as names:
        y = functional.aggregate(xs, *rest, training=True, residual=True)
    assert names == ["stage_kernel", "finalise_kernel", "tail_kernel"]
    with launch.count() as names:
        y.sum().backward(retain_graph=True)
    reduction = ["reduce_kernel", "reduce_sum_kernel"]
    assert names == [*reduction, "fused_kernel", "weight_sum_kernel"]
    large(monkeypatch)
    with launch.count() as names:
        y.sum().backward()
    assert names == [*reduction, "dx_kernel", "weight_kernel", "weight_sum_kernel"]
    y = functional.batch_norm_act(xs[0], *rest[1:], training=True)
    with launch.count() as names:
        y.sum().backward()
    assert names == [*reduction, "apply_kernel"]


def test_frozen_statistics_save_the_moments():
    xs, *rest = node()
    with launch.count() as names:
        functional.aggregate(xs, *rest, training=False).sum().backward()
    assert names[:2] == ["stage_kernel", "tail_kernel"]
    assert "finalise_kernel" not in names


def test_what_needs_no_gradient_is_not_launched():
    xs, weight, *rest = node()
    xs[0].requires_grad_(False)
    weight.requires_grad_(False)
    y = functional.aggregate(xs, weight, *rest, training=True)
    with launch.count() as names:
        (grad,) = torch.autograd.grad(y.square().sum(), [xs[1]])
    assert names == ["reduce_kernel", "reduce_sum_kernel", "dx_kernel"]
    expected = reference.aggregate(
        [x.double() for x in xs], weight.double(), *[t.double() for t in rest], training=True
    )
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), [xs[1]])[0])


@pytest.mark.parametrize("needed", [(0,), (1,), (0, 2), ()])
def test_one_pass_writes_only_the_gradients_that_are_wanted(needed):
    """Beside the weight's: an input without one stands in where nothing may be written."""
    xs, *rest = node(channels=(24, 5, 8), dtype=torch.float64)
    for i, x in enumerate(xs):
        x.requires_grad_(i in needed)
    before = [x.detach().clone() for x in xs]
    wanted = [*(xs[i] for i in needed), *rest[:3]]
    outcomes = []
    for module in (functional, reference):
        y = module.aggregate(xs, *rest[:3], None, None, training=True, residual=True, act="silu")
        outcomes.append(torch.autograd.grad(y.square().sum(), wanted))
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(torch.equal(x, b) for x, b in zip(xs, before, strict=True))


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_of_the_way_of_large_nodes(monkeypatch, dtype, layout):
    large(monkeypatch)
    size = {"channels": (24, 64, 5), "height": 9, "width": 7, "layout": layout, "dtype": dtype}
    check(*(Spec(act=act, residual=act == "silu", training=act != "relu", **size) for act in ("silu", "relu")))


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("split", [False, True])
def test_parity_without_masks(monkeypatch, layout, split):
    """Channels that are multiples of 16 take the path that asks for rows alone."""
    if split:
        large(monkeypatch)
    check(Spec(channels=(64, 16, 32), out_channels=64, height=8, width=8, layout=layout, residual=True))


@pytest.mark.parametrize("layout", list(parity.LAYOUTS.values()), ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_offsets_of_64_bits(monkeypatch, layout, split):
    """As where a tensor passes 2^31 values, which no test can hold: to the bit the same."""
    if split:
        large(monkeypatch)
    xs, *rest = node()
    xs = [x.detach().contiguous(memory_format=layout).requires_grad_() for x in xs]

    def run() -> list[torch.Tensor]:
        config.install({})  # forgets plans
        with torch.no_grad():
            outcome = [functional.aggregate(xs, *rest, training=False)]
        y = functional.aggregate(xs, *rest[:3], None, None, training=True, residual=True)
        outcome += [y, *torch.autograd.grad(y.square().sum(), [*xs, *rest[:3]])]
        y = functional.batch_norm_act(xs[0], *rest[1:3], None, None, training=True)
        return [*outcome, y, *torch.autograd.grad(y.square().sum(), [xs[0], *rest[1:3]])]

    expected = run()
    monkeypatch.setattr(host, "_LARGE", 0)
    with launch.record() as launches, torch.no_grad():
        config.install({})
        functional.aggregate(xs, *rest, training=False)
    assert launches[0].constexprs["I64"] is True
    assert all(torch.equal(a, b) for a, b in zip(expected, run(), strict=True))


def test_a_number_of_pixels_decides_where_64_bits_are_needed():
    def described(side: int) -> host.Node:
        x = torch.empty(8, 512, side, side, device="meta")
        return host.Node.of([x], torch.empty(64, 512, 1, 1, device="meta"))

    assert not described(700).large
    assert described(730).large


def test_full_gradcheck():
    """Every element, for one node: the fast mode of the other checks projects on random vectors."""
    options = {"channels": (2, 1), "out_channels": 2, "batch": 1, "height": 2, "width": 2}
    spec = Spec(dtype=torch.float64, act="silu", residual=True, conv_bias=True, **options)
    with launch.count() as names:
        run, inputs = parity.gradient_function(parity.aggregate(spec))
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)
    assert {"stage_kernel", "fused_kernel", "reduce_kernel"} <= set(names)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize(("height", "width", "channels"), [(29, 61, 24), (14, 14, 64), (7, 7, 64)], ids=str)
def test_programs_of_many_tiles(monkeypatch, layout, height, width, channels):
    """As on maps that are too large for the interpreter: whole tiles and the last one, rows of any alignment."""
    monkeypatch.setattr(config, "PROGRAMS", 1)
    config.merge.cache_clear()
    config.install({})
    size = {"out_channels": channels, "batch": 3, "height": height, "width": width, "layout": layout}
    pool = parity.Pool()
    try:
        with launch.record() as launches:
            x = torch.empty(3, channels, height, width, device="meta")
            moments.moments(x.to(memory_format=parity.LAYOUTS[layout]), None, None, 0.1)
        assert launches[0].args[-1] > 1 or height == 7
        pool.add(parity.batch_norm_act(Spec(residual=True, **size)))
        pool.add(parity.PROBLEMS["upsample"](Spec(factor=2, **{**size, "height": 9, "width": 7})))
    finally:
        monkeypatch.undo()
        config.merge.cache_clear()
        config.install({})
    assert not pool.failures(), "\n" + pool.failures()


@pytest.mark.parametrize("groups", [1, 3, 2048, 2049, 6272])
def test_any_number_of_partial_moments(groups):
    """At once, or in steps."""
    values = torch.randn(5, groups, 4, dtype=torch.float64) + 3
    values[:, -1, 2:] = 0
    shift = values[..., 0].float()
    off = values - shift[..., None].double()
    off[:, -1, 2:] = 0
    partial = torch.stack([shift, off.square().sum(2).float(), off.sum(2).float()])
    mean, var = torch.empty(5), torch.empty(5)
    total = 4 * groups - 2
    moments.finalise(partial, total, 4, mean, var, host.Running(None, None, None, 0.1))
    exact = values.sum((1, 2)) / total
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=0)
    squares = (values.square().sum((1, 2)) / total - exact.square()).clamp(min=0)
    torch.testing.assert_close(var.double(), squares, rtol=1e-5, atol=1e-6)


def test_repeats_are_bitwise_equal_in_every_mode(monkeypatch):
    for split, training in itertools.product((False, True), repeat=2):
        with monkeypatch.context() as patch:
            if split:
                large(patch)
            outcomes = []
            for _ in range(2):
                torch.manual_seed(3)
                xs, *rest = node(size=(1, 31, 17), dtype=torch.float16)
                y = functional.aggregate(xs, *rest, training=training)
                outcomes.append([y, *torch.autograd.grad(y.float().square().sum(), [*xs, *rest[:3]])])
            assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_moments_of_the_z_that_is_written():
    """In half precision the rounding of z is of the size of its deviation: the moments must be those after it."""
    x = (torch.randn(3, 16, 12, 12) / 16 + 8).half()
    weight = torch.eye(16, dtype=torch.float16).reshape(16, 16, 1, 1) * 1.37
    stage = ops.namespace("triton").conv_norm_act_stage
    z, mean, var = stage([x], [], weight, None, None, None, [1], 1, 1, 1, 0.1, True)
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert ((var - exact_var).abs() / exact_var).max() < 1e-6
    assert ((mean - exact_mean).abs() / exact_mean).max() < 1e-7


def test_a_measured_configuration_is_used():
    entry = config.TileConfig(16, 32, 16, 2, 1)
    key = table.key(config.DEFAULT_ARCH, "forward", torch.float32, 80, 30, 24)
    xs, *rest = node(channels=(24, 6), size=(2, 8, 5))
    with torch.no_grad():
        functional.aggregate(xs, *rest, training=False)
    try:
        config.install({key: entry})
        with launch.record() as launches, torch.no_grad():
            functional.aggregate(xs, *rest, training=False)
        assert launches[0].config == entry
        assert launches[0].constexprs["BM"] == 16
    finally:
        table.TABLE.clear()
        config.install({})


def test_plans_follow_the_call():
    """A plan that is kept must not serve a call with another layout, option or switch."""
    xs, *rest = node()
    with torch.no_grad():
        for layout, act, residual in itertools.product(parity.LAYOUTS.values(), ("relu", "silu"), (False, True)):
            inputs = [x.contiguous(memory_format=layout) for x in xs]
            expected = reference.aggregate(inputs, *rest, training=False, act=act, residual=residual)
            mine = functional.aggregate(inputs, *rest, training=False, act=act, residual=residual)
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
            assert mine.stride() == expected.stride()


def test_auto_never_takes_the_interpreter():
    with use_backend("auto"):
        assert backend.resolve("aggregate", "cpu", torch.float32) != "triton"
        assert not any(row.chosen for row in backend.explain("aggregate") if row.backend == "triton")


def test_reasons():
    assert backend.can_run("triton", "aggregate", "cpu", torch.float32) is None
    assert "reads bfloat16 as integers" in str(backend.can_run("triton", "aggregate", "cpu", torch.bfloat16))
    assert "TRITON_INTERPRET is set" in str(backend.can_run("triton", "aggregate", "cuda", torch.float32))
    xs, *rest = node(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="cannot run aggregate: Triton's interpreter reads bfloat16"):
        functional.aggregate(xs, *rest, training=True)


@pytest.mark.skipif(not quick_interpreter.is_known(), reason="not this Triton's interpreter")
def test_the_quick_interpreter_reduces_as_the_slow_one(monkeypatch):
    z = torch.randn(3, 24, 9, 7) + 5
    z[0, 3, 2, 1] = torch.inf
    running = torch.zeros(24), torch.ones(24)
    found = []
    for reduce in (interpreter.ReduceOps.generic_reduce, quick_interpreter.one_by_one):
        monkeypatch.setattr(interpreter.ReduceOps, "generic_reduce", reduce)
        found.append(torch.ops.dla_fast_triton.moments(z, *(t.clone() for t in running), 0.1))
    for quick, slow in zip(*found, strict=True):
        torch.testing.assert_close(quick, slow, rtol=0, atol=0, equal_nan=True)
