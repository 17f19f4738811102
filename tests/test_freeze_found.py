"""Frozen, swapped modules answer a call like one before without looking at their children: what they would miss."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from freeze_helpers import counting, infer, needs_kernels
from model_helpers import randomise, relative
from swap_helpers import Root
from torch import nn

import dla_fast
from dla_fast import use_backend
from dla_fast.nn.facts import of_dict, of_module
from dla_fast.nn.frozen import KEY
from dla_fast.ops import packed

calls = counting()
pytestmark = needs_kernels


class Block(nn.Module):
    """A block whose forward reads an attribute that does nothing at first."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1)
        self.conv2, self.bn2, self.act2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.downsample = nn.AvgPool2d(2, 2)
        self.drop = nn.Identity()
        self.scale = 1.0

    def forward(self, x):
        y = self.drop(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.act2(y * self.scale + self.downsample(x))


class Model(nn.Module):
    """A run, a block and a node."""

    def __init__(self):
        super().__init__()
        self.run = nn.Sequential(
            OrderedDict(
                a=nn.Conv2d(3, 8, 3, padding=1), b=nn.BatchNorm2d(8), c=nn.SiLU(),
                d=nn.Conv2d(8, 8, 1), e=nn.BatchNorm2d(8), f=nn.ReLU(),
            )
        )  # fmt: skip
        self.block = Block()
        self.root = Root(16, residual=True)

    def forward(self, x):
        y = self.block(self.run(x))
        return self.root(y, y.flip(1))


UNITS = 5


def pair():
    stock = randomise(Model()).eval()
    swapped = copy.deepcopy(stock)
    report = dla_fast.swap_(swapped)
    assert len(report.swapped) == 3, report
    dla_fast.freeze_(swapped)
    return stock, swapped


def last_first(m):
    for name in ("a", "b", "c"):
        m.run._modules[name] = m.run._modules.pop(name)
    m.run.d = nn.Conv2d(3, 8, 1)
    m.run.a = nn.Conv2d(8, 8, 3, padding=1)


def hooked(child):
    child.register_forward_hook(lambda m, a, y: y * 2)


CHANGES = {
    "attribute": lambda m: setattr(m.block, "scale", 0.1),
    "flag": lambda m: setattr(m.root, "residual", False),
    "slope": lambda m: setattr(m.block.act1, "negative_slope", 0.7),
    "activation of a block": lambda m: setattr(m.block, "act2", nn.SiLU()),
    "activation of a run": lambda m: setattr(m.run, "c", nn.ReLU()),
    "activation of a node": lambda m: setattr(m.root, "relu", nn.Identity()),
    "hook of an activation": lambda m: hooked(m.block.act1),
    "hook of a convolution": lambda m: hooked(m.run.a),
    "pre-hook of a norm": lambda m: m.root.bn.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "hook of what did nothing": lambda m: hooked(m.block.drop),
    "forward of a convolution": lambda m: setattr(m.block.conv2, "forward", lambda x: x * 2),
    "forward of an activation": lambda m: setattr(m.run.f, "forward", lambda x: x * 2),
    "convolution": lambda m: setattr(m.block, "conv2", nn.Conv2d(8, 8, 1)),
    "norm": lambda m: setattr(m.run, "e", nn.BatchNorm2d(8, affine=False)),
    "other norm": lambda m: setattr(m.root, "bn", nn.GroupNorm(2, 8)),
    "what did nothing": lambda m: setattr(m.block, "drop", nn.Tanh()),
    "shortcut": lambda m: setattr(m.block, "downsample", nn.MaxPool2d(2, 2)),
    "another child": lambda m: m.run.append(nn.Tanh()),
    "order": last_first,
    "padding mode": lambda m: setattr(m.block.conv2, "padding_mode", "circular"),
    "padding": lambda m: [setattr(m.run.d, "padding", (1, 1)), setattr(m.run.a, "padding", (0, 0))],
    "dilation": lambda m: [setattr(m.block.conv2, name, (2, 2)) for name in ("dilation", "padding")],
    "epsilon": lambda m: setattr(m.run.b, "eps", 0.5),
    "training": lambda m: m.root.bn.train(),
    "weight": lambda m: setattr(m.run.d, "weight", nn.Parameter(m.run.d.weight.detach() * 2)),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes(calls, change):
    stock, swapped = pair()
    x = torch.randn(2, 3, 6, 8)
    before = [infer(swapped, x) for _ in range(2)][1]
    assert calls["run"] == 2 * UNITS
    assert relative(before, infer(stock, x)) < 1e-5
    for model in (stock, swapped):
        torch.manual_seed(1)
        CHANGES[change](model)
        for name in ("conv2", "bn2"):
            if change != "training":
                getattr(model.block, name).eval()
    x = x.to(next(stock.parameters()).dtype)
    want = infer(stock, x)
    for _ in range(2):
        got = infer(swapped, x)
        assert got.dtype == want.dtype
        assert relative(got, want) < 1e-5
        if change == "training":
            want = infer(stock, x)
    if change != "double":
        assert relative(before, want) > 1e-3


def test_calls_of_other_kinds(calls):
    """Shapes, layouts and dtypes one after another, as often as it takes to know them."""
    stock, swapped = pair()
    for _ in range(2):
        for size in ((2, 3, 6, 8), (1, 3, 6, 8), (2, 3, 8, 6), (2, 3, 6, 10)):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(size).to(memory_format=layout)
                assert relative(infer(swapped, x), infer(stock, x)) < 1e-5
    with pytest.raises(RuntimeError):
        infer(swapped, torch.randn(2, 3, 6, 8).double())
    with pytest.raises(ValueError, match="input channels"):
        infer(swapped, torch.randn(2, 4, 6, 8))
    # A shortcut that is broadcast, once the block has been called with one that is not.
    x = torch.randn(2, 3, 3, 3)
    assert relative(infer(swapped, x), infer(stock, x)) < 1e-5


def test_who_else_is_about():
    stock, swapped = pair()
    x = torch.randn(2, 3, 6, 8)
    for _ in range(2):
        want = infer(swapped, x)
    with torch.inference_mode(), use_backend("reference"):
        assert relative(swapped(x), want) < 1e-5
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m)))
    try:
        infer(swapped, x)
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == UNITS
    with pytest.warns(UserWarning, match="gradients enabled"):
        assert swapped(x).requires_grad
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert swapped(x).dtype == torch.bfloat16
    with torch.no_grad():
        mapped = torch.vmap(lambda t: swapped(t[None])[0])(x)
        traced = torch.jit.trace(swapped, x)
    assert relative(mapped, want) < 1e-5
    assert "batch_norm" in str(traced.inlined_graph)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        swapped(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    dla_fast.unfreeze_(swapped)
    assert relative(infer(swapped, x), want) < 1e-5
    dla_fast.unswap_(swapped)
    assert torch.equal(infer(swapped, x), infer(stock, x))


def test_copies_do_not_share_what_was_found(calls):
    _, swapped = pair()
    x = torch.randn(2, 3, 6, 8)
    want = [infer(swapped, x) for _ in range(2)][1]
    twin = copy.deepcopy(swapped)
    # A shallow copy shares parameters, and what is frozen, but not its options.
    wider = copy.copy(swapped.run.a)
    wider.stride = (2, 2)
    other = nn.Sequential(wider, swapped.run.b, swapped.run.c).eval()
    dla_fast.swap_(other, verify=False)
    with torch.no_grad():
        swapped.run.a.weight.mul_(3)
    for _ in range(2):
        assert relative(infer(twin, x), want) < 1e-5
        assert infer(other, x).shape == (2, 8, 3, 4)
        assert relative(infer(swapped, x), want) > 1e-3


def test_what_is_kept_of_old_weights_is_freed():
    _, swapped = pair()
    x = torch.randn(2, 3, 6, 8)
    for _ in range(5):
        with torch.no_grad():
            swapped.run.a.weight.mul_(1.1)
        for _ in range(2):
            infer(swapped, x)
    frozen = swapped.run.a.__dict__[KEY]
    assert [len(unit.calls) for unit in frozen._units.values()] == [1]
    assert list(frozen.found) == [id(swapped.run)]


class Shortcut(nn.Module):
    """A block with a shortcut that counts."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


@pytest.mark.parametrize("change", ["weight", "hook", "norm in training", "gradients"])
def test_what_makes_the_shortcut_is_called_once(change):
    def changed(m):
        m.downsample[1].train()
        if change == "hook":
            m.conv2.register_forward_hook(lambda m, a, y: y * 2)
        elif change == "norm in training":
            m.bn2.train()
        elif change == "gradients":
            for p in (*m.conv1.parameters(), *m.bn1.parameters()):
                p.requires_grad_(False)

    stock = randomise(Shortcut()).eval()
    swapped = copy.deepcopy(stock)
    dla_fast.swap_(swapped)
    dla_fast.freeze_(swapped)
    x = torch.randn(2, 4, 5, 6)
    for _ in range(2):
        infer(swapped, x)
    for m in (stock, swapped):
        changed(m)
    for _ in range(3):
        for m in (stock, swapped):
            with torch.no_grad():
                m.conv2.weight.mul_(1.1)
            with torch.set_grad_enabled(change == "gradients"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                m.y = m(x)
        assert relative(swapped.y, stock.y) < 1e-5
    assert swapped.downsample[1].num_batches_tracked == stock.downsample[1].num_batches_tracked == 3
    assert relative(swapped.downsample[1].running_mean, stock.downsample[1].running_mean) < 1e-5


class Meddling(nn.AvgPool2d):
    """Changes the block that it belongs to, once, while that runs."""

    def forward(self, x):
        if self.meddle is not None:
            self.meddle(self.block[0])
            self.meddle = None
        return super().forward(x)


@pytest.mark.parametrize("change", ["attribute", "hook of an activation", "forward of a convolution", "slope"])
def test_changes_while_a_call_runs(change):
    models = []
    for swapping in (False, True):
        torch.manual_seed(0)
        model = randomise(Block()).eval()
        model.downsample = Meddling(2, 2)
        model.downsample.meddle, model.downsample.block = None, [model]
        if swapping:
            assert dla_fast.swap_(model).swapped
            dla_fast.freeze_(model)
        model.downsample.meddle = lambda block: CHANGES[change](Namespace(block=block))
        models.append(model)
    stock, swapped = models
    x = torch.randn(2, 8, 6, 8)
    for m in models:
        infer(m, x)
    for _ in range(3):
        assert relative(infer(swapped, x), infer(stock, x)) < 1e-5


def test_a_flag_of_the_class():
    class Flagged(nn.Module):
        residual = False

        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, *x):
            y = self.bn(self.conv(torch.cat(x, 1)))
            return self.relu(y + x[0] if self.residual else y)

    stock = randomise(Flagged()).eval()
    swapped = copy.deepcopy(stock)
    dla_fast.swap_(swapped)
    dla_fast.freeze_(swapped)
    xs = [torch.randn(2, 8, 5, 6) for _ in range(2)]
    for flag in (False, False, True, True):
        Flagged.residual = flag
        assert relative(infer(swapped, *xs), infer(stock, *xs)) < 1e-5


def test_options_that_are_lists():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()
    dla_fast.swap_(model)
    dla_fast.freeze_(model)
    model[0].stride = [1, 1]
    x = torch.randn(1, 4, 6, 6)
    for _ in range(2):
        assert infer(model, x).shape == (1, 4, 6, 6)
    model[0].stride[:] = [2, 2]
    assert infer(model, x).shape == (1, 4, 3, 3)


def test_units_before_one_that_cannot_be_kept_run_once(calls):
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4)).eval()
    dla_fast.swap_(model, verify=False)
    dla_fast.freeze_(model)
    for _ in range(3):
        infer(model, torch.randn(1, 4, 6, 6))
    assert calls["run"] == 3


def test_no_cycle_keeps_a_model_alive():
    _, swapped = pair()
    for _ in range(2):
        infer(swapped, torch.randn(2, 3, 6, 8))
    gone = [weakref.ref(swapped.run.a.weight), weakref.ref(swapped.block.conv2), weakref.ref(swapped.root)]
    gc.collect()
    gc.disable()
    try:
        del swapped
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


def test_facts():
    module = nn.Conv2d(2, 2, 1)
    facts = (*of_module(0, module, "stride"), *of_dict(module._parameters, "weight", "nothing"))
    assert packed.unchanged((), ())
    assert packed.unchanged((module,), facts)
    assert not packed.unchanged((nn.Conv2d(2, 2, 1, 2),), facts)
    assert not packed.unchanged((nn.Identity(),), facts)
    module.forward = None
    assert not packed.unchanged((module,), facts)
    del module.forward
    assert packed.unchanged((module,), facts)
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert not packed.unchanged((module,), facts)
    handle.remove()
    module.nothing = nn.Parameter(torch.ones(1))
    assert not packed.unchanged((module,), facts)
    del module.nothing
    module.stride = (2, 2)
    assert not packed.unchanged((module,), facts)
    with pytest.raises(IndexError):
        packed.unchanged((), facts)
    with pytest.raises(TypeError):
        packed.unchanged((), ("no dict", 2, ...))
