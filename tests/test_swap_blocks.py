"""swap_ on residual blocks and on runs of convolution, norm and activation, and on whole networks with all of them."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from block_helpers import (
    BasicBlock,
    BottleneckX,
    Functional,
    Projected,
    Required,
    Small,
    count_fused_calls,
    swapped_pair,
)
from nn_helpers import randomise, relative
from torch import nn

import dla_fast

# Nodes, blocks and convs.
NETWORKS = {
    "dla34": (6, 12, 7),
    "dla46_c": (6, 12, 6),
    "dla46x_c": (6, 12, 6),
    "dla60x_c": (8, 16, 6),
    "dla60": (8, 16, 7),
    "dla60x": (8, 16, 7),
    "dla102": (14, 28, 7),
    "dla102x": (14, 28, 7),
    "dla102x2": (14, 28, 7),
    "dla169": (23, 46, 7),
    "resnet18": (0, 8, 3),
    "resnet50": (0, 16, 4),
    "torchvision resnet18": (0, 8, 3),
    "torchvision resnet50": (0, 16, 4),
    # A stem of three convolutions, and shortcuts that are pooled first.
    "resnet26d": (0, 8, 5),
    # Its blocks concatenate, so they are nodes as its roots are.
    "dla60_res2net": (24, 0, 7),
}


def create(timm, name: str) -> nn.Module:
    if name.startswith("torchvision "):
        return getattr(importlib.import_module("torchvision.models"), name.split()[1])(num_classes=10)
    return timm.create_model(name, num_classes=10)


@pytest.fixture
def fused_calls(monkeypatch):
    return count_fused_calls(monkeypatch)


def outcome(module, *xs, training):
    module.train(training)
    leaves = [x.clone().requires_grad_() for x in xs]
    y = module(*leaves)
    # Not materialised: a child that a shortcut leaves out has no gradient on either side.
    grads = torch.autograd.grad(y.square().mean(), [*leaves, *module.parameters()], allow_unused=True)
    return [y, *grads, *module.buffers()]


def assert_same(module, twin, *xs, bound=1e-9):
    for training in (False, True):
        for got, want in zip(*(outcome(m, *xs, training=training) for m in (twin, module)), strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                # The gradient of a bias before a batch norm is truly zero: rounding, not to be compared with itself.
                assert (got - want).abs().max() <= bound * max(want.abs().max().item(), 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(timm, name):
    model = create(timm, name).double()
    twin = copy.deepcopy(model)
    report = dla_fast.swap_(twin, verify=False)
    nodes, blocks, runs = NETWORKS[name]
    assert report.counts() == {"nodes": nodes, "ladders": 0, "blocks": blocks, "convs": runs}
    assert not report.skipped, report
    assert list(twin.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        with torch.no_grad():
            y, z = model.train(training)(x), twin.train(training)(x)
        assert relative(z, y) <= 1e-8
    for got, want in zip(twin.buffers(), model.buffers(), strict=True):
        assert relative(got.double(), want.double()) <= 1e-8
    assert dla_fast.unswap_(twin) == nodes + blocks + runs
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", ["dla46x_c", "resnet18", "torchvision resnet18"])
def test_verified_whole_networks(timm, name):
    report = dla_fast.swap_(create(timm, name), on_unsupported="raise")
    assert len(report.swapped) == sum(NETWORKS[name])
    assert not report.skipped
    assert {e.reason for e in report.swapped} == {""}


BLOCKS = {
    "original": (BasicBlock, [(2, 8, 6, 4)]),
    "original, given a shortcut": (lambda: BasicBlock(8, 12, 2), [(2, 8, 6, 4), (2, 12, 3, 2)]),
    "dilated": (lambda: BasicBlock(8, 8, 1, 2), [(2, 8, 6, 4)]),
    "split": (BottleneckX, [(2, 8, 6, 4)]),
    "split, given a shortcut, silu": (
        lambda: BottleneckX(8, 12, 2, nn.SiLU),
        [(2, 8, 6, 4), (2, 12, 3, 2)],
    ),
    "projected": (Projected, [(2, 8, 6, 4)]),
    "functional activations": (Functional, [(2, 8, 6, 4)]),
    "required shortcut": (lambda: Required(4, 8, 2), [(2, 4, 6, 4), (2, 8, 3, 2)]),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(fused_calls, case):
    make, shapes = BLOCKS[case]
    module, twin = swapped_pair(make().double())
    fused_calls.clear()
    assert_same(module, twin, *(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    assert fused_calls.count("block") == 2


@pytest.mark.parametrize("act", [nn.ReLU(True), nn.LeakyReLU(0.2), nn.Hardswish(), nn.ReLU6(), None], ids=str)
def test_runs(fused_calls, act):
    layers = [nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), act]
    layers += [nn.Conv2d(6, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU()]
    module, twin = swapped_pair(nn.Sequential(*filter(None, layers)).double())
    fused_calls.clear()
    assert_same(module, twin, torch.randn(2, 4, 12, 12, dtype=torch.float64))
    assert fused_calls == ["run"] * 4
    assert isinstance(twin, nn.Sequential)
    assert dla_fast.unswap_(twin) == 1
    assert type(twin) is nn.Sequential


def test_a_sequential_without_runs_is_no_candidate():
    class Own(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class Inherited(nn.Sequential):
        pass

    run = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.ModuleList(
        [
            nn.Sequential(nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 4, 1)),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU()),
            nn.Sequential(),
            Own(*run),
            Inherited(*run),
        ]
    )
    report = dla_fast.swap_(model)
    assert [(e.name, e.kind) for e in report.swapped] == [("4", "conv")]
    assert not report.skipped
    assert not dla_fast.swap_(model[4]).swapped


def test_units_choose():
    for units, kinds in (
        ("blocks", ["block"] * 3),
        (("nodes", "convs"), ["conv", "conv", "aggregate"]),
        (["ladders"], []),
        (("nodes", "ladders", "blocks", "convs"), ["conv", "block", "conv", "block", "block", "aggregate"]),
    ):
        model = Small()
        report = dla_fast.swap_(model, units=units)
        assert [e.kind for e in report.swapped] == kinds
        assert not report.skipped
    assert str(report).startswith("swapped 6 (nodes 1, blocks 3, convs 2), skipped 0\n")
    assert [e.reason for e in dla_fast.swap_(model, units="blocks").skipped] == ["already swapped (backend auto)"] * 3


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def test_everything_is_kept_and_restored(fused_calls):
    model = randomise(Small()).eval()
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    kept = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    keys, parameters, rng = list(model.state_dict()), list(model.parameters()), torch.get_rng_state()
    assert len(dla_fast.swap_(model, backend="reference").swapped) == 6
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not dla_fast.swap_(model).swapped
    fused_calls.clear()
    for journey in (copy.deepcopy, _through_pickle):
        twin = journey(model)
        torch.testing.assert_close(twin(x), want)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert fused_calls == ["run", "block", "run", "block", "block"] * 2
    assert dla_fast.unswap_(model) == 6
    for name, m in model.named_modules():
        cls, attributes = kept[name]
        assert type(m) is cls
        assert all(m.__dict__[k] is v for k, v in attributes.items())
    assert torch.equal(model(x), want)
