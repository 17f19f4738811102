"""torch.compile makes as many graphs of what is fused as of stock, in every sequence of sizes.

The goal is stock's number, not one: sizes 0 and 1 are always graphs of their own, and stock's convolutions, too, tell
some sizes apart. A graph too many shows here as a number or, where a size is marked as dynamic, as
ConstraintViolationError.
"""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from pairs import LAYOUTS, graphs, image, pair
from torch import Tensor

import dla_fast
from dla_fast import functional, reference

HOW = {"": {}, "dynamic": {"dynamic": True}, "marked": {"marked": (0, 2, 3)}}
# Images, height and width, all of them changing, with sizes of which torch makes graphs of their own.
MIXED = [(2, 4, 6), (3, 4, 6), (3, 5, 6), (4, 8, 4), (5, 7, 7), (1, 4, 4), (2, 1, 3), (0, 3, 3)]


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Op:
    """One operation of an API, on two maps and one of half their size."""

    def __init__(self, api: ModuleType, name: str, training: bool) -> None:
        torch.manual_seed(0)
        self.run, self.name, self.training = getattr(api, name), name, training
        self.up, self.one, self.three = _drawn(3, 1, 4, 4), _drawn(4, 7, 1, 1), _drawn(4, 7, 3, 3)
        self.norm = [_drawn(4), _drawn(4), _drawn(4), _drawn(4).square() + 0.5]
        for t in (self.up, self.one, self.three, *self.norm[:2]):
            t.requires_grad_()

    def __call__(self, x: Tensor, y: Tensor, low: Tensor) -> Tensor:
        if self.name == "upsample":
            return self.run(low, self.up, 2)
        if self.name == "upsample_add":
            return self.run(low, y, self.up, 2)
        norm, options = self.norm, {"training": self.training}
        if self.name == "aggregate":
            return self.run([x, y], self.one, *norm, residual=True, **options)
        if self.name == "merge":
            return self.run([x, low], self.three, *norm, upsample=[None, (self.up, 2)], **options)
        if self.name == "conv_norm_act":
            bias = self.norm[1]
            return self.run([x, y], self.three, *norm, stride=2, conv_bias=bias, act=("leaky_relu", 0.1), **options)
        return self.run(x, *norm, residual=x * 2, act="silu", **options)

    @staticmethod
    def calls(sizes: list[tuple[int, int, int]], layout: str) -> list[list[Tensor]]:
        return [
            [
                _drawn(*shape).contiguous(memory_format=LAYOUTS[layout]).requires_grad_(torch.is_grad_enabled())
                for shape in ((n, 4, 2 * h, 2 * w), (n, 3, 2 * h, 2 * w), (n, 3, h, w))
            ]
            for n, h, w in sizes
        ]


def _of_op(name: str, layout: str, training: bool = True, how: str = "", sizes=None) -> None:
    stock, ours = (
        graphs(Op(api, name, training), Op.calls(sizes or MIXED, layout), **HOW[how]) for api in (reference, functional)
    )
    assert ours == stock


@pytest.mark.parametrize("how", ["", "marked"])
@pytest.mark.parametrize("name", functional.__all__)
def test_operations(name, how):
    _of_op(name, "nchw" if how else "channels_last", how=how)


@pytest.mark.parametrize("name", ["merge", "batch_norm_act"])
def test_frozen_statistics_with_gradients(name):
    _of_op(name, "nchw", training=False, sizes=MIXED[:4])


@torch.no_grad()
def test_inference():
    _of_op("merge", "nchw", training=False, sizes=MIXED[:4])


def _of_model(name: str, sizes: list[tuple[int, int, int]], layout: str = "nchw", **options) -> int:
    calls = [[image(size, layout)] for size in sizes]
    stock, ours = (graphs(model, calls, **options) for model in pair(name, layout))
    assert ours == stock
    return ours


# More sizes than dynamo makes graphs of one function, which in one piece is an error beyond that.
BATCHES = [(n, 5, 6) for n in (2, 3, 5, 7, 9, 11, 13, 15, 17, 19)]


@pytest.mark.parametrize("name", ["node", "blocks"])
def test_ten_batch_sizes(name):
    assert _of_model(name, BATCHES) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heights_and_widths(layout):
    sizes = [(2, 5, 6), (2, 6, 6), (2, 7, 6), (2, 7, 7), (2, 8, 9), (2, 9, 5)]
    assert _of_model("node", sizes, layout) == 3


def test_dynamic():
    _of_model("node", [(2, 5, 6), (3, 6, 7), (4, 9, 8)], **HOW["dynamic"])


@pytest.mark.parametrize("name", ["concatenating", "adding"])
def test_networks(name):
    """One graph, and stock cannot have fewer."""
    swapped = pair(name, verify=False)[1]
    calls = [[image(size)] for size in ((2, 16, 24), (3, 24, 16), (4, 32, 40))]
    assert graphs(swapped, calls, **HOW["marked"]) == 1


@torch.no_grad()
def test_copies():
    """A graph is of every copy of a ladder: nothing in it asks which of them a module is."""
    found = []
    for model in pair("adding", verify=False):
        maps = model.eval().levels(image((2, 8, 8)))
        several = [model.dla_up, copy.deepcopy(model.dla_up)]
        found.append(graphs(lambda one, *xs: one(xs)[0], [(one, *maps) for one in several], backend="eager"))
    assert found == [1, 1]


def test_inductor():
    # Of stock it fixes heights and widths in the backward of convolutions: marked, those are an error there.
    swapped = pair("node", verify=False)[1]
    assert graphs(swapped, [[image((2, 5, 6))], [image((3, 5, 6))]], backend="inductor", marked=(0,)) == 1


def test_what_changes_between_calls():
    """Modes, gradients, layouts and dtypes, back and forth: what has a graph already needs no other."""
    found = []
    for model in pair("node"):

        def calls(model=model):
            for _ in range(2):
                for training, grad, layout, size in (
                    (True, True, "nchw", 5),
                    (False, True, "nchw", 6),
                    (False, False, "nchw", 7),
                    (True, True, "channels_last", 5),
                    (False, False, "channels_last", 6),
                ):
                    model.train(training)
                    with torch.set_grad_enabled(grad):
                        yield [image((2, size, 6), layout)]

        found.append(graphs(model, calls()))
    assert found[0] == found[1]


@torch.no_grad()
def test_frozen_models():
    stock, swapped = (model.eval() for model in pair("blocks"))
    calls = [[image(size)] for size in ((2, 5, 6), (3, 5, 6), (4, 6, 6), (5, 7, 8))]
    dla_fast.freeze_(swapped)
    assert graphs(swapped, calls) == graphs(stock, calls)
