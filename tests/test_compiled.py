"""torch.compile, vmap, jvp, tracing and export of the nodes, per backend."""

from __future__ import annotations

import contextlib

import pytest
import torch
from serving import served_by
from torch import Tensor

from dla_fast import functional
from dla_fast.proof import parity

served = served_by("conv_norm_act")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def _node(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    xs = [torch.randn(2, c, 3, 3, dtype=dtype) for c in (4, 3)]
    weight = torch.randn(4, 7, 1, 1, dtype=dtype)
    gamma, beta, mean = (torch.randn(4, dtype=dtype) for _ in range(3))
    return xs, [weight, gamma, beta], [mean, torch.rand(4, dtype=dtype) + 0.5]


def _general(xs, params, buffers, training):
    """A node with every kind of argument: a 3 x 3 kernel with a stride, an upsampled input, a tensor as residual."""
    low, up, weight, residual, *rest = params
    return functional.conv_norm_act(
        [xs[0], low], weight, *rest, *buffers, training=training, stride=2, residual=residual,
        upsample=[None, (up, 2)],
    )  # fmt: skip


def _general_tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    shapes = ((2, 3, 2, 2), (3, 1, 4, 4), (4, 7, 3, 3), (2, 4, 2, 2), (4,), (4,))
    params = [torch.randn(shape) for shape in shapes]
    return [torch.randn(2, 4, 4, 4)], params, [torch.randn(4), torch.rand(4) + 0.5]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(served, dynamic):
    xs, params, buffers = _node()
    for t in xs + params:
        t.requires_grad_()

    def run(xs, params, buffers):
        return functional.aggregate(xs, *params, *buffers, training=True, residual=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    outcomes = []
    for fn in (run, compiled):
        mine = [b.clone() for b in buffers]
        y = fn(xs, params, mine)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), xs + params), *mine])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(functional.aggregate, fullgraph=True, backend="aot_eager")(
                xs, *params, *buffers, training=False
            ),
            functional.aggregate(xs, *params, *buffers, training=False),
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compile_of_every_argument(served, training, dynamic):
    xs, params, buffers = _general_tensors()
    leaves = [t.requires_grad_() for t in xs + params]
    outcomes = []
    for fn in (_general, torch.compile(_general, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        mine = [b.clone() for b in buffers]
        y = fn(xs, params, mine, training)
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), leaves), *mine])
        with torch.no_grad():
            outcomes[-1].append(fn(xs, params, buffers, False))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["training", "gradients", "inference"])
def test_compiled_graphs_keep_the_operator(served, mode):
    """What is compiled is not handed to the reference, as what is exported is."""
    xs, params, buffers = _node()
    for t in params:
        t.requires_grad_(mode != "inference")
    called: set[str] = set()

    def look(graph, example_inputs):
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(functional.aggregate, fullgraph=True, backend=look)(
        xs, *params, *[b.clone() for b in buffers], training=mode == "training"
    )
    operator = "conv_norm_act_inference" if mode == "inference" else "conv_norm_act"
    assert any(name.startswith(f"dla_fast_{served}.{operator}") for name in called), called


def test_compiled_autograd_traces_the_backward(served):
    """An eager forward whose backward is compiled as one graph."""
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        xs, params, buffers = _node()
        leaves = [t.requires_grad_() for t in xs + params]
        loss = functional.aggregate(xs, *params, *[b.clone() for b in buffers], training=True).pow(2).sum()
        whole = torch.compile(backend="aot_eager", fullgraph=True)
        with torch._dynamo.compiled_autograd._enable(whole) if compiled else contextlib.nullcontext():
            loss.backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_inductor(served):
    xs, params, buffers = _node()
    for t in xs + params:
        t.requires_grad_()

    def run():
        y = functional.aggregate(xs, *params, *[b.clone() for b in buffers], training=True)
        return (y * 2).relu()

    expected = run()
    grads = torch.autograd.grad(expected.sum(), xs + params)
    got = torch.compile(run, fullgraph=True)()
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), xs + params), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_jvp_and_export_use_the_reference(served):
    xs, params, buffers = _node(torch.float64)

    def run(x):
        return functional.aggregate([x, xs[1]], *params, *buffers, training=False, act="silu")

    batched = torch.func.vmap(run)(torch.stack([xs[0], xs[0] + 1]))
    torch.testing.assert_close(batched[1], run(xs[0] + 1))
    _, tangent = torch.func.jvp(run, (xs[0],), (torch.ones_like(xs[0]),))
    assert tangent.abs().max() > 0
    traced = torch.jit.trace(run, (xs[0],))
    assert "dla_fast_" not in str(traced.graph)

    class Module(torch.nn.Module):
        def forward(self, x):
            return run(x)

    # torch.export reads the older allow_tf32, which raises where the newer switch is not at its default.
    with parity.fp32_precision("tf32"):
        exported = torch.export.export(Module(), (xs[0],))
    assert "dla_fast_" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(xs[0]), run(xs[0]))
