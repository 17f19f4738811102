"""Tensors made under torch.inference_mode and read where gradients are recorded: what works in stock works, and what
stock refuses is refused with an error of its class, before anything is written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pairs import LAYOUTS, compare, image, loss_of, pair
from torch import nn

from dla_fast import functional, reference, use_backend


def inferred(t):
    with torch.inference_mode():
        return t.detach().clone(memory_format=torch.preserve_format)


def ladder(model, x, training, which):
    model.train(training)
    with torch.no_grad():
        levels = model.levels(x)
    y = model.dla_up([inferred(level) if i in which else level for i, level in enumerate(levels)])[0]
    loss_of(y).backward()
    return y


@pytest.mark.parametrize(
    ("name", "layout", "training"),
    [("concatenating", "nchw", True), ("adding", "channels_last", True), ("concatenating", "channels_last", False)],
)
def test_a_ladder_trains_over_a_level_of_inference(name, layout, training):
    """The finest is what it concatenates or adds."""
    compare(lambda model, x: ladder(model, x, training, (0,)), name, layout)


@pytest.mark.parametrize("name", ["concatenating", "adding"])
def test_a_ladder_over_levels_of_inference(name):
    """What it projects PyTorch has to save."""
    stock, swapped = compare(lambda model, x: ladder(model, x, True, (0, 1, 2, 3)), name)
    assert isinstance(stock.raised, RuntimeError)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_a_root_trains_over_children_of_inference(training, layout):
    def run(model, x):
        model.train(training)
        with torch.inference_mode():
            left = model.left(x)
        y = model.root(left, model.right(x))
        loss_of(y).backward()
        both = model.root(left, inferred(model.right(x)))
        loss_of(both).backward()
        return y, both

    compare(run, "node", layout)


def test_a_shortcut_of_inference():
    def run(model, x):
        with torch.inference_mode():
            shortcut = model.stem(x)
        y = model.first(model.stem(x), shortcut)
        loss_of(y).backward()
        return y

    compare(run, "blocks")


KINDS = ["weights", "scales", "shifts", "parameters", "counts", "input"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("name", ["node", "blocks"])
def test_parameters_and_buffers_of_inference(name, training, kind):
    """Running statistics alone are another matter: stock saves them, and ours does not."""

    def wanted(key, t):
        last = key.rsplit(".", 1)[-1]
        return {
            "weights": t.dim() == 4,
            "scales": last == "weight" and t.dim() == 1,
            "shifts": last == "bias",
            "parameters": isinstance(t, nn.Parameter),
            "counts": last == "num_batches_tracked",
            "input": False,
        }[kind]

    def run(model, x):
        model.train(training)
        for key, module in model.named_modules():
            for held in (module._parameters, module._buffers):
                for name, t in held.items():
                    if t is not None and wanted(f"{key}.{name}", t):
                        with torch.inference_mode():
                            held[name] = nn.Parameter(t.clone()) if held is module._parameters else t.clone()
        y = model(inferred(x) if kind == "input" else x)
        loss_of(y).backward()
        return y

    compare(run, name)


def arguments():
    generator = torch.Generator().manual_seed(2)
    sizes = {"x": (2, 2, 4, 6), "low": (2, 3, 2, 3), "up": (3, 1, 4, 4), "weight": (2, 5, 1, 1), "bias": (2,)}
    sizes |= {"bn_weight": (2,), "bn_bias": (2,), "residual": (2, 2, 4, 6), "alone": (2, 2, 1, 1)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def unit(given, of, training, running):
    norm = (given["bn_weight"], given["bn_bias"], *running)
    return of.conv_norm_act(
        [given["x"], given["low"]], given["weight"], *norm, training=training, conv_bias=given["bias"],
        upsample=[None, (given["up"], 2)], residual=given["residual"],
    )  # fmt: skip


def single(given, of, training, running):
    norm = (given["bn_weight"], given["bn_bias"], *running)
    if of is functional:
        return of.conv_norm_act([given["x"]], given["alone"], *norm, training=training, residual=0)
    # The reference concatenates even one input.
    z = F.batch_norm(F.conv2d(given["x"], given["alone"]), *norm[2:], *norm[:2], training)
    return F.relu(z + given["x"])


def norm(given, of, training, running):
    norm = (given["bn_weight"], given["bn_bias"], *running)
    return of.batch_norm_act(given["x"], *norm, training=training, residual=given["residual"])


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("call", [unit, single, norm])
def test_every_argument(call, training):
    """Each made under inference mode, while one other argument, or all others, are differentiated."""
    names = list(arguments())
    for of_inference in names:
        for wanted in [[name] for name in names if name != of_inference] + [[n for n in names if n != of_inference]]:
            seen = []
            for of in (reference, functional):
                given = arguments()
                given[of_inference] = inferred(given[of_inference])
                running = [torch.zeros(2).double(), torch.ones(2).double()]
                for name in wanted:
                    given[name].requires_grad_()
                try:
                    y = call(given, of, training, running)
                    if y.requires_grad:
                        loss_of(y).backward()
                    found = [y.detach(), *(given[name].grad for name in wanted)]
                except RuntimeError:
                    found = ["raised"]
                seen.append([*found, *running])
            for theirs, ours in zip(*seen, strict=True):
                assert type(theirs) is type(ours), (of_inference, wanted, theirs, ours)
                if isinstance(theirs, torch.Tensor):
                    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
                else:
                    assert theirs == ours


def test_without_gradients_nothing_is_copied_or_refused():
    stock, swapped = pair("node")
    with use_backend("auto"), torch.inference_mode():
        x = image()
        torch.testing.assert_close(swapped(x), stock(x))
    with torch.no_grad():
        torch.testing.assert_close(swapped(x), stock(x))
