"""Tensors of any strides, drawn by hypothesis, and an op run on them beside the reference on dense copies."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from dla_fast import functional, reference, use_backend
from dla_fast.proof import parity
from dla_fast.proof.problems import Problem, Spec

# How far a result may lie from float64's of the reference, in units of the largest value.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}

KINDS = ("dense", "permuted", "stepped", "offset", "expanded")


def restrided(t: Tensor, kind: str, order: tuple[int, ...]) -> Tensor:
    """A tensor of the same shape with other strides; the same values, unless it is expanded.

    Args:
        t: what it is made of.
        kind: one of :data:`KINDS`. permuted: dense, its dimensions in memory in the given order; stepped: every second
            value of a dimension; offset: inside a larger tensor in every dimension; expanded: one value repeated along
            a dimension, with stride 0.
        order: of the dimensions; the first is the one that is stepped or expanded.
    """
    first = order[0]
    if kind == "permuted":
        back = sorted(range(t.dim()), key=order.__getitem__)
        return t.permute(order).contiguous().permute(back)
    if kind == "stepped":
        wide = t.repeat_interleave(2, first)
        return wide[(slice(None),) * first + (slice(None, None, 2),)]
    if kind == "offset":
        wide = t.new_full([side + 3 for side in t.shape], torch.nan)
        inner = wide[tuple(slice(1, side + 1) for side in t.shape)]
        return inner.copy_(t)
    if kind == "expanded":
        return t.narrow(first, 0, 1).clone().expand(t.shape)
    return t.clone()


@st.composite
def strides(draw: st.DrawFn, dim: int, written: bool = False) -> tuple[str, tuple[int, ...]]:
    """A kind and an order of dimensions; nothing that overlaps itself for what is written to."""
    kinds = [kind for kind in KINDS if not (written and kind == "expanded")]
    return draw(st.sampled_from(kinds)), tuple(draw(st.permutations(range(dim))))


@st.composite
def problems(draw: st.DrawFn, op: str) -> tuple[Problem, dict[str, tuple[str, tuple[int, ...]]]]:
    """A problem of an op, and the strides of each of its tensors and of dy."""
    kernel = draw(st.sampled_from([1, 3])) if op in ("merge", "conv_norm_act") else 1
    general = op == "conv_norm_act"
    channels, out_channels = draw(st.sampled_from([(8, 4), (16, 16), (5, 3)])), draw(st.sampled_from([8, 16]))
    added = channels[0] == out_channels if op == "aggregate" else op != "merge"
    spec = Spec(
        dtype=draw(st.sampled_from(list(BOUNDS))),
        channels=channels,
        out_channels=out_channels,
        batch=2,
        height=draw(st.integers(2, 5)),
        width=draw(st.integers(2, 5)),
        act="silu",
        residual=added,
        training=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
        kernel=kernel,
        stride=draw(st.sampled_from([1, 2])) if general else 1,
        dilation=draw(st.sampled_from([1, 2])) if general else 1,
        seed=draw(st.integers(0, 3)),
    )
    problem = parity.PROBLEMS[op](spec)
    chosen = {name: draw(strides(t.dim(), name in problem.buffers)) for name, t in problem.tensors.items()}
    return problem, chosen | {"dy": draw(strides(4))}


def check(problem: Problem, chosen: dict[str, tuple[str, tuple[int, ...]]], backend: str) -> None:
    """Outputs, gradients and running statistics on strided tensors are those of the reference on dense ones."""
    dtype = problem.spec.dtype
    mine = {name: restrided(t.to(dtype), *chosen[name]) for name, t in problem.tensors.items()}
    exact = {name: t.double().contiguous().clone() for name, t in mine.items()}
    names = problem.differentiable
    inputs = {name: t.requires_grad_() if name in names else t for name, t in mine.items()}
    doubles = {name: t.requires_grad_() if name in names else t for name, t in exact.items()}
    expected = problem.call(reference, doubles, None)
    dy = restrided(torch.randn(expected.shape, dtype=torch.float64), *chosen["dy"])
    with use_backend(backend):
        y = problem.call(functional, inputs, None)
        grads = torch.autograd.grad(y, [inputs[name] for name in names], dy.to(dtype))
    # Dense: aten's own backward of a frozen norm is wrong for some permuted gradients.
    wanted = torch.autograd.grad(expected, [doubles[name] for name in names], dy.contiguous())
    found = [("y", y, expected), *zip([f"d {name}" for name in names], grads, wanted, strict=True)]
    found += [(name, mine[name], exact[name]) for name in problem.buffers]
    for name, a, b in found:
        scale = max(b.abs().max().item(), dy.abs().max().item() if name == "d conv_bias" else 0.0)
        error = (a.double() - b).abs().max().item()
        assert error <= BOUNDS[dtype] * max(scale, 1.0), f"{name} ({chosen}): {error:.1e} of {scale:.1e}"
