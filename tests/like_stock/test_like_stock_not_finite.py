"""A value that is not finite in an image: it stands where it stands in stock, whether or not the loss looks there."""

from __future__ import annotations

import itertools

import pytest
import torch
from pairs import ALL, LAYOUTS, NETWORKS, PARTS, compare, image

NAN, INFINITY = float("nan"), float("inf")
# Parts with each value in each layout, whole networks with one of each.
CASES = [(name, layout, value) for name in PARTS for layout in LAYOUTS for value in (NAN, INFINITY, -INFINITY)]
CASES += [(name, *case) for name in NETWORKS for case in zip(LAYOUTS, (NAN, INFINITY), strict=True)]


@pytest.mark.parametrize(("name", "layout", "value"), CASES)
def test_the_loss_looks_elsewhere_and_norms_are_frozen(name, layout, value):
    x = image((2, 32, 24), layout=layout)
    x[0, 1, 4, 5] = value

    def scenario(model, x):
        model.eval()
        y = model(x)
        # What is finite in one image alone, of which the other has no part.
        torch.where(y.isfinite(), y, 0.0).sin().sum().backward()
        return y

    stock, _ = compare(scenario, name, layout, x)
    assert stock.values["input.grad"][1].isfinite().all()


@pytest.mark.parametrize(("name", "layout"), list(zip(ALL, itertools.cycle(LAYOUTS), strict=False)))
def test_running_statistics_of_training(name, layout):
    x = image(layout=layout)
    # Among those that a mean is guessed from.
    x[0, 2, 0, 1] = INFINITY

    def scenario(model, x):
        y = model(x)
        y.sum().backward()
        return y

    compare(scenario, name, layout, x)
