"""What stock PyTorch refuses a swapped model refuses with the same kind of error, and has written no more by then.

What a shape or out-of-memory fallback catches (``except RuntimeError``) has to be caught around a swapped model, too.
"""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from pairs import LAYOUTS, assert_alike, compare, image, pair, see, step
from torch import nn

import dla_fast
from dla_fast import functional, reference
from dla_fast import nn as fused


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
    ("name", "layout", "training", "cases"),
    [
        ("concatenating", "nchw", True, list(INPUTS)),
        ("adding", "channels_last", False, [wrong for wrong in INPUTS if wrong != "one value"]),
        ("nodes", "channels_last", True, ["channels", "no height", "another dtype", "one value"]),
    ],
)
def test_inputs_of_networks(name, layout, training, cases):
    models = pair(name, layout)
    for wrong in cases:
        given = INPUTS[wrong]

        def scenario(model, x, given=given):
            model.train(training)
            return step(model, x if given.is_floating_point() else given)

        refused(scenario, name, layout, given if given.is_floating_point() else None, models)
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
    for bn in norms(model)[-1:]:
        held = getattr(bn, name).detach()[1:].clone()
        setattr(bn, name, nn.Parameter(held) if name in bn._parameters else held)


def cast(model, name, dtype):
    for bn in norms(model)[-1:]:
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


@pytest.mark.parametrize("momentum", [0, 1.0, None])
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


def unit_arguments(**changed):
    norm = {"bn_weight": of(4), "bn_bias": of(4), "running_mean": of(4), "running_var": of(4).abs() + 1}
    arguments = {"xs": [of(2, 4, 5, 6), of(2, 3, 5, 6)], "weight": of(4, 7, 1, 1), **norm, "training": False}
    return {**arguments, **changed}


def norm_arguments(**changed):
    arguments = unit_arguments(x=of(2, 4, 5, 6))
    del arguments["xs"], arguments["weight"]
    return {**arguments, **changed}


def up_arguments(**changed):
    return {"x": of(2, 3, 5, 6), "weight": of(3, 1, 4, 4), "factor": 2, **changed}


BAD_UNITS = {
    "sizes": {"xs": [of(2, 4, 5, 6), of(2, 3, 6, 6)]},
    "batches": {"xs": [of(2, 4, 5, 6), of(1, 3, 5, 6)]},
    "no height": {"xs": [of(2, 4, 0, 6), of(2, 3, 0, 6)]},
    "channels": {"xs": [of(2, 4, 5, 6), of(2, 4, 5, 6)]},
    "ranks": {"xs": [of(2, 4, 5, 6), of(3, 5, 6)]},
    "no inputs": {"xs": []},
    "none": {"xs": [of(2, 4, 5, 6), None]},
    "dtype of the weight": {"weight": of(4, 7, 1, 1, dtype=torch.float32)},
    "rank of the weight": {"weight": of(4, 7, 1)},
    "no outputs": {"weight": of(0, 7, 1, 1)},
    "size of the bias": {"conv_bias": of(3)},
    "dtype of the bias": {"conv_bias": of(4, dtype=torch.float32)},
    "size of the residual": {"residual": of(2, 4, 5, 7)},
    "channels of the residual": {"residual": of(2, 3, 5, 6)},
    "no momentum left": {"running_mean": None},
    "one of the running statistics": {"running_var": None, "training": True},
    "no running statistics": {"running_mean": None, "running_var": None},
    "size of the scale": {"bn_weight": of(5)},
    "dtype of the shift": {"bn_bias": of(4, dtype=torch.float32)},
    "one value": {"xs": [of(1, 4, 1, 1), of(1, 3, 1, 1)], "training": True},
    "eps below 0": {"eps": -1.0},
}
CONVOLUTIONS = {
    "stride": {"stride": 0},
    "dilation": {"dilation": 0},
    "groups": {"groups": 2},
    "outputs in groups": {"xs": [of(2, 3, 5, 6), of(2, 3, 5, 6)], "weight": of(4, 2, 1, 1), "groups": 3},
}
UPSAMPLED = {
    "sizes": {"xs": [of(2, 4, 5, 6), of(2, 3, 3, 3)], "upsample": [None, (of(3, 1, 4, 4), 2)]},
    "channels of the up-weight": {"xs": [of(2, 4, 4, 6), of(2, 3, 2, 3)], "upsample": [None, (of(4, 1, 4, 4), 2)]},
}
UPS = {
    "channels": {"weight": of(4, 1, 4, 4)},
    "dtype": {"weight": of(3, 1, 4, 4, dtype=torch.float32)},
    "no height": {"x": of(2, 3, 0, 6)},
    "two dimensions": {"x": of(5, 6)},
}
BAD_NORMS = {name: BAD_UNITS[name] for name in ("no running statistics", "size of the scale", "dtype of the shift")}
FUNCTIONS = [
    *(("aggregate", name, unit_arguments(**bad)) for name, bad in BAD_UNITS.items()),
    *(("merge", name, unit_arguments(**BAD_UNITS[name])) for name in ("sizes", "channels", "one value")),
    *(("merge", name, unit_arguments(**bad)) for name, bad in UPSAMPLED.items()),
    *(("conv_norm_act", name, unit_arguments(**bad)) for name, bad in CONVOLUTIONS.items()),
    *(("batch_norm_act", name, norm_arguments(**bad)) for name, bad in BAD_NORMS.items()),
    ("batch_norm_act", "size of the residual", norm_arguments(residual=of(2, 4, 5, 7))),
    ("batch_norm_act", "one value", norm_arguments(x=of(1, 4, 1, 1), training=True)),
    *(("upsample", name, up_arguments(**bad)) for name, bad in UPS.items()),
    ("upsample_add", "size of the skip", up_arguments(skip=of(2, 3, 10, 13))),
]


@pytest.mark.parametrize(("op", "name", "arguments"), FUNCTIONS, ids=[f"{op}-{name}" for op, name, _ in FUNCTIONS])
def test_functions_refuse_as_plain_pytorch_does(op, name, arguments):
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(Exception) as stock:
        getattr(reference, op)(**arguments)
    for key, value in before.items():
        arguments[key].copy_(value)
    with pytest.raises((ValueError, TypeError)) as own:
        getattr(functional, op)(**arguments)
    assert same_kind(stock.value, own.value), (stock.value, own.value)
    assert all(torch.equal(arguments[key], value) for key, value in before.items())
    again = pickle.loads(pickle.dumps(own.value))
    assert type(again) is type(own.value)
    assert str(again) == str(own.value)


@pytest.mark.parametrize("other", ["weight", "conv_bias", "bn_weight", "running_mean", "residual"])
def test_another_device(other):
    """PyTorch says RuntimeError; the device here is one that it would take silently."""
    arguments = unit_arguments(conv_bias=of(4), residual=of(2, 4, 5, 6))
    arguments[other] = arguments[other].to("meta")
    with pytest.raises(RuntimeError, match=f"{other}: expected device cpu") as caught:
        functional.aggregate(**arguments)
    assert isinstance(caught.value, ValueError)


FROZEN = ("channels", "no height", "unbatched", "another dtype", "integers", "odd sizes")


@pytest.mark.parametrize("name", ["nodes", "adding"])
def test_frozen_models(name):
    stock, swapped = pair(name)
    stock.eval(), swapped.eval()
    dla_fast.freeze_(swapped)
    with torch.inference_mode():
        for wrong in FROZEN:
            for _ in range(2):  # what is kept of a good call does not answer a bad one
                good = [model(image()) for model in (stock, swapped)]
                torch.testing.assert_close(*good, rtol=1e-9, atol=1e-9)
                with pytest.raises(Exception) as want:
                    stock(INPUTS[wrong])
                with pytest.raises(type(want.value)) as got:
                    swapped(INPUTS[wrong])
                assert same_kind(want.value, got.value)


MODULES = {
    "node": (lambda: fused.AggregationNode([4, 3], 4), [of(2, 4, 5, 6), of(2, 4, 5, 6)]),
    "norm": (lambda: fused.BatchNormAct2d(4), [of(2, 3, 5, 6)]),
    "ladder": (lambda: fused.IDAUp(4, (4, 6), (1, 2)), [[of(2, 4, 4, 4), of(2, 5, 2, 2)]]),
    "ladder's sizes": (lambda: fused.IDAUp(4, (4, 6), (1, 2)), [[of(2, 4, 4, 4), of(2, 6, 3, 2)]]),
    "ladders": (lambda: fused.DLAUp((4, 6)), [[of(2, 4, 4, 4), of(2, 5, 2, 2)]]),
    "ladders' sizes": (lambda: fused.DLAUp((4, 6)), [[of(2, 4, 4, 4), of(2, 6, 3, 2)]]),
    "upsampling": (lambda: fused.Upsample(4, 2), [of(2, 3, 4, 4)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_raise_what_fallbacks_catch(name):
    make, arguments = MODULES[name]
    module = make().double()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        module(*arguments)
    assert isinstance(caught.value, ValueError)
    # A norm's own counts, as nn.BatchNorm2d has by then.
    changed = [key for key, value in module.state_dict().items() if not torch.equal(value, state[key])]
    assert changed == (["num_batches_tracked"] if name == "norm" else [])


@pytest.mark.parametrize("wrong", ["height", "one value"])
def test_compiled(wrong):
    """A compiled forward pass refuses what the compiled stock one refuses, and takes the next one."""

    def scenario(model, x):
        torch._dynamo.reset()
        compiled = torch.compile(lambda *xs: model.root(*xs), fullgraph=True, backend="aot_eager")
        with pytest.raises(Exception) as caught:
            compiled(*(t.detach() for t in CALLS[wrong](model.left(x), model.right(x))))
        assert isinstance(caught.value, RuntimeError)
        return compiled(model.left(x), model.right(x))

    compare(scenario, "node")
