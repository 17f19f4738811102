"""Activation checkpointing, whatever it is put around: gradients, running statistics and counts as stock has them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pairs import compare, loss_of
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts, set_checkpoint_early_stop

from examples.networks import BasicBlock, Root, Tree

# Around what: each of it, and not what lies in it.
AROUND = {
    "units": (nn.Sequential, BasicBlock, Root),
    "blocks": (BasicBlock,),
    "roots": (Root,),
    "trees": (Tree,),
    "whole": (),
}


def wrap(model, around, **options):
    """The model with modules checkpointed where they are called, or itself as a whole."""
    if not around:
        return checkpoint_wrapper(model, **options)

    def inside(parent):
        for name, child in parent.named_children():
            if isinstance(child, around):
                setattr(parent, name, checkpoint_wrapper(child, **options))
            else:
                inside(child)

    inside(model)
    return model


def averaged(model):
    """Every second norm a cumulative average, whose weight hangs on the count."""
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][::2]:
        norm.momentum = None


def steps(model, called, x, count=3):
    """Training steps through what is called, over inputs that differ."""
    outputs = []
    for i in range(count):
        y = called(x * (1 + 0.3 * i))
        loss_of(y).backward()
        outputs.append(y)
    return outputs


def policy(ctx, op, *args, **kwargs):
    """What people save: products. Ours are recomputed, with the statistics that they take."""
    return CheckpointPolicy.MUST_SAVE if "convolution" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


KINDS = {
    "not_reentrant": {},
    "reentrant": {"checkpoint_impl": CheckpointImpl.REENTRANT},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, policy)},
}


@pytest.mark.parametrize(
    ("name", "around", "layout", "kind"),
    [
        ("nodes", "trees", "nchw", "not_reentrant"),
        ("nodes", "roots", "channels_last", "reentrant"),
        ("adding", "units", "channels_last", "not_reentrant"),
        ("concatenating", "whole", "nchw", "not_reentrant"),
        ("node", "roots", "channels_last", "not_reentrant"),
        ("node", "roots", "nchw", "selective"),
        ("blocks", "blocks", "nchw", "reentrant"),
        ("blocks", "blocks", "nchw", "selective"),
        ("blocks", "units", "channels_last", "not_reentrant"),
    ],
)
def test_steps(name, around, layout, kind):
    def scenario(model, x):
        averaged(model)
        return steps(model, wrap(model, AROUND[around], **KINDS[kind]), x)

    compare(scenario, name, layout)


@pytest.mark.parametrize("stops", [True, False], ids=["early", "late"])
def test_whether_a_recomputation_stops_as_soon_as_it_can(stops):
    def scenario(model, x):
        averaged(model)
        with set_checkpoint_early_stop(stops):
            return steps(model, wrap(model, AROUND["units"]), x)

    compare(scenario, "nodes")


@pytest.mark.parametrize("stops", [True, False], ids=["early", "late"])
def test_checkpoints_inside_of_each_other(stops):
    def scenario(model, x):
        averaged(model)
        with set_checkpoint_early_stop(stops):
            return steps(model, wrap(wrap(model, AROUND["units"]), AROUND["trees"]), x)

    compare(scenario, "nodes", "channels_last")


def test_one_checkpoint_around_what_trains_and_what_does_not():
    def scenario(model, x):
        for i, module in enumerate(m for m in model.modules() if isinstance(m, (Root, BasicBlock))):
            module.requires_grad_(i % 2 == 0)
        model.stem.requires_grad_(False)
        averaged(model)
        return steps(model, wrap(model, AROUND["trees"]), x)

    compare(scenario, "adding")


def test_gradients_of_a_recomputation_taken_twice():
    def scenario(model, x):
        averaged(model)
        y = wrap(model, AROUND["blocks"])(x)
        first = torch.autograd.grad(loss_of(y), x, create_graph=True)[0]
        return first, *torch.autograd.grad(first.square().sum(), [x, model.stem.weight])

    compare(scenario, "blocks")


@pytest.mark.parametrize(("name", "around"), [("node", "roots"), ("blocks", "whole")])
def test_compiled(name, around):
    def scenario(model, x):
        torch._dynamo.reset()
        called = torch.compile(wrap(model, AROUND[around]), backend="aot_eager")
        return steps(model, called, x)

    compare(scenario, name)
