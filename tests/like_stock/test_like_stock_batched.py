"""Batches of gradients in one backward pass, and what is made of them: Jacobians, Hessians, gradcheck."""

from __future__ import annotations

import pytest
import torch
from pairs import LAYOUTS, compare, image, loss_of
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

from dla_fast import functional

SIZE = (2, 8, 8)


def leaves_of(model, x):
    return [x, *model.parameters()]


def batch_of(y, count=3):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, *y.shape, generator=generator, dtype=y.dtype).contiguous()


def by_autograd(y, leaves, **options):
    return torch.autograd.grad(y, leaves, batch_of(y), is_grads_batched=True, **options)


def by_vmap(y, leaves, **options):
    def pull(dy):
        return torch.autograd.grad(y, leaves, dy, **{"retain_graph": True, **options})

    return torch.func.vmap(pull)(batch_of(y))


WAYS = {"is_grads_batched": by_autograd, "vmap": by_vmap}


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize(
    ("name", "layout", "memory", "way"),
    [
        ("nodes", "nchw", "low", "is_grads_batched"),
        ("nodes", "channels_last", "default", "vmap"),
        ("concatenating", "channels_last", "default", "is_grads_batched"),
        ("adding", "nchw", "default", "vmap"),
        ("blocks", "channels_last", "low", "vmap"),
    ],
)
def test_a_batch_of_gradients(name, layout, memory, training, way):
    def scenario(model, x):
        y = model.train(training)(x)
        found = WAYS[way](y, leaves_of(model, x), allow_unused=True)
        return [grad for grad in found if grad is not None]

    compare(scenario, name, layout, image(SIZE, layout), memory=memory)


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_second_gradients_of_a_batch_and_a_batch_of_second_gradients(memory, training):
    def scenario(model, x):
        leaves = leaves_of(model, x)
        y = model.train(training)(x)
        # What is computed of vmap's gradients is wrong in PyTorch's own batch norm: not compared.
        found = [*by_vmap(y, leaves, create_graph=True)]
        first = by_autograd(y, leaves, create_graph=True)
        found += first
        loss = sum((grad**2).sum() for grad in first if grad.requires_grad)
        found += torch.autograd.grad(loss, leaves, allow_unused=True)
        once = torch.autograd.grad(loss_of(model(x)), leaves, create_graph=True)
        flat = torch.cat([grad.flatten() for grad in once])
        for way in WAYS.values():
            found += way(flat, leaves, retain_graph=True, allow_unused=True)
        return [grad for grad in found if grad is not None]

    compare(scenario, "nodes", "nchw", image(SIZE), memory=memory)


@pytest.mark.parametrize("name", ["node", "blocks"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_jacobians_and_hessians(name, training):
    def scenario(model, x):
        model.train(training)
        x = x.detach()
        return [
            jacobian(model, x, vectorize=True),
            jacobian(model, x, vectorize=True, create_graph=True),
            hessian(lambda x: loss_of(model(x) ** 2), x, vectorize=True),
            torch.func.jacrev(lambda x: model(x).sum(0))(x),
            torch.func.vmap(torch.func.vjp(model, x)[1])(batch_of(model(x))),
        ]

    compare(scenario, name, x=image((2, 3, 3)), memory="low")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_output_in_a_batch_and_one_beside_it(layout):
    """Of two outputs one's gradient is the same for the whole batch: a node gets one of either kind."""

    def scenario(model, x):
        *_, middle, last = model.levels(x)

        def pull(dy):
            return torch.autograd.grad([middle, last], leaves_of(model, x), [torch.ones_like(middle), dy])

        return torch.func.vmap(pull)(batch_of(last))

    compare(scenario, "nodes", layout, image(SIZE, layout))


def test_a_backward_pass_in_forward_mode():
    def scenario(model, x):
        y = model(x)
        dy, tangent = batch_of(y, 2)
        with forward_ad.dual_level():
            found = torch.autograd.grad(y, leaves_of(model, x), forward_ad.make_dual(dy, tangent))
            return [forward_ad.unpack_dual(grad) for grad in found]

    compare(scenario, "blocks", x=image((2, 4, 4)))


def drawn(*sizes):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def unit_of(training):
    inputs = drawn((2, 2, 4, 2), (2, 1, 2, 1), (1, 1, 4, 4), (2, 3, 1, 1), 2, 2, 2)
    mean, var = torch.tensor([0.1, -0.2]).double(), torch.tensor([0.7, 1.2]).double()

    def run(x, low, up, weight, bias, gamma, beta):
        return functional.conv_norm_act(
            [x, low], weight, gamma, beta, mean.clone(), var.clone(), training=training, conv_bias=bias, act="silu",
            upsample=[None, (up, 2)], residual=0,
        )  # fmt: skip

    return run, inputs


def norm_of(training):
    mean, var = torch.tensor([0.1, -0.2]).double(), torch.tensor([0.7, 1.2]).double()

    def run(x, gamma, beta, residual):
        return functional.batch_norm_act(
            x, gamma, beta, mean.clone(), var.clone(), training=training, residual=residual, act="silu"
        )

    return run, drawn((2, 2, 3, 2), 2, 2, (2, 2, 3, 2))


OPS = {
    "conv_norm_act": unit_of,
    "batch_norm_act": norm_of,
    "upsample": lambda _: (lambda x, w: functional.upsample(x, w, 2), drawn((1, 2, 2, 2), (2, 1, 4, 4))),
    "upsample_add": lambda _: (
        lambda x, s, w: functional.upsample_add(x, s, w, 2),
        drawn((1, 2, 2, 2), (1, 2, 4, 4), (2, 1, 4, 4)),
    ),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_gradcheck_of_batched_gradients(op, training):
    run, inputs = OPS[op](training)
    assert torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, inputs, check_batched_grad=True, fast_mode=True)
