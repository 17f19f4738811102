"""What the tests of freezing share: a small model with every kind of unit, and what it gives frozen and not."""

from __future__ import annotations

import pytest
import serving
import torch
from model_helpers import randomise, relative
from torch import nn

from dla_fast import use_backend
from dla_fast.nn import BasicBlock, IDAUp
from dla_fast.nn.frozen import KEY
from dla_fast.ops import packed

needs_kernels = pytest.mark.skipif(serving.DISABLED, reason="only the CPU's kernels run from what is kept")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Ladder(nn.Module):
    """A block and a ladder: a residual, a stride, one and two inputs, an input that is upsampled on the way."""

    def __init__(self):
        super().__init__()
        self.block = BasicBlock(8, 16, stride=2)
        self.project = nn.Conv2d(8, 16, 1, 2)
        self.ida = IDAUp(8, (8, 16), (1, 2))

    def forward(self, x):
        return self.ida([x, self.block(x, self.project(x))])[0]


LADDER_UNITS = 4


def counting():
    """A fixture ``calls``: how often a weight was packed, and a unit ran from what was kept."""

    @pytest.fixture
    def calls(monkeypatch):
        counted = {"pack": 0, "run": 0}

        def counted_function(name, function, count=lambda *_: 1):
            def call(*args):
                result = function(*args)
                counted[name] += count(*args) if result is not None else 0
                return result

            return call

        # Packed for our products, or for the library's with the norm folded in; run as a new kind of call, or as known.
        for name, function in (("pack", "pack"), ("pack", "fold"), ("run", "run")):
            monkeypatch.setattr(packed, function, counted_function(name, getattr(packed, function)))
        units_of = counted_function("run", packed.recall, lambda modules, facts, units, *_: len(units))
        monkeypatch.setattr(packed, "recall", units_of)
        with use_backend("cpu"):
            yield counted

    return calls


def ladder(**kwargs):
    model = randomise(Ladder()).eval().to(**kwargs)
    return model, torch.randn(2, 8, 6, 4, **kwargs)


def unfrozen(model, *args):
    """What the model gives without what is kept of it."""
    kept = [(m.__dict__, m.__dict__.pop(KEY)) for m in model.modules() if KEY in m.__dict__]
    with torch.no_grad():
        y = model(*args)
    for where, state in kept:
        where[KEY] = state
    return y


def infer(model, *args):
    with torch.inference_mode():
        return model(*args).clone()


def assert_same(got, want):
    got, want = (list(y) if isinstance(y, (tuple, list)) else [y] for y in (got, want))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert relative(a.double(), b.double()) < TOLERANCE[a.dtype]


def states(model):
    return [m.__dict__[KEY] for m in model.modules() if KEY in m.__dict__]


def optimizer_step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()
