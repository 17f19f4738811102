"""Parity, gradients and contracts of what ``conv_norm_act`` has beyond ``aggregate`` and ``merge``, per backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from serving import DTYPES, INTERPRETED, served_by, thinned
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dla_fast import functional, ops, reference
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

served = served_by("conv_norm_act")
# Strides, dilations, groups, larger kernels, and every kind of residual. As many as neither five nor seven divide, so
# that tests which take every fifth or seventh combination still meet each.
GEOMETRIES: tuple[dict[str, Any], ...] = (
    {"kernel": 3, "stride": 2},
    {"kernel": 3, "dilation": 2, "residual_input": 0},
    {"kernel": 3, "stride": 2, "dilation": 2, "residual": True},
    {"kernel": 3, "residual_input": 1},
    {"kernel": 3, "residual": True},
    {"kernel": 1, "stride": 2, "residual": True},
    {"kernel": 1, "residual_input": 1},
    {"kernel": 1, "residual": True},
    {"kernel": 3, "groups": 4, "residual": True},
    {"kernel": 5, "stride": 2},
    {"kernel": 3, "stride": 3},
)


def name(geometry: dict[str, Any]) -> str:
    return "-".join(f"{key}{value}" for key, value in geometry.items())


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=name)
def test_parity(served, poisoned, dtype, layout, geometry):
    shapes = (
        {"channels": (24, 24), "out_channels": 24, "batch": 2, "height": 9, "width": 7},
        {"channels": (8, 12), "out_channels": 12, "batch": 3, "height": 3, "width": 5},
    )
    for shape in shapes:
        if geometry.get("residual_input") == 0 and shape["channels"][0] != shape["out_channels"]:
            continue
        pool = parity.Pool()
        cases = itertools.product(("relu", "silu"), (True, False), (False, True), range(1 if INTERPRETED else 3))
        for seed, (act, training, bias, _) in enumerate(thinned(cases, 4)):
            rest: dict[str, Any] = {"act": act, "training": training, "conv_bias": bias, "seed": seed}
            problem = parity.conv_norm_act(Spec(dtype, layout, **shape, **geometry, **rest))
            pool.add(problem)
            if not training:
                pool.add_inference(problem)
        assert not pool.failures(), "\n" + pool.failures()


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=name)
def test_gradcheck_of_every_geometry(served, layout, training, geometry):
    spec = Spec(
        torch.float64, layout, channels=(4, 4), out_channels=4, height=3, width=4, act="silu", training=training,
        **geometry,
    )  # fmt: skip
    run, inputs = parity.gradient_function(parity.conv_norm_act(spec))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def _tensors(kernel: int = 3, side: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Two inputs of 4 channels, the second at half the side with its up-weight, and 4 output channels."""
    xs = [torch.randn(2, 4, side, side, dtype=dtype), torch.randn(2, 4, side // 2, side // 2, dtype=dtype)]
    up = torch.randn(4, 1, 4, 4, dtype=dtype)
    weight = torch.randn(4, 8, kernel, kernel, dtype=dtype)
    gamma, beta, mean = (torch.randn(4, dtype=dtype) for _ in range(3))
    return {"xs": xs, "up": up, "weight": weight, "norm": (gamma, beta, mean, torch.rand(4, dtype=dtype) + 0.5)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stride", "residual"), [(1, 0), (1, "tensor"), (2, "tensor")])
@pytest.mark.parametrize("kernel", [1, 3])
def test_everything_at_once(served, kernel, stride, residual, training):
    """An upsampled input, a stride, a dilation and a residual in one node."""
    t = _tensors(kernel)
    side = 4 // stride
    added = torch.randn(2, 4, side, side, dtype=torch.float64) if residual == "tensor" else 0
    leaves = [*t["xs"], t["up"], t["weight"], *t["norm"][:2], *([added] if residual == "tensor" else [])]
    outcomes = []
    for module in (functional, reference):
        stats = [b.clone() for b in t["norm"][2:]]
        for leaf in leaves:
            leaf.requires_grad_()
        y = module.conv_norm_act(
            t["xs"], t["weight"], *t["norm"][:2], *stats, training=training, stride=stride, dilation=2,
            residual=added, upsample=[None, (t["up"], 2)], act="silu",
        )  # fmt: skip
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), leaves), *stats])
    for mine, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_residual_that_no_kernel_shares_is_added_once(served):
    """With a stride, or an upsampling, an input can still have the output's shape."""
    x = torch.randn(3, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    norm = [torch.rand(2, dtype=torch.float64) + 0.5 for _ in range(4)]
    grads = []
    for module in (functional, reference):
        y = module.conv_norm_act([x], weight, *norm, training=False, stride=2, residual=0, act="silu")
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*grads)


def test_the_common_cases_are_cases_of_it(served):
    t = _tensors(kernel=1)
    xs = [t["xs"][0], t["xs"][0] + 1]
    added = torch.randn_like(xs[0])
    for residual, same in ((True, 0), (added, added), (False, None)):
        mine = functional.aggregate(xs, t["weight"], *t["norm"], training=False, residual=residual)
        assert torch.equal(mine, functional.conv_norm_act(xs, t["weight"], *t["norm"], training=False, residual=same))
    options: dict[str, Any] = {"training": False, "upsample": [None, (t["up"], 2)], "stride": 2, "dilation": 2}
    three = _tensors(kernel=3)["weight"]
    mine = functional.merge(t["xs"], three, *t["norm"], **options)
    assert torch.equal(mine, functional.conv_norm_act(t["xs"], three, *t["norm"], **options))


@pytest.mark.parametrize("kernel", [1, 3])
def test_only_what_is_needed_is_computed(served, kernel):
    t = _tensors(kernel)
    added = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    leaves = [*t["xs"], t["up"], t["weight"], added]
    for leaf in leaves:
        leaf.requires_grad_()
    up = [None, (t["up"], 2)]
    y = functional.conv_norm_act(t["xs"], t["weight"], *t["norm"], training=True, residual=added, upsample=up)
    every = torch.autograd.grad(y.sin().sum(), leaves, retain_graph=True)
    for leaf, expected in zip(leaves, every, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        y = functional.conv_norm_act(t["xs"], t["weight"], *t["norm"], training=True, residual=added, upsample=up)
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), leaf)[0], expected)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(served, layout, kernel, stride):
    namespace, form = ops.namespace(served), parity.LAYOUTS[layout]
    t = _tensors(kernel, dtype=torch.float32)
    xs, ups = [x.to(memory_format=form) for x in t["xs"]], [t["up"]]
    bias, residual = torch.randn(4), torch.randn(2, 4, 4 // stride, 4 // stride)
    geometry = ([1, 2], stride, 1, 1)
    node, norm = (xs, ups, t["weight"], bias), t["norm"]
    options = (1e-5, "relu", 0.0)
    opcheck(namespace.conv_norm_act_inference.default, (*node, residual, *norm, *geometry, -1, *options))
    opcheck(namespace.conv_norm_act_stage.default, (*node, *norm[2:], *geometry, 0.1, True))
    opcheck(namespace.conv_norm_act_stage.default, (*node, None, None, *geometry, 0.0, False))
    z, mean, var = namespace.conv_norm_act_stage(*node, None, None, *geometry, 0.1, True)
    for wanted in (([True, True], [True], True, True), ([True, False], [False], False, False)):
        opcheck(
            namespace.conv_norm_act_backward.default,
            (torch.randn_like(z), *node[:3], residual, z, mean, var, *norm[:2], mean, var, *geometry, -1)
            + (z[:, 0].numel(), *options, *wanted),
        )
    for leaf in (*xs, *ups, t["weight"], bias, residual, *norm[:2]):
        leaf.requires_grad_()
    for training in (True, False):
        opcheck(namespace.conv_norm_act.default, (*node, residual, *norm, *geometry, -1, training, 0.1, *options))


@pytest.mark.parametrize("kernel", [1, 3])
def test_empty_batch(served, kernel):
    t = _tensors(kernel, dtype=torch.float32)
    xs, added = [x[:0].clone() for x in t["xs"]], torch.randn(0, 4, 2, 2)
    leaves = [*xs, t["up"], t["weight"], added]
    for leaf in leaves:
        leaf.requires_grad_()
    y = functional.conv_norm_act(
        xs, t["weight"], *t["norm"], training=True, stride=2, residual=added, upsample=[None, (t["up"], 2)]
    )
    assert y.shape == (0, 4, 2, 2)
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_flops_are_counted(served):
    x, weight = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(8, 2, 3, 3)
    norm = [torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional.conv_norm_act([x], weight, *norm, training=False, stride=2, groups=4)
    assert counter.get_total_flops() == 2 * (2 * 3 * 3) * 8 * 2 * 9


BAD = (
    (ValueError, "residual: expected xs\\[1\\] to have the output's shape", {"residual": 1}),
    (ValueError, "residual: expected the index of one of 2 inputs or a tensor, got 2", {"residual": 2}),
    (TypeError, "residual: expected None, the index of an input or a tensor, got True", {"residual": True}),
    (ValueError, "residual: expected shape \\(2, 4, 4, 4\\)", {"residual": torch.randn(2, 4, 2, 2)}),
    (TypeError, "residual: expected torch.float64", {"residual": torch.randn(2, 4, 4, 4, dtype=torch.float32)}),
    (ValueError, "stride: expected an integer >= 1, got 0", {"stride": 0}),
    (TypeError, "groups: expected an integer >= 1, got '2'", {"groups": "2"}),
    (ValueError, "upsample: expected one entry per input \\(2\\), got 0", {"upsample": []}),
    (TypeError, "dilation: expected an integer >= 1, got 1.5", {"dilation": 1.5}),
    (ValueError, "weight: expected 4 \\+ 4 = 8 input channels in 2 groups, got 8", {"groups": 2}),
    (ValueError, "weight: expected a square, odd kernel", {"weight": torch.randn(4, 8, 2, 2)}),
)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[1][:40])
def test_bad_input_names_the_argument(case):
    error, message, changes = case
    t: dict[str, Tensor | Any] = _tensors()
    options = {key: value for key, value in changes.items() if key != "weight"}
    weight = changes.get("weight", t["weight"]).double()
    if isinstance(options.get("residual"), Tensor) and "shape" in message:
        options["residual"] = options["residual"].double()
    options = {"upsample": [None, (t["up"], 2)]} | options
    with pytest.raises(error, match=message):
        functional.conv_norm_act(t["xs"], weight, *t["norm"], training=True, **options)
