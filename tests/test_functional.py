"""Bad input of the functional API: a clear error before any work, and nothing written."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from dla_fast import functional
from dla_fast.proof import parity


def node(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "xs": [torch.randn(2, 4, 3, 3), torch.randn(2, 3, 3, 3)],
        "weight": torch.randn(4, 7, 1, 1),
        "bn_weight": torch.randn(4),
        "bn_bias": torch.randn(4),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "training": True,
    }
    arguments.update(changes)
    return arguments


BAD_NODES = {
    "no inputs": ({"xs": []}, ValueError, "xs: expected at least one input"),
    "one tensor": ({"xs": torch.randn(2, 7, 3, 3)}, TypeError, r"xs: .* pass \[x\]"),
    "not tensors": ({"xs": [1, 2]}, TypeError, r"xs\[0\]: expected a Tensor, got int"),
    "rank": ({"xs": [torch.randn(4, 3, 3)]}, ValueError, r"xs\[0\]: expected 4 dimensions, got shape \(4, 3, 3\)"),
    "batch": (
        {"xs": [torch.randn(2, 4, 3, 3), torch.randn(1, 3, 3, 3)]},
        ValueError,
        r"xs\[1\]: expected shape \(2, C, 3, 3\) .* got \(1, 3, 3, 3\)",
    ),
    "height": (
        {"xs": [torch.randn(2, 4, 3, 3), torch.randn(2, 3, 4, 3)]},
        ValueError,
        r"xs\[1\]: expected shape \(2, C, 3, 3\)",
    ),
    "channels": ({"weight": torch.randn(4, 8, 1, 1)}, ValueError, r"weight: expected 4 \+ 3 = 7 input channels, got 8"),
    "kernel": ({"weight": torch.randn(4, 7, 3, 3)}, ValueError, "weight: expected a 1x1 kernel"),
    "mixed dtypes": (
        {"xs": [torch.randn(2, 4, 3, 3), torch.randn(2, 3, 3, 3).double()]},
        TypeError,
        r"xs\[1\]: expected torch.float32 .* got torch.float64",
    ),
    "weight dtype": ({"weight": torch.randn(4, 7, 1, 1).double()}, TypeError, "weight: expected torch.float32"),
    "devices": (
        {"xs": [torch.randn(2, 4, 3, 3), torch.randn(2, 3, 3, 3, device="meta")]},
        ValueError,
        r"xs\[1\]: expected device cpu",
    ),
    "integers": ({"xs": [torch.ones(2, 7, 3, 3, dtype=torch.int64)]}, TypeError, r"xs\[0\]: expected a floating dtype"),
    "complex": ({"xs": [torch.ones(2, 7, 3, 3, dtype=torch.complex64)]}, TypeError, "expected a floating dtype"),
    "residual": (
        {"xs": [torch.randn(2, 3, 3, 3), torch.randn(2, 4, 3, 3)], "residual": True},
        ValueError,
        r"residual: expected xs\[0\] to have the output's 4 channels, got 3",
    ),
    "one value": (
        {"xs": [torch.randn(1, 7, 1, 1)]},
        ValueError,
        "expected more than 1 value per channel when training, got 1",
    ),
    "activation": ({"act": "gelu"}, ValueError, "act: unknown activation 'gelu', expected one of identity, relu"),
    "slope": ({"act": ("relu", 0.1)}, ValueError, "act: 'relu' takes no slope"),
    "activation type": ({"act": 3}, TypeError, r"act: expected a name or \(name, slope\), got 3"),
    "norm shape": ({"bn_weight": torch.randn(5)}, ValueError, r"bn_weight: expected shape \(4,\), got \(5,\)"),
    "norm dtype": ({"bn_bias": torch.randn(4).half()}, TypeError, "bn_bias: expected torch.float32"),
    "mixed norm": (
        {
            "xs": [torch.randn(2, 7, 3, 3).half()],
            "weight": torch.randn(4, 7, 1, 1).half(),
            "running_mean": torch.zeros(4).half(),
            "running_var": torch.ones(4).half(),
        },
        TypeError,
        "running_mean: expected torch.float32 as bn_weight has",
    ),
    "half the statistics": ({"running_var": None}, ValueError, "running_var: expected a tensor because running_mean"),
    "no statistics": (
        {"running_mean": None, "running_var": None, "training": False},
        ValueError,
        "running_mean: expected a tensor when training is false",
    ),
    "bias": ({"conv_bias": torch.randn(3)}, ValueError, r"conv_bias: expected shape \(4,\)"),
    "eps": ({"eps": -1.0}, ValueError, "eps: expected a number >= 0"),
}


@pytest.mark.parametrize("case", BAD_NODES)
def test_bad_aggregate(case):
    changes, error, message = BAD_NODES[case]
    arguments = node(**changes)
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    xs = arguments["xs"]
    tensors += [t for t in xs if isinstance(t, torch.Tensor) and t.device.type == "cpu"] if isinstance(xs, list) else []
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        functional.aggregate(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def merge(**changes: Any) -> dict[str, Any]:
    arguments = node(
        xs=[torch.randn(2, 4, 4, 6), torch.randn(2, 3, 2, 3)],
        weight=torch.randn(4, 7, 3, 3),
        upsample=[None, (torch.randn(3, 1, 4, 4), 2)],
    )
    arguments.update(changes)
    return arguments


BAD_MERGES = {
    "entries": ({"upsample": [None]}, ValueError, r"upsample: expected one entry per input \(2\), got 1"),
    "not upsampled": ({"upsample": None}, ValueError, r"xs\[1\]: expected \(N, H, W\) = \(2, 4, 6\) after upsampling"),
    "factor": (
        {"upsample": [None, (torch.randn(3, 1, 2, 2), 1)]},
        ValueError,
        r"upsample\[1\] factor: expected an integer >= 2, got 1",
    ),
    "entry": ({"upsample": [None, 2]}, TypeError, r"upsample\[1\]: expected None or \(up_weight, factor\)"),
    "up weight": (
        {"upsample": [None, (torch.randn(3, 1, 3, 3), 2)]},
        ValueError,
        r"upsample\[1\] weight: expected shape \(3, 1, 4, 4\)",
    ),
    "kernel": ({"weight": torch.randn(4, 7, 5, 5)}, ValueError, "weight: expected a 1x1 or 3x3 kernel"),
}


@pytest.mark.parametrize("case", BAD_MERGES)
def test_bad_merge(case):
    changes, error, message = BAD_MERGES[case]
    with pytest.raises(error, match=message):
        functional.merge(**merge(**changes))


def test_bad_upsampling():
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(ValueError, match="factor: expected an integer >= 2, got 1"):
        functional.upsample(x, torch.randn(3, 1, 2, 2), 1)
    with pytest.raises(TypeError, match="factor: expected an integer >= 2, got 2.0"):
        functional.upsample(x, torch.randn(3, 1, 4, 4), 2.0)
    with pytest.raises(ValueError, match=r"weight: expected shape \(3, 1, 4, 4\) for factor 2"):
        functional.upsample(x, torch.randn(3, 3, 4, 4), 2)
    with pytest.raises(ValueError, match=r"skip: expected shape \(2, 3, 8, 10\)"):
        functional.upsample_add(x, torch.randn(2, 3, 8, 9), torch.randn(3, 1, 4, 4), 2)
    assert functional.upsample(x, torch.randn(3, 1, 6, 6), 3).shape == (2, 3, 13, 16)


def test_bad_batch_norm_act():
    x, norm = torch.randn(2, 3, 4, 4), (None, None, torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"residual: expected shape \(2, 3, 4, 4\)"):
        functional.batch_norm_act(x, *norm, training=True, residual=torch.randn(2, 3, 4, 5))
    with pytest.raises(TypeError, match="residual: expected torch.float32"):
        functional.batch_norm_act(x, *norm, training=True, residual=x.double())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.batch_norm_act(x[:1, :, :1, :1], *norm, training=True)


def test_mixed_dtypes_are_fine_under_autocast():
    arguments = node(xs=[torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 3, 3, 3)])
    with pytest.raises(TypeError, match=r"xs\[1\]: expected torch.bfloat16"):
        functional.aggregate(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.aggregate(**arguments).dtype == torch.bfloat16


@pytest.mark.parametrize("grad", [False, True])
def test_double_precision_is_not_cast_by_autocast(grad):
    arguments = node()
    arguments = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    arguments["xs"] = [x.double() for x in arguments["xs"]]
    with torch.autocast("cpu", dtype=torch.bfloat16), contextlib.nullcontext() if grad else torch.no_grad():
        assert functional.aggregate(**arguments).dtype == torch.float64


@pytest.mark.parametrize("training", [False, True])
def test_autocast_of_a_compiled_function(training):
    """Inside it autocast becomes part of the graph, around it it is asked for at every call."""
    torch._dynamo.reset()
    arguments = node(training=training)
    up_weight = torch.randn(4, 1, 4, 4)

    def plain(xs, weight):
        mine = {**arguments, "running_mean": torch.zeros(4), "running_var": torch.ones(4), "xs": xs, "weight": weight}
        return functional.upsample(functional.aggregate(**mine), up_weight, 2)

    def inside(xs, weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(xs, weight)

    def outcome(fn, enabled):
        xs, weight = [x.clone().requires_grad_() for x in arguments["xs"]], arguments["weight"].clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = fn(xs, weight)
        return [y, *torch.autograd.grad(y.float().square().sum(), [*xs, weight])]

    compiled = {fn: torch.compile(fn, fullgraph=True, backend="aot_eager") for fn in (plain, inside)}
    for fn, enabled in ((inside, False), (plain, True), (plain, False), (plain, True)):
        expected, got = outcome(fn, enabled), outcome(compiled[fn], enabled)
        assert expected[0].dtype == (torch.bfloat16 if enabled or fn is inside else torch.float32)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_peer_that_fails_is_no_yardstick(monkeypatch):
    """PyTorch's NaN neither excuses an error nor fails what is right."""
    spec = parity.Spec(dtype=torch.bfloat16)
    right = parity.execute

    def execute(problem, module, dy, dtype):
        found = right(problem, module, dy, dtype)
        if module is parity.reference and dtype is None:
            found["d x"][0, 0, 0, 0] = float("nan")
        elif module is parity.functional and wrong:
            found["d x"] *= 1.1
        return found

    monkeypatch.setattr(parity, "execute", execute)
    for wrong in (False, True):
        pool = parity.Pool()
        pool.add(parity.upsample(spec))
        assert bool(pool.failures()) == wrong


@pytest.mark.parametrize("kernel", [1, 3])
def test_no_input_channels(kernel):
    norm = [torch.ones(8) for _ in range(4)]
    y = functional.conv_norm_act([torch.randn(1, 0, 4, 4)], torch.randn(8, 0, kernel, kernel), *norm, training=False)
    assert y.shape[0] == 1


def test_a_bfloat16_gradient_of_maps_narrower_than_the_stride():
    """oneDNN's reads memory there that nobody wrote, in torch 2.13."""
    torch.manual_seed(0)
    junk = [torch.full((1 << 16,), 1e30) for _ in range(8)]
    del junk
    x, weight = torch.randn(3, 64, 30, 2).bfloat16(), torch.randn(3, 64, 3, 3).bfloat16().requires_grad_()
    norm = [torch.ones(3) for _ in range(4)]
    y = functional.conv_norm_act([x], weight, *norm, training=False, stride=3, act="identity")
    exact = weight.detach().double().requires_grad_()
    want = torch.nn.functional.conv2d(x.double(), exact, None, 3, 1)
    (got,) = torch.autograd.grad(y.sum(), weight)
    (expected,) = torch.autograd.grad(want.sum() / (1 + 1e-5) ** 0.5, exact)
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.1)
