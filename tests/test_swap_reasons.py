"""What swap_ refuses, and the reasons it gives; its options and its report."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from swap_helpers import Pair, Root, inputs, relative
from torch import nn
from torch.nn.utils import parametrizations

import dla_fast
from dla_fast.swap import surgery


class FrozenBatchNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))

    def forward(self, x):
        return x * self.weight[:, None, None]


class NormInConvRoot(nn.Module):
    """As dd3d has it: the norm belongs to the convolution, and there is no activation module."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(24, 8, 1)
        self.conv.norm = nn.BatchNorm2d(8)
        self.residual = True

    def forward(self, *x):
        return F.relu(self.conv.norm(self.conv(torch.cat(x, 1))) + x[0])


class TwoArguments(Root):
    def forward(self, a, b):
        return super().forward(a, b)


class OwnPickling(Root):
    def __reduce__(self):
        return (OwnPickling, ())


class Gated(Root):
    """Equal to a Root until it is trained."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, *x):
        return super().forward(*x) * (1 + self.gate)


def _node(**changes):
    node = Root()
    for name, value in changes.items():
        setattr(node, name, value)
    return node


def _without(name):
    node = Root()
    delattr(node, name)
    return node


def _changed(change, node=None):
    node = node or Root()
    change(node)
    return node


REFUSED = {
    "kernel": (lambda: Root(kernel_size=3), "conv: kernel_size is (3, 3), expected (1, 1)"),
    "padding": (lambda: _node(conv=nn.Conv2d(24, 8, 1, padding=1)), "conv: padding is (1, 1), expected (0, 0)"),
    "stride": (lambda: _node(conv=nn.Conv2d(24, 8, 1, stride=2)), "conv: stride is (2, 2)"),
    "groups": (lambda: _node(conv=nn.Conv2d(24, 8, 1, groups=2)), "conv: groups is 2"),
    "dilation": (lambda: _node(conv=nn.Conv2d(24, 8, 1, dilation=2)), "conv: dilation is (2, 2)"),
    "padding mode": (
        lambda: _node(conv=nn.Conv2d(24, 8, 1, padding_mode="reflect")),
        "conv: padding_mode is 'reflect'",
    ),
    "other conv": (lambda: _node(conv=nn.Linear(24, 8)), "conv: expected Conv2d, got Linear"),
    "lazy conv": (lambda: _node(conv=nn.LazyConv2d(8, 1)), "conv: expected Conv2d, got LazyConv2d"),
    "group norm": (lambda: _node(bn=nn.GroupNorm(2, 8)), "bn: expected BatchNorm2d, got GroupNorm"),
    "frozen norm": (lambda: _node(bn=FrozenBatchNorm(8)), "bn: expected BatchNorm2d, got FrozenBatchNorm"),
    "activation": (lambda: _node(relu=nn.GELU()), "relu: no kernel ends with GELU"),
    "relu6": (lambda: _node(relu=nn.ReLU6()), "relu: no kernel ends with ReLU6"),
    "hooks": (lambda: _changed(lambda n: n.bn.register_forward_hook(print)), "bn: has hooks"),
    "pre-hooks": (lambda: _changed(lambda n: n.conv.register_forward_pre_hook(print)), "conv: has hooks"),
    "weight norm": (lambda: _changed(lambda n: parametrizations.weight_norm(n.conv)), "conv: has parametrizations"),
    "patched child": (lambda: _changed(lambda n: setattr(n.relu, "forward", abs)), "relu: its forward is replaced"),
    "patched": (lambda: _changed(lambda n: setattr(n, "forward", sum)), "its forward is replaced on the instance"),
    "no bn": (lambda: _without("bn"), "no child bn or norm"),
    "no flag": (lambda: _without("residual"), "no attribute residual or shortcut"),
    "no conv": (lambda: _without("conv"), "no child conv"),
    "two flags": (lambda: _node(shortcut=True), "both residual and shortcut"),
    "flag": (lambda: _node(residual=1), "residual: expected a bool, got 1"),
    "residual channels": (lambda: Root(4, residual=True), "4 input channels cannot hold a residual of 8"),
    "further child": (lambda: _node(drop=nn.Dropout(0.0)), "has more than a node: drop"),
    "further parameter": (Gated, "has more than a node: gate"),
    "features": (lambda: _node(bn=nn.BatchNorm2d(4)), "bn: 4 features, the convolution has 8"),
    "signature": (TwoArguments, "forward takes neither *xs nor one list"),
    "pickling": (OwnPickling, "OwnPickling defines how it is pickled"),
    "devices": (lambda: _node(bn=nn.BatchNorm2d(8, device="meta")), "lie on several devices"),
    "several": (
        lambda: _node(conv=nn.Conv2d(24, 8, 3), bn=nn.GroupNorm(2, 8)),
        "conv: kernel_size is (3, 3), expected (1, 1); bn: expected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case):
    make, reason = REFUSED[case]
    node = make()
    model = nn.Sequential(Root(), node)
    cls, attributes = type(node), dict(node.__dict__)
    report = dla_fast.swap_(model)
    assert [e.name for e in report.swapped] == ["0"]
    assert [(e.name, e.kind) for e in report.skipped] == [("1", "aggregate")]
    assert reason in report.skipped[0].reason
    assert type(node) is cls
    assert node.__dict__ == attributes


def test_timm_root_with_padding(timm):
    model = timm.create_model("dla34", num_classes=10)
    model.level2.root = type(model.level2.root)(128, 64, 3, False)
    report = dla_fast.swap_(model, units="nodes")
    assert len(report.swapped) == 5
    assert [(e.name, e.reason) for e in report.skipped] == [("level2.root", "conv: padding is (1, 1), expected (0, 0)")]


class Liar(Root):
    """Structured like a Root, and something else when called."""

    lie = "none"

    def forward(self, *x):
        if self.lie == "order":
            x = x[::-1]
        if self.lie == "detach":
            x = (x[0].detach(), *x[1:])
        if self.lie == "conv input":
            return self.relu(self.conv(self.bn.weight.sum() * torch.cat(x, 1)))
        if self.lie == "two inputs":
            assert len(x) == 2
        y = self.bn(self.conv(torch.cat(x, 1)))
        if self.lie == "scale":
            y = y * 1.0001
        if self.lie == "dropout":
            y = F.dropout(y, 0.5, self.training)
        if self.lie == "no activation":
            return y
        if self.lie == "list":
            return [self.relu(y)]
        if self.lie == "residual behind":
            return self.relu(y) + x[0]
        if self.lie == "last residual":
            y = y + x[-1]
        elif self.residual:
            y = y + x[0]
        y = self.relu(y)
        if self.lie == "buffers" and self.training:
            self.bn.running_mean.zero_()
        if self.lie == "relu in place":
            F.relu_(x[0].data)
        return y.double().to(y.dtype) if self.lie == "none" else y


def _liar(lie, residual=False):
    node = Liar(residual=residual)
    node.lie = lie
    return node


LIES = [
    "order",
    "detach",
    "conv input",
    "two inputs",
    "scale",
    "dropout",
    "no activation",
    "list",
    "residual behind",
    "buffers",
    "relu in place",
]


@pytest.mark.parametrize("lie, residual", [*((lie, False) for lie in LIES), ("last residual", True)])
def test_liars_fail_the_verification(lie, residual):
    node = _liar(lie, residual)
    rng, state = torch.get_rng_state(), copy.deepcopy(node.state_dict())
    report = dla_fast.swap_(node)
    assert not report.swapped
    assert report.skipped[0].reason.startswith("verification failed: ")
    assert type(node) is Liar
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in node.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_verification_sees_through_low_precision(dtype):
    assert "verification failed" in dla_fast.swap_(_liar("scale").to(dtype)).skipped[0].reason
    assert dla_fast.swap_(_liar("none").to(dtype)).swapped


def test_verification_on_the_meta_device():
    assert "verification failed" in dla_fast.swap_(_liar("order").to("meta")).skipped[0].reason


def test_verification_does_not_depend_on_the_weights():
    node = _liar("order")
    nn.init.zeros_(node.bn.weight)
    assert "verification failed" in dla_fast.swap_(node).skipped[0].reason


def test_verify_false_trusts_the_structure():
    report = dla_fast.swap_(_liar("scale"), verify=False)
    assert [e.reason for e in report.swapped] == ["not verified"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_swap_inside_a_context(context):
    with context():
        assert len(dla_fast.swap_(Pair(), on_unsupported="raise").swapped) == 2


def test_verification_calls_nobody():
    """No hook of the node runs, and nothing that only the node refers to is copied."""

    class Big:
        def __deepcopy__(self, memo):
            raise AssertionError("was copied")

    node = Root()
    node.register_forward_hook(functools.partial(pytest.fail, Big()))
    assert dla_fast.swap_(node).swapped


def test_shared_node_is_swapped_once():
    shared = Root()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    report = dla_fast.swap_(model)
    assert [(e.name, e.reason) for e in report.swapped] == [("a", "the same module is also b.c")]
    assert model["a"] is model["b"]["c"]


def test_aggregation_node_is_fused_already():
    model = nn.Sequential(dla_fast.nn.AggregationNode(24, 8), Root())
    report = dla_fast.swap_(model, on_unsupported="raise")
    assert [e.name for e in report.swapped] == ["1"]
    assert [(e.name, e.reason) for e in report.skipped] == [("0", "already fused: dla_fast.nn.AggregationNode")]


def test_a_node_that_no_kernel_serves_says_so(monkeypatch):
    monkeypatch.setattr(dla_fast.backend, "can_run", lambda backend, *rest: None if backend == "reference" else "none")
    (entry,) = dla_fast.swap_(Root()).swapped
    assert entry.reason.startswith("no kernel serves it here, so it runs on the PyTorch reference")
    with dla_fast.use_backend("reference"):
        (entry,) = dla_fast.swap_(Root()).swapped
    assert entry.reason == ""


def test_what_is_no_node_is_not_listed(timm):
    report = dla_fast.swap_(timm.create_model("resnet18", num_classes=10), units=("nodes", "ladders"))
    assert report.to_dict() == {"swapped": [], "skipped": [], "dry_run": False}


def test_names_of_others():
    node = Root(residual=True)
    node.norm, node.act, node.add_identity = node.bn, node.relu, node.residual
    del node.bn, node.relu, node.residual
    cls = type("Fuse", (Root,), {"forward": lambda s, *x: s.act(s.norm(s.conv(torch.cat(x, 1))) + x[0])})
    node.__class__ = cls
    xs = inputs()
    want = node.eval()(*xs)
    assert dla_fast.swap_(node).swapped
    assert relative(node(*xs), want) <= 1e-5


def test_filter():
    model, seen = Pair(), []
    report = dla_fast.swap_(
        model, filter_fn=lambda name, m: seen.append((name, m)) or name != "first", on_unsupported="raise"
    )
    assert seen == [("first", model.first), ("second", model.second)]
    assert [e.name for e in report.swapped] == ["second"]
    assert [(e.name, e.reason) for e in report.skipped] == [("first", "left out by filter_fn")]
    assert type(model.first) is Root


def test_dry_run():
    model = nn.Sequential(Root(), Root(kernel_size=3))
    dry = dla_fast.swap_(model, dry_run=True)
    assert [type(m) for m in model] == [Root, Root]
    real = dla_fast.swap_(model)
    assert (dry.swapped, dry.skipped, dry.dry_run) == (real.swapped, real.skipped, True)
    assert str(dry).startswith("would swap 1 (nodes 1), skipped 1")


def test_raise_lists_the_reasons_and_swaps_nothing():
    model = nn.Sequential(Root(), Root(kernel_size=3), _liar("scale"))
    with pytest.raises(ValueError, match="2 of 3 modules") as error:
        dla_fast.swap_(model, on_unsupported="raise")
    assert "\n  1: conv: kernel_size is (3, 3)" in str(error.value)
    assert "\n  2: verification failed: " in str(error.value)
    assert [type(m) for m in model] == [Root, Root, Liar]


def test_failure_in_the_middle_leaves_the_model(monkeypatch):
    model, rebind, calls = Pair(), surgery.rebind, []

    def failing(module, cls):
        calls.append(cls)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rebind(module, cls)

    monkeypatch.setattr(surgery, "rebind", failing)
    with pytest.raises(KeyboardInterrupt):
        dla_fast.swap_(model)
    assert [type(m) for m in model.children()] == [Root, Root]


def test_forced_backend_that_cannot_run():
    model = Pair()
    report = dla_fast.swap_(model, backend="cuda")
    assert not report.swapped
    assert all(e.reason.startswith("backend 'cuda' cannot run it: ") for e in report.skipped)
    with pytest.raises(ValueError, match="2 of 2 modules"):
        dla_fast.swap_(model, backend="cuda", on_unsupported="raise")


def test_forced_backend_stays_with_the_node(monkeypatch):
    model = Pair().eval()
    dla_fast.swap_(model, backend="reference")
    seen = []
    monkeypatch.setattr(
        dla_fast.backend, "can_run", lambda *a: seen.append(a) or ("not here" if a[0] != "reference" else None)
    )
    with dla_fast.use_backend("triton"):
        model(*inputs())
        assert dla_fast.backend.selected() == "triton"
    assert {a[0] for a in seen} == {"reference"}
    assert len(seen) == 2


@pytest.mark.parametrize(
    "error, arguments, message",
    [
        (ValueError, {"backend": "tpu"}, "unknown backend 'tpu', expected auto, reference"),
        (ValueError, {"units": "roots"}, "unknown unit 'roots', expected some of nodes, ladders, blocks, convs"),
        (ValueError, {"units": ()}, "units: expected one or more of nodes, ladders, blocks, convs, got none"),
        (TypeError, {"units": (1,)}, "units: expected names, got 1"),
        (ValueError, {"on_unsupported": "warn"}, "on_unsupported: expected 'skip' or 'raise', got 'warn'"),
    ],
)
def test_bad_options(error, arguments, message):
    model = Pair()
    with pytest.raises(error, match=message):
        dla_fast.swap_(model, **arguments)
    assert type(model.first) is Root


def test_not_a_module():
    for function in (dla_fast.swap_, dla_fast.unswap_):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
            function({})


def test_report():
    model = nn.Sequential(Root(), Root(kernel_size=3))
    report = dla_fast.swap_(model)
    lines = str(report).splitlines()
    assert lines[0] == "swapped 1 (nodes 1), skipped 1"
    assert len({line.index(word) for line, word in zip(lines[1:], ["result", "swapped", "skipped"], strict=True)}) == 1
    assert "kernel_size is (3, 3)" in lines[3]
    assert json.loads(json.dumps(report.to_dict())) == {
        "swapped": [{"name": "0", "kind": "aggregate", "reason": ""}],
        "skipped": [{"name": "1", "kind": "aggregate", "reason": report.skipped[0].reason}],
        "dry_run": False,
    }
    assert "nothing in the model resembles" in str(dla_fast.swap_(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())))
