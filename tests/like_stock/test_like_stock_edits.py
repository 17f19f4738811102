"""Edits in place between forward and backward: the gradient of stock, or an error that names what was edited.

Never another gradient; and no error where stock raises none and first gradients do not read the value.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import LAYOUTS, loss_of, pair

from dla_fast import functional
from dla_fast.nn import BasicBlock, Tree
from dla_fast.nn.memory import set_memory

SIZES = {
    "x0": (2, 3, 4, 6),
    "x1": (2, 2, 4, 6),
    "low": (2, 1, 2, 3),
    "up": (1, 1, 4, 4),
    "weight": (3, 6, 1, 1),
    "bias": (3,),
    "gamma": (3,),
    "beta": (3,),
    "residual": (2, 3, 4, 6),
}
RUNNING = ("mean", "var")
WAYS = ("once", "twice", "batched")


def drawn():
    generator = torch.Generator().manual_seed(7)
    found = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in SIZES.items()}
    return found | {"mean": torch.zeros(3).double() + 0.1, "var": torch.ones(3).double() * 1.3}


def fused(t, training, residual, act):
    return functional.conv_norm_act(
        [t["x0"], t["x1"], t["low"]], t["weight"], t["gamma"], t["beta"], t["mean"], t["var"], training=training,
        conv_bias=t["bias"], upsample=[None, None, (t["up"], 2)], act=act,
        residual={"none": None, "input": 0, "tensor": t["residual"]}[residual],
    )  # fmt: skip


def stock(t, training, residual, act):
    low = F.conv_transpose2d(t["low"], t["up"], stride=2, padding=1)
    z = F.conv2d(torch.cat([t["x0"], t["x1"], low], 1), t["weight"], t["bias"])
    z = F.batch_norm(z, t["mean"], t["var"], t["gamma"], t["beta"], training)
    z = z if residual == "none" else z + t["x0" if residual == "input" else "residual"]
    return {"identity": lambda z: z, "relu": F.relu, "silu": F.silu}[act](z)


def norm_fused(t, training, residual, act):
    return functional.batch_norm_act(
        t["x0"], t["gamma"], t["beta"], t["mean"], t["var"], training=training, act=act,
        residual=None if residual == "none" else t["residual"],
    )  # fmt: skip


def norm_stock(t, training, residual, act):
    z = F.batch_norm(t["x0"], t["mean"], t["var"], t["gamma"], t["beta"], training)
    z = z if residual == "none" else z + t["residual"]
    return {"identity": lambda z: z, "relu": F.relu, "silu": F.silu}[act](z)


def upsample_fused(t, training, residual, act):
    if residual == "none":
        return functional.upsample(t["low"], t["up"], 2)
    return functional.upsample_add(t["low"], t["residual"][:, :1].contiguous(), t["up"], 2)


def upsample_stock(t, training, residual, act):
    y = F.conv_transpose2d(t["low"], t["up"], stride=2, padding=1)
    return y if residual == "none" else y + t["residual"][:, :1]


CALLS = {"unit": (fused, stock), "norm": (norm_fused, norm_stock), "upsample": (upsample_fused, upsample_stock)}


def outcome(call, wanted, edited, way, options):
    """Gradients of what is wanted, None for a RuntimeError; ``edited`` may be the output, by the name "y"."""
    leaves = drawn()
    for name in wanted:
        leaves[name].requires_grad_()
    tensors = {name: t * 1 if t.requires_grad else t for name, t in leaves.items()}
    y = call(tensors, *options)
    if not y.requires_grad:
        return [], ""
    seed = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    with torch.no_grad():
        if edited is not None:
            (y if edited == "y" else tensors[edited]).mul_(-1.7).add_(0.3)
    aims = [leaves[name] for name in wanted]
    try:
        if way == "batched":
            dys = torch.stack([seed, 2 * seed.flip(2)])
            return torch.autograd.grad(y, aims, dys, is_grads_batched=True, allow_unused=True), ""
        found = torch.autograd.grad(y, aims, seed, create_graph=way == "twice", allow_unused=True)
        if way == "twice":
            loss = sum(g.square().sum() for g in found if g is not None and g.requires_grad)
            if isinstance(loss, torch.Tensor):
                return [*found, *torch.autograd.grad(loss, aims, allow_unused=True)], ""
        return found, ""
    except RuntimeError as error:
        return None, str(error)


def same(got, want):
    for g, w in zip(got, want, strict=True):
        # A gradient that is zero may be told by None.
        g, w = (torch.zeros(()).double() if t is None else t.detach() for t in (g, w))
        torch.testing.assert_close(*torch.broadcast_tensors(g, w), rtol=1e-9, atol=1e-9)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(list(CALLS)),
    edited=st.sampled_from([*SIZES, *RUNNING, "y"]),
    wanted=st.sets(st.sampled_from(list(SIZES)), min_size=1),
    way=st.sampled_from(WAYS),
    training=st.booleans(),
    residual=st.sampled_from(["none", "input", "tensor"]),
    act=st.sampled_from(["identity", "relu", "silu"]),
)
def test_every_tensor_in_turn(kind, edited, wanted, way, training, residual, act):
    mine, theirs = CALLS[kind]
    wanted, options = [name for name in SIZES if name in wanted], (training, residual, act)
    right, _ = outcome(theirs, wanted, None, way, options)
    found, told = outcome(mine, wanted, edited, way, options)
    if found is not None:
        same(found, right)
    else:
        assert "was edited in place between the forward and the backward pass" in told


# What is edited, whose gradients are wanted, the residual and the activation: first gradients do not read it.
SPARED = [
    ("x1", ["x0", "gamma"], "none", "relu"),
    ("x0", ["x1", "up", "beta"], "tensor", "silu"),
    ("x0", ["x1"], "input", "identity"),
    ("bias", ["x0", "weight", "bias"], "none", "relu"),
    ("beta", ["x0", "weight", "beta"], "input", "identity"),
    ("residual", ["x0", "weight", "residual"], "tensor", "identity"),
    ("mean", ["x0", "weight", "gamma"], "none", "relu"),
    ("var", ["x0", "weight", "gamma"], "none", "relu"),
    ("y", ["x0", "weight", "gamma"], "none", "identity"),
    ("weight", ["weight", "gamma"], "none", "relu"),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize(("edited", "wanted", "residual", "act"), SPARED)
def test_what_is_not_read_may_be_edited(edited, wanted, residual, act, training):
    options = (training, residual, act)
    right, _ = outcome(stock, wanted, None, "once", options)
    found, told = outcome(fused, wanted, edited, "once", options)
    assert found is not None, told
    same(found, right)


def test_what_is_read_is_named():
    for edited, name in {"x1": r"xs\[1\] \(2, 2, 4, 6\)", "beta": r"bn_bias \(3,\)", "low": r"xs\[2\]"}.items():
        for training in (True, False):
            found, told = outcome(fused, ["weight", "beta"], edited, "once", (training, "none", "relu"))
            assert found is None
            with pytest.raises(
                RuntimeError, match=f"conv_norm_act: {name}.*edit a clone of it.*modified by an inplace"
            ):
                raise RuntimeError(told)


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("name", ["block", "tree"])
def test_parameters_of_chains(name, memory):
    """Whatever parameter, buffer, input or output is edited, in deferred and kept units."""

    def gradients(edited):
        torch.manual_seed(0)
        module = BasicBlock(3, 3) if name == "block" else Tree(1, BasicBlock, 3, 4, 2, level_root=True)
        module = module.double()
        set_memory(module, memory)
        x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
        given = x * 1
        y = module(given)
        held = {**module.state_dict(keep_vars=True), "x": given, "y": y}
        with torch.no_grad():
            if edited is not None and held[edited].is_floating_point():
                held[edited].mul_(-1.5).add_(0.2)
        try:
            return list(held), torch.autograd.grad(loss_of(y), [x, *module.parameters()]), ""
        except RuntimeError as error:
            return list(held), None, str(error)

    keys, right, _ = gradients(None)
    raised = set()
    for key in keys:
        _, found, told = gradients(key)
        if found is None:
            raised.add(key)
            assert "was edited in place" in told
        else:
            same(found, right)
    assert not any("running" in key or "num_batches" in key for key in raised)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_child_edited_after_its_use_where_the_weight_does_not_train(layout):
    def gradients(model):
        x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        model.root.conv.weight.requires_grad_(False)
        left, right = model.left(x) * 1, model.right(x) * 1
        y = model.root(left, right)
        with torch.no_grad():
            right.mul_(2)
        leaves = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss_of(y), [x, *leaves])

    ours, theirs = (gradients(model) for model in reversed(pair("node", layout)))
    same(ours, theirs)
