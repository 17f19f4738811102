"""Calls that stock PyTorch refuses: the swapped model refuses them with an error of the same kind, and has written no more.

What a shape or out-of-memory fallback catches (``except RuntimeError``) has to be caught around a swapped model, too.
"""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from nn_helpers import randomise
from pairs import LAYOUTS, assert_alike, compare, image, pair, see, step
from torch import nn

from dla_fast import checks, functional, reference, use_backend
from dla_fast import nn as fused
from examples.networks import Root


def same_kind(stock, other):
    """Whether an error is caught by whatever catches the stock one, and not by a RuntimeError's alone."""
    return isinstance(other, type(stock)) and isinstance(other, RuntimeError) == isinstance(stock, RuntimeError)


def refused(scenario, name, layout="nchw", x=None, models=None, **options):
    """Both models refuse a scenario alike, are alike afterwards, and after a training step that they accept."""
    models = models or pair(name, layout, **options)
    seen = [see(model, scenario, image(layout=layout) if x is None else x) for model in models]
    assert seen[0].raised is not None, "stock accepts it"
    assert_alike(seen)
    assert same_kind(seen[0].raised, seen[1].raised), (seen[0].raised, seen[1].raised)
    return models


def goes_on(models, layout="nchw"):
    """And a step of training afterwards is alike."""
    assert_alike([see(model, step, image(layout=layout)) for model in models])


def of(*size, dtype=torch.float64):
    return torch.linspace(-1, 1, torch.Size(size).numel()).reshape(size).to(dtype)


INPUTS = {
    "channels": of(2, 2, 16, 24),
    "no height": of(2, 3, 0, 24),
    "no width": of(2, 3, 16, 0),
    "unbatched": of(3, 16, 24),
    "five dimensions": of(2, 3, 4, 16, 24),
    "another dtype": of(2, 3, 16, 24, dtype=torch.float32),
    "integers": of(2, 3, 16, 24, dtype=torch.int64),
    "complex": of(2, 3, 16, 24, dtype=torch.complex128),
    "odd sizes": of(2, 3, 17, 22),
    "odd deep down": of(2, 3, 20, 24),
    "too small": of(2, 3, 1, 24),
    "one value": of(1, 3, 8, 8),
}


@pytest.mark.parametrize(
    ("name", "layout", "training", "wrong"),
    [
        *(("concatenating", "nchw", True, wrong) for wrong in INPUTS),
        *(("adding", "channels_last", False, wrong) for wrong in INPUTS if wrong != "one value"),
        *(("nodes", "channels_last", True, wrong) for wrong in ("channels", "no height", "another dtype", "one value")),
    ],
)
def test_inputs_of_networks(name, layout, training, wrong):
    given = INPUTS[wrong]

    def scenario(model, x):
        model.train(training)
        return step(model, x if given.is_floating_point() else given)

    models = refused(scenario, name, layout, given if given.is_floating_point() else None)
    goes_on(models, layout)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["concatenating", "adding", "node", "blocks"])
def test_a_batch_of_none(name, training):
    """Stock takes it, and in training its running statistics are what they are."""

    def scenario(model, x):
        model.train(training)
        return step(model, x)

    compare(scenario, name, x=of(0, 3, 16, 24))


CALLS = {
    "none": lambda a, b: (),
    "one": lambda a, b: (a,),
    "three": lambda a, b: (a, b, a),
    "height": lambda a, b: (a, b[:, :, 1:]),
    "width": lambda a, b: (a[..., 1:], b),
    "batch": lambda a, b: (a, b[:1]),
    "no height": lambda a, b: (a[:, :, :0], b[:, :, :0]),
    "no width in one": lambda a, b: (a, b[..., :0]),
    "channels": lambda a, b: (a, b[:, 1:]),
    "channels of the residual": lambda a, b: (a[:, 1:], torch.cat([b, b[:, :1]], 1)),
    "another dtype": lambda a, b: (a.float(), b.float()),
    "half of them of another dtype": lambda a, b: (a.float(), b.bfloat16()),
    "integers": lambda a, b: (a.long(), b.long()),
    "unbatched": lambda a, b: (a[0], b[0]),
    "one unbatched": lambda a, b: (a, b[0]),
    "five dimensions": lambda a, b: (a[None], b[None]),
    "no tensor": lambda a, b: (a, None),
    "one tensor in another's place": lambda a, b: ([a], b),
    "one value": lambda a, b: (a[:1, :, :1, :1], b[:1, :, :1, :1]),
}


@pytest.mark.parametrize("forced", ["auto", "reference"])
@pytest.mark.parametrize("wrong", CALLS)
def test_calls_of_a_node(wrong, forced):
    def scenario(model, x):
        return model.root(*CALLS[wrong](model.left(x), model.right(x)))

    goes_on(refused(scenario, "node", backend=forced))


SHORTCUTS = {
    "channels": lambda x: x[:, 1:],
    "height": lambda x: x[:, :, 1:],
    "batch": lambda x: torch.cat([x, x, x]),
    "no tensor": lambda x: None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrong", SHORTCUTS)
def test_shortcuts_of_a_block(layout, wrong):
    """Both norms have run by the time that stock adds what does not fit, and so they have in the swapped block."""

    def scenario(model, x):
        x = model.stem(x)
        return model.first(x, SHORTCUTS[wrong](x))

    goes_on(refused(scenario, "blocks", layout), layout)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def narrowed(model, name):
    for bn in norms(model)[1:]:
        held = getattr(bn, name).detach()[1:].clone()
        setattr(bn, name, nn.Parameter(held) if name in bn._parameters else held)


def cast(model, name, dtype):
    for bn in norms(model)[1:]:
        setattr(bn, name, None) if dtype is None else setattr(bn, name, getattr(bn, name).to(dtype))


def with_eps(model, eps):
    for bn in norms(model):
        bn.eps = eps


def with_weights(model, change):
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight = nn.Parameter(change(conv.weight.detach()))


BROKEN = {
    "scale": partial(narrowed, name="weight"),
    "running mean": partial(narrowed, name="running_mean"),
    "dtype of the running mean": partial(cast, name="running_mean", dtype=torch.float32),
    "no running variance": partial(cast, name="running_var", dtype=None),
    "eps below 0": partial(with_eps, eps=-1e-5),
    "no outputs": partial(with_weights, change=lambda w: w[:0]),
    "inputs of a weight": partial(with_weights, change=lambda w: w[:, 1:]),
    "dtype of a weight": partial(with_weights, change=lambda w: w.float()),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("wrong", BROKEN)
@pytest.mark.parametrize("name", ["node", "blocks"])
def test_children_that_do_not_fit(name, wrong, training):
    def scenario(model, x):
        model.train(training)
        BROKEN[wrong](model)
        return step(model, x)

    refused(scenario, name)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["node", "blocks", "adding"])
def test_an_eps_of_zero(name, training):
    """What this PyTorch says to it: newer ones take it in evaluation."""

    def scenario(model, x):
        model.train(training)
        with_eps(model, 0.0)
        return step(model, x)

    seen = [see(model, scenario, image()) for model in pair(name)]
    assert_alike(seen)
    assert all(isinstance(s.raised, ValueError) for s in seen) or not training


@pytest.mark.parametrize("momentum", [0.0, 0, 1.0, 1, None, 2.5])
@pytest.mark.parametrize("name", ["node", "blocks", "concatenating"])
def test_momentum(name, momentum):
    def scenario(model, x):
        for bn in norms(model):
            bn.momentum = momentum
        return [step(model, x * scale) for scale in (1, 2)], model.eval()(x)

    compare(scenario, name)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["node", "blocks", "concatenating", "adding"])
def test_one_value_per_channel_counts_the_batch(name, momentum):
    def scenario(model, x):
        for bn in norms(model):
            bn.momentum = momentum
        step(model, image())
        counts = [int(bn.num_batches_tracked) for bn in norms(model)]
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(x)
        more = [int(bn.num_batches_tracked) - count for bn, count in zip(norms(model), counts, strict=True)]
        assert 1 in more
        return more, step(model, image())

    compare(scenario, name, x=of(1, 3, 8, 8) if name in ("concatenating", "adding") else of(1, 3, 1, 1))
