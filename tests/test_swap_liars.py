"""Nodes shaped like a root that do something else when called: each is left alone, and the reason says why."""

from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
import torch.nn.functional as F
from lying_roots import ROOTS, plain, root, where
from swap_helpers import ListRoot, Root, inputs, relative
from torch import nn

import dla_fast

LOG = logging.getLogger(__name__)


@pytest.mark.parametrize("lie", ROOTS)
def test_roots_that_lie(lie):
    make, reason = ROOTS[lie]
    module = make()
    cls, rng, python = type(module), torch.get_rng_state(), random.getstate()
    state, kept = copy.deepcopy(module.state_dict()), dict(module.__dict__)
    report = dla_fast.swap_(module)
    assert not report.swapped, lie
    assert report.skipped[0].reason.startswith("verification failed: ")
    assert reason in report.skipped[0].reason, report.skipped[0].reason
    assert type(module) is cls
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python
    assert module.__dict__ == kept
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_one_that_lies_in_another_width_does_not_hide_behind_its_like():
    cls = where(lambda self, x: self.conv.out_channels > 8, lambda y, x: y.clamp(max=100))
    model = nn.ModuleList([cls(24, 8), cls(30, 10)])
    report = dla_fast.swap_(model)
    assert [e.name for e in report.swapped] == ["0"]
    assert "outputs differ" in report.skipped[0].reason


def test_one_that_lies_does_not_hide_behind_its_like():
    """What agreed once is not asked again: by everything that its forward can see."""

    def made(limit):
        return root(lambda self, *x: plain(self, *x).clamp(max=limit))

    class Limited(Root):
        def forward(self, *x):
            return plain(self, *x).clamp(max=self.limit)

    class Helped(Root):
        def forward(self, *x):
            return self.end(plain(self, *x))

        def end(self, y):
            return y

    def limited(limit):
        module = Limited()
        module.limit = limit
        return module

    lying_helper = type("Helped", (Helped,), {"end": lambda self, y: y.clamp(max=7)})
    model = [made(float("inf"))(), made(50.0)(), limited(float("inf")), limited(50.0), Helped(), lying_helper()]
    report = dla_fast.swap_(nn.ModuleList(model))
    assert [e.name for e in report.swapped] == ["0", "2", "4"], report


@pytest.mark.parametrize("child", ["conv", "bn", "relu"])
def test_children_that_lie(child):
    """Of a class of its own: whatever its name, it is not the library's."""
    kinds = {"conv": nn.Conv2d, "bn": nn.BatchNorm2d, "relu": nn.ReLU}
    lying = type(kinds[child].__name__, (kinds[child],), {"forward": lambda self, x: kinds[child].forward(self, x) * 2})
    model = nn.ModuleList([Root(), Root()])
    getattr(model[1], child).__class__ = lying
    report = dla_fast.swap_(model)
    assert [e.name for e in report.swapped] == ["0"]
    assert report.skipped[0].reason.startswith(f"{child}: ")


class Talks(Root):
    """Prints and logs, and is honest."""

    def forward(self, *x):
        print("called with", len(x))
        LOG.warning("called")
        self.log = LOG
        return plain(self, *x)


class Asserts(Root):
    def forward(self, *x):
        assert len({v.shape[2:] for v in x}) == 1
        assert all(v.dim() == 4 for v in x)
        return plain(self, *x)


class Checkpointed(Root):
    """Two ways to the same."""

    def forward(self, *x):
        if any(v.requires_grad for v in x):
            return self.relu(self.bn(F.conv2d(torch.cat(x, 1), self.conv.weight, self.conv.bias)) + self.added(x))
        return self.relu(self.bn(self.conv(torch.cat(x, 1))) + self.added(x))

    def added(self, x):
        return x[0] if self.residual else 0


class Named(ListRoot):
    """Holds what is no number: a configuration, a logger, functions, all of them left alone."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.config = {"name": "root", "sizes": [1, 2, {"a": None}]}
        self.log, self.make, self.names = LOG, F.relu, {"a", "b"}
        self.config["self"] = self.config

    def forward(self, x_children):
        self.log.debug("%s", self.config["name"])
        return plain(self, *x_children)


@pytest.mark.parametrize("make", [Talks, Asserts, Checkpointed, Named], ids=lambda make: make.__name__)
@pytest.mark.parametrize("residual", [False, True])
def test_the_honest_are_swapped(make, residual):
    module = make(residual=residual)
    if make is Talks:
        module.log = LOG
    xs = inputs()
    given = [xs] if isinstance(module, ListRoot) else xs
    want = module.eval()(*given)
    report = dla_fast.swap_(module)
    assert report.swapped, report
    assert relative(module(*given), want) <= 1e-5
