"""run_unit, the door of every convolution-norm-activation unit: what it computes, and what runs as it is."""

from __future__ import annotations

import pytest
import torch
from nn_helpers import assert_same_function, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dla_fast import functional
from dla_fast.nn import BasicBlock, Bottleneck, ConvLevel, Projection, SplitBottleneck
from dla_fast.nn.unit import run_unit
from dla_fast.reference.activation import activate

CONVS = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "7x7": {"kernel_size": 7, "padding": 3},
}
# What functional.conv_norm_act has no arguments for.
OTHERS = {
    "even kernel": {"kernel_size": 2, "padding": 1},
    "no padding": {"kernel_size": 3},
    "wide kernel": {"kernel_size": (1, 3), "padding": (0, 1)},
    "stride in one direction": {"kernel_size": 3, "padding": 1, "stride": (2, 1)},
    "dilation in one direction": {"kernel_size": 3, "padding": (1, 2), "dilation": (1, 2)},
    "reflected border": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "padding by name": {"kernel_size": 3, "padding": "same"},
}


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def fused(self) -> int:
        return sum("::conv_norm_act" in name for name in self.names)


class Unit(nn.Module):
    """A unit with everything that it may have, fused or op by op."""

    def __init__(self, fused: bool, residual: bool, options: dict) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, **{"bias": False, **options})
        self.bn = nn.BatchNorm2d(8)
        self.fused, self.residual = fused, residual

    def forward(self, a, b, *rest):
        residual = rest[0] if self.residual else None
        if self.fused:
            return run_unit([a, b], self.conv, self.bn, act="silu", residual=residual)
        y = self.bn(self.conv(torch.cat([a, b], 1)))
        return activate(y if residual is None else y + residual, "silu")


def _inputs(options: dict) -> list[torch.Tensor]:
    xs = [torch.randn(2, 3, 6, 8, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        shape = nn.Conv2d(6, 8, **options).double()(torch.cat(xs, 1)).shape
    return [*xs, torch.randn(shape, dtype=torch.float64)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("case", [*CONVS, *OTHERS])
def test_unit_equals_its_operators(case, residual):
    options = {**CONVS, **OTHERS}[case]
    ours, plain = (Unit(fused, residual, options).double() for fused in (True, False))
    xs = _inputs(options)[: 3 if residual else 2]
    assert_same_function(ours, plain, lambda m, *x: m(*x), lambda m, *x: m(*x), *xs)
    assert ours.bn.num_batches_tracked == plain.bn.num_batches_tracked > 0
    with Operators() as seen, torch.no_grad():
        ours(*xs)
    assert seen.fused() == (case in CONVS)


def test_the_bias_of_a_convolution():
    conv, bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 5, 5)
    for training in (True, False):
        bn.train(training)
        start = bn.running_mean.clone()
        want = torch.relu(bn(conv(x)))
        mean = bn.running_mean.clone()
        bn.running_mean.copy_(start)
        torch.testing.assert_close(run_unit([x], conv, bn), want)
        torch.testing.assert_close(bn.running_mean, mean)


def test_an_input_as_residual_and_upsampled_inputs():
    conv, bn, up = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4).eval(), torch.rand(4, 1, 4, 4)
    x, low = torch.randn(2, 4, 6, 4), torch.randn(2, 4, 3, 2)
    want = torch.relu(bn(conv(torch.cat([x, functional.upsample(low, up, 2)], 1))) + x)
    for hooked in (False, True):
        if hooked:
            conv.register_forward_hook(lambda *_: None)
        y = run_unit([x, low], conv, bn, residual=0, upsample=[None, (up, 2)])
        torch.testing.assert_close(y, want)


@pytest.mark.parametrize(
    "module, channels, units",
    [
        (ConvLevel(3, 8, 2, kernel_size=7, stride=2), 3, 2),
        (Projection(4, 8), 4, 1),
        (BasicBlock(8, 8), 8, 2),
        (Bottleneck(8, 8), 8, 3),
        (SplitBottleneck(32, 32), 32, 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_unit_of_a_module_is_one_operator(module, channels, units):
    x = torch.randn(2, channels, 6, 6)
    for training in (False, True):
        with Operators() as seen, torch.set_grad_enabled(training):
            module.train(training)(x)
        assert seen.fused() == units
        assert not [name for name in seen.names if "batch_norm" in name or name == "aten::relu"]


@pytest.mark.parametrize("change", ["hook", "pre-hook", "replaced forward", "weight norm"])
def test_what_is_watched_or_changed_runs_as_it_is(change):
    conv, bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4).eval()
    x, called = torch.randn(2, 4, 3, 3), []
    want = torch.relu(bn(conv(x)) + x)
    if change == "hook":
        conv.register_forward_hook(lambda *_: called.append(1))
    elif change == "pre-hook":
        bn.register_forward_pre_hook(lambda *_: called.append(1))
    elif change == "replaced forward":
        forward = conv.forward
        conv.forward = lambda x: called.append(1) or forward(x)
    else:
        nn.utils.parametrizations.weight_norm(conv)
    with Operators() as seen, torch.no_grad():
        y = run_unit([x], conv, bn, residual=x)
    torch.testing.assert_close(y, want)
    assert seen.fused() == 0
    assert called or change == "weight norm"


@pytest.mark.parametrize("kernel", [3, 2])
def test_a_residual_of_another_dtype_is_cast(kernel):
    conv, bn = nn.Conv2d(4, 4, kernel, padding=1), nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 5, 5)
    residual = torch.randn(conv(x).shape)
    want = run_unit([x], conv, bn, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        y = run_unit([x.bfloat16()], conv, bn, residual=residual)
    assert y.dtype == torch.bfloat16
    assert relative(y.float(), want) < 0.05
    y = run_unit([x.double()], conv.double(), bn.double(), residual=residual)
    assert y.dtype == torch.float64
