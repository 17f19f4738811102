"""What swap_ refuses of blocks and Sequentials, and the reasons it gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from block_helpers import BasicBlock, BottleneckX, Functional, Projected, Small, swapped_pair
from torch import nn

import dla_fast


class Lying(BasicBlock):
    """Structured like a block, and something else when called."""

    lie = ""

    def forward(self, x, residual=None):
        if self.lie == "doubled":
            return super().forward(x, 2 * x if residual is None else residual)
        if self.lie == "ignored":
            return super().forward(x, x if residual is None or x.shape == residual.shape else residual)
        if self.lie == "behind":
            y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
            return y + (x if residual is None else residual)
        if self.lie == "before the norm":
            y = self.conv2(self.relu(self.bn1(self.conv1(x)))) + (x if residual is None else residual)
            return self.relu(self.bn2(y))
        if self.lie == "training":
            return super().forward(x, residual) * (1 + self.training)
        if self.lie == "detached":
            return super().forward(x, (x if residual is None else residual).detach())
        if self.lie == "written":
            y = super().forward(x, residual)
            x.data.zero_()
            return y
        return super().forward(x, residual)


@pytest.mark.parametrize("lie", ["doubled", "ignored", "behind", "before the norm", "training", "detached", "written"])
def test_liars_fail_the_verification(lie):
    module = Lying()
    assert dla_fast.swap_(copy.deepcopy(module)).swapped
    module.lie = lie
    # Beside one that tells the truth: what is compared once is compared by all that it depends on.
    report = dla_fast.swap_(nn.ModuleList([Lying(), module]))
    assert [e.name for e in report.swapped] == ["0"]
    assert report.skipped[0].reason.startswith("verification failed: "), report


def _block(make=BasicBlock, **changes):
    module = make()
    for name, value in changes.items():
        setattr(module, name, value)
    return module


class OwnArguments(BasicBlock):
    def forward(self, x, scale, residual=None):
        return scale * super().forward(x, residual)


REFUSED = {
    "other conv": (lambda: _block(conv2=nn.LazyConv2d(8, 3)), "conv2: expected Conv2d, got LazyConv2d"),
    "other norm": (lambda: _block(bn2=nn.GroupNorm(2, 8)), "bn2: expected BatchNorm2d, got GroupNorm"),
    "activation": (lambda: _block(relu=nn.GELU()), "relu: no kernel ends with GELU"),
    "no activation": (lambda: _block(BottleneckX, act2=None), "no activation for bn2"),
    "other functional activation": (type("Smooth", (Functional,), {"act": staticmethod(F.gelu)}), "outputs differ"),
    "no norm": (lambda: _block(conv3=nn.Conv2d(8, 8, 1)), "no child bn3"),
    "further child": (lambda: _block(Projected, se=nn.Sigmoid()), "has more than a block: se (Sigmoid)"),
    "further parameter": (lambda: _block(gain=nn.Parameter(torch.ones(()))), "has more than a block: gain"),
    "features": (lambda: _block(bn1=nn.BatchNorm2d(4)), "bn1: 4 features, the convolution has 8"),
    "channels": (
        lambda: _block(conv2=nn.Conv2d(4, 8, 3, padding=1)),
        "conv2: 4 input channels, the one before gives 8",
    ),
    "no shortcut": (lambda: _block(Projected, downsample=None), "its input has not the output's shape"),
    "two shortcuts": (lambda: _block(Projected, shortcut=nn.Identity()), "both downsample and shortcut"),
    "devices": (lambda: _block(bn1=nn.BatchNorm2d(8, device="meta")), "lie on several devices"),
    "patched": (lambda: _block(forward=sum), "its forward is replaced on the instance"),
    "arguments": (lambda: _block(OwnArguments, downsample=None), "forward takes neither (x) nor (x, shortcut=None)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case):
    make, reason = REFUSED[case]
    module = make()
    report = dla_fast.swap_(module, units="blocks")
    assert not report.swapped
    assert [(e.name, e.kind) for e in report.skipped] == [("", "block")]
    assert reason in report.skipped[0].reason


def test_hooks_on_a_child_are_a_reason_and_those_of_a_shortcut_stay():
    module = Projected()
    module.conv1.register_forward_hook(lambda *_: None)
    assert dla_fast.swap_(module, units="blocks").skipped[0].reason == "conv1: has hooks"
    module, seen = Projected().eval(), []
    module.downsample.register_forward_hook(lambda *_: seen.append(1))
    assert len(dla_fast.swap_(module).swapped) == 2
    assert not seen, "verification calls nobody"
    module(torch.randn(2, 8, 6, 4))
    assert seen == [1]


def test_a_backend_that_cannot_run_is_a_reason():
    report = dla_fast.swap_(Small(), backend="cuda")
    assert not report.swapped
    assert {e.kind for e in report.skipped} == {"conv", "block", "aggregate"}
    assert all(e.reason.startswith("backend 'cuda' cannot run it: ") for e in report.skipped)


def test_a_forced_backend_is_not_the_shortcut_s():
    module, twin = swapped_pair(Projected().eval(), backend="reference", units="blocks")
    seen = []
    twin.downsample.register_forward_hook(lambda *_: seen.append(dla_fast.backend.selected()))
    x = torch.randn(2, 8, 6, 4)
    torch.testing.assert_close(twin(x), module(x))
    assert seen == ["auto"]


def test_meta_device():
    model = Small().to("meta")
    report = dla_fast.swap_(model)
    assert {e.reason for e in report.swapped} == {"verified on the CPU only (meta device)"}
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5, 2, 2)


def test_our_own_modules_are_fused_already():
    own = dla_fast.nn
    model = nn.ModuleList([own.BasicBlock(4, 4), own.ConvLevel(3, 4), own.Projection(4, 8), own.AggregationNode(4, 4)])
    report = dla_fast.swap_(model)
    assert [(e.kind, e.reason) for e in report.skipped] == [
        ("block", "already fused: dla_fast.nn.BasicBlock"),
        ("conv", "already fused: dla_fast.nn.ConvLevel"),
        ("conv", "already fused: dla_fast.nn.Projection"),
        ("aggregate", "already fused: dla_fast.nn.AggregationNode"),
    ]
    assert [e.kind for e in dla_fast.swap_(model, units="blocks").skipped] == ["block"]
