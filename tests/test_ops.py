"""The operators themselves: schemas, fakes, autograd registration, flop formulas."""

from __future__ import annotations

import pytest
import torch
from serving import HALF, backends
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dla_fast import functional, ops, use_backend
from dla_fast.ops.layout import is_channels_last
from dla_fast.proof import parity

BACKENDS = backends("aggregate")


@pytest.fixture(params=BACKENDS)
def namespace(request):
    with use_backend(request.param):
        yield ops.namespace(request.param)


def _tensors(dtype, layout, grad=False):
    make = {"dtype": dtype}
    xs = [torch.randn(2, c, 3, 5, **make).to(memory_format=parity.LAYOUTS[layout]) for c in (4, 3)]
    weight, bias = torch.randn(4, 7, 1, 1, **make), torch.randn(4, **make)
    gamma, beta, mean = (torch.randn(4, **make) for _ in range(3))
    if grad:
        for t in (*xs, weight, bias, gamma, beta):
            t.requires_grad_()
    return xs, weight, bias, gamma, beta, mean, torch.rand(4, **make) + 0.5


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, HALF], ids=str)
def test_opcheck(namespace, dtype, layout):
    xs, weight, bias, gamma, beta, mean, var = _tensors(dtype, layout)
    options = (1e-5, "relu", 0.0)
    node, norm, geometry = (xs, [], weight, bias), (gamma, beta, mean, var), ([1, 1], 1, 1, 1)
    opcheck(namespace.conv_norm_act_inference.default, (*node, None, *norm, *geometry, 0, *options))
    opcheck(namespace.conv_norm_act_stage.default, (*node, mean, var, *geometry, 0.1, True))
    opcheck(namespace.conv_norm_act_stage.default, (*node, None, None, *geometry, 0.0, False))
    z, mu, sigma2 = namespace.conv_norm_act_stage(xs, [], weight, None, None, None, *geometry, 0.1, True)
    dy = torch.randn_like(z)
    opcheck(
        namespace.conv_norm_act_backward.default,
        (dy, xs, [], weight, None, z, mu, sigma2, gamma, beta, mu, sigma2, *geometry, 0, 30, *options)
        + ([True, False], [], True, False),
    )
    opcheck(namespace.moments.default, (z, mean, var, 0.1))
    opcheck(namespace.tail.default, (z, mu, sigma2, gamma, beta, dy, *options))
    opcheck(namespace.tail_backward_reduce.default, (dy, z, mu, sigma2, gamma, beta, None, *options))
    opcheck(
        namespace.tail_backward_apply.default,
        (dy, z, mu, sigma2, gamma, beta, dy, mu, sigma2, 30, *options, True),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
def test_opcheck_of_what_is_differentiable(namespace, layout, training):
    xs, weight, bias, gamma, beta, mean, var = _tensors(torch.float32, layout, grad=True)
    opcheck(
        namespace.conv_norm_act.default,
        (xs, [], weight, bias, None, gamma, beta, mean, var, [1, 1], 1, 1, 1, 0, training, 0.1, 1e-5, "relu", 0.0),
    )
    opcheck(
        namespace.batch_norm_act.default,
        (xs[0], gamma, beta, xs[0].detach().clone(), mean, var, training, 0.1, 1e-5, "relu", 0.0),
    )


@pytest.mark.parametrize(
    "shape", [(2, 4, 3, 5), (2, 4, 1, 1), (2, 1, 3, 5), (1, 4, 1, 5), (1, 1, 1, 1), (0, 4, 3, 5), (2, 4, 3, 1)]
)
def test_layout_rule_is_the_kernels(namespace, shape):
    """The Python rule and c10's agree wherever sides of length 1 make both layouts fit."""
    for t in (torch.randn(shape), torch.randn(shape).to(memory_format=torch.channels_last)):
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        y = namespace.tail(t, mean, var, None, None, None, 1e-5, "relu", 0.0)
        expected = torch.channels_last if is_channels_last(t) else torch.contiguous_format
        assert y.stride() == torch.empty(shape, memory_format=expected).stride()


def test_flops_are_counted(namespace):
    xs, weight, _, gamma, beta, mean, var = _tensors(torch.float32, "channels_last", grad=True)
    product = 2 * 30 * 4 * 7
    with FlopCounterMode(display=False) as counter:
        y = functional.aggregate(xs, weight, gamma, beta, mean, var, training=True)
    assert counter.get_total_flops() == product + 5 * y.numel(), "the product and the tail"
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    backward = counter.get_total_flops()
    assert 2 * product <= backward <= 2 * product + 20 * y.numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional.aggregate(xs, weight, gamma, beta, mean, var, training=False)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        functional.batch_norm_act(xs[0], gamma, beta, mean, var, training=True).sum().backward()
    assert 0 < counter.get_total_flops() <= 40 * xs[0].numel()


def test_backward_of_a_leaf_that_needs_nothing(namespace):
    xs, weight, _, gamma, beta, mean, var = _tensors(torch.float32, "contiguous")
    gamma.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = functional.aggregate(xs, weight, gamma, beta, mean, var, training=True)
        y.sum().backward()
    # Tail and reduction, and no product in the backward: gamma alone needs none.
    assert counter.get_total_flops() == 2 * 30 * 4 * 7 + (5 + 9) * y.numel()
    assert xs[0].grad is None
    assert weight.grad is None
