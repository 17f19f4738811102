"""A unit in training as its neighbours know it: what it reads may be normalised on load, what it gives may be left to
its reader to normalise, and maps that can be formed again are not saved.

Between two units of a chain no y exists. The first gives z, mean and variance, its reader forms y while it loads z.
What comes back is not the gradient of the three but what the norm's backward needs: dy' (the gradient of what the
activation is applied to) and its sums, alone and times x_hat, which the reader has taken on the way. So that nobody
takes the one for the other it comes back for three tensors that stand beside them, the ports. Both are linear in the
gradient: several readers' add up. A backward that is itself differentiated goes through the reference and gives
gradients, and what is differentiated then gives both.

Where a batch lies on several processes they meet twice, after z for its moments and before the unit's own backward for
the sums; what its reader forms and gives back is as with any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dla_fast.ops.autograd import by_reference, requires_grad, second_order
from dla_fast.ops.chain_backward import BN_WEIGHT, FIRST, PORTS, Call, Kernels, formed, like, once, pixels, twice
from dla_fast.ops.ending import NO_PROLOGUE, Ending, Kept, keep, port, recall, remember
from dla_fast.ops.joint import joint_moments, refuse
from dla_fast.ops.saved import saved, spared_of_unit, unit_names


def _computed(
    kernels: Kernels, call: Call, flat: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """z, mean, variance, y where it is not deferred, what is added before the activation, the share of the batch."""
    n, at = call.inputs, call.behind
    weight, conv_bias, residual, bn_weight, bn_bias = flat[at : at + FIRST]
    pre = NO_PROLOGUE if call.first < 0 else (call.first, *flat[at + FIRST : at + PORTS], *call.first_options)
    running = call.running if call.group is None else (None, None)
    added = residual if call.residual_input < 0 else flat[call.residual_input]
    share = y = None
    with torch._C._AutoDispatchBelowAutograd():
        z, mean, var = kernels.stage(
            flat[:n], flat[n:at], weight, conv_bias, *running, *call.geometry, call.momentum, True, *pre
        )
    if call.group is not None:
        mean, var, share = joint_moments(mean, var, pixels(z), call.group, call.running, call.momentum, conv_bias)
    if not call.deferred:
        with torch._C._AutoDispatchBelowAutograd():
            y = kernels.tail(z, mean, var, bn_weight, bn_bias, added, *call.options)
    return z, mean, var, y, added, share


_FORMED = ("z", "residual", "mean", "var", "bn_weight", "bn_bias")


def _names(call: Call) -> list[str]:
    """What a unit has saved."""
    kept = sum(len(one.ending.flat()) for one in call.kept if one is not None)
    before = [f"the {name} of the unit before" for name in _FORMED[1:]]
    formed = ["what an input or a residual is formed of again"] * kept
    return [*unit_names(call.inputs, call.ups), *before, "z", "mean", "var", *formed]


def _spared(call: Call, needed: Sequence[bool]) -> set[int]:
    plain = call.deferred or call.options[1] == "identity"
    found = spared_of_unit(needed, call.geometry[0], call.ups, call.residual_input, plain, call.first)
    return found - set(range(call.inputs)) if any(call.kept) else found


class _Unit(torch.autograd.Function):
    """The unit itself; its inputs are a backend's kernels, the call, and the tensors in the order of a call."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, call: Call, *flat: Any) -> Any:
        z, mean, var, y, added, ctx.share = _computed(kernels, call, flat)
        at = call.behind
        saved: list[Tensor | None] = list(flat[: at + PORTS])
        endings: list[Tensor | None] = []
        of_residual = None
        if any(call.kept):
            kept = list(call.kept)
            for i, one in enumerate(kept):
                if one is not None:
                    saved[call.place(i)] = None
                    endings += one.ending.flat()
                    # What is saved is freed with the graph's buffers; what a context holds is not.
                    kept[i] = Kept(one.ending.skeleton(), one.edge)
            of_residual = call.kept[call.inputs if call.residual_input < 0 else call.residual_input]
            call = call._replace(kept=tuple(kept))
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.call = kernels, call
        ctx.save_for_backward(*saved, z, mean, var, *endings)
        if y is None:
            ports = (port(z), torch.empty_like(mean), torch.empty_like(var))
            return (z, mean, var, *ports, port(flat[0])) if call.carries else (z, mean, var, *ports)
        summed = added if of_residual is None else of_residual.ending
        bn_weight, bn_bias = flat[at + BN_WEIGHT : at + FIRST]
        ctx.ending = Ending(z, mean, var, bn_weight, bn_bias, summed, *call.options, kernels.backend)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return (None,) * (len(needed) + 2)
        call: Call = ctx.call
        reference = by_reference(grads)
        if reference and call.group is not None:
            refuse()
        count = call.behind + PORTS
        tensors = list(saved(ctx, "conv_norm_act", grads, partial(_names, call), partial(_spared, call, needed)))
        flat, (z, mean, var), rest = tensors[:count], tensors[count : count + 3], iter(tensors[count + 3 :])
        endings = [None if kept is None else kept.ending.with_tensors(rest) for kept in call.kept]
        if reference:
            made = twice(ctx, flat, endings, needed, grads, (z, mean, var))
        else:
            made = once(ctx, flat, endings, needed, grads, (z, mean, var))
        if not isinstance(ctx, torch._C._FunctionBase):
            # Compiled autograd adds up what several units give back for one tensor, and takes no None for nothing.
            for i, (one, wanted) in enumerate(zip(flat, needed, strict=False)):
                if made[i] is None and wanted and one is not None:
                    made[i] = torch.zeros_like(one)
        return (None, None, *made)


class _Formed(torch.autograd.Function):
    """y of an ending for a reader that takes no other; what it gives back is what a unit would."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, options: tuple[float, str, float], *tensors: Any) -> Tensor:
        z, residual, *norm = tensors[:6]
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(*tensors[:6])
        with torch._C._AutoDispatchBelowAutograd():
            return kernels.tail(z, *norm, residual, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if dy is None:
            return (None,) * (len(needed) + 2)
        tensors = saved(
            ctx, "conv_norm_act", (dy,), lambda: _FORMED, lambda: (1, 5) if ctx.options[1] == "identity" else ()
        )
        if by_reference((dy,)):

            def run(z: Tensor, residual: Tensor | None, *norm: Any) -> Tensor:
                return formed(z, norm, residual, ctx.options)

            return (None, None, *second_order(run, tensors, needed[:6], (dy,)), None, None, None)
        z, residual, *norm = tensors
        sums = ctx.kernels.reduce(dy, z, *norm, residual, *ctx.options)
        _, du = ctx.kernels.apply(dy, z, *norm, residual, None, None, 0, *ctx.options, True)
        found = [None, du, None, None, like(sums[1], norm[2]), like(sums[0], norm[3]), du, *sums]
        return (None, None, *(grad if wanted else None for grad, wanted in zip(found, needed, strict=True)))


_backends: dict[str, Kernels] = {}


def kernels_of(backend: str) -> Kernels:
    """The operators of a backend, looked up once."""
    if backend not in _backends:
        _backends[backend] = Kernels.of(backend)
    return _backends[backend]


def form(ending: Ending) -> Tensor:
    """y of an ending that a unit has left to its reader, differentiable, for what is no unit."""
    tensors = (ending.z, ending.residual, *ending[1:5], *(ending.ports or ()))
    y: Tensor = _Formed.apply(kernels_of(ending.backend), ending.options, *tensors)
    return y


# How many maps are formed at most to form one.
_DEEPEST = 3


def kept_of(
    xs: Sequence[Tensor],
    residual: Tensor | None,
    of_first: Tensor | None,
    residual_input: int,
    first: int,
    kernel: int,
    low: bool,
) -> tuple[Kept | None, ...]:
    """What a unit saves in the place of its inputs and its residual, None where that is the map itself.

    A map without a residual, or whose residual is read beside it, is formed while it is read at no cost. Others are
    formed in a pass of their own: only where memory is to be ``low``.
    """
    found: list[Kept | None] = []
    if not torch.is_grad_enabled():
        return (None,) * (len(xs) + 2)
    for i, x in enumerate((*xs, residual, of_first)):
        ending = None if x is None or i == first or not x.requires_grad else recall(x)
        if ending is not None and not low:
            added = ending.residual
            free = added is None or (kernel == 1 and any(added is other for other in xs))
            # One input is formed on the way, and none that is added or is the residual.
            if not free or i >= len(xs) or i == residual_input or any(k is not None for k in found) or first >= 0:
                ending = None
        deep = ending is not None and ending.depth() > _DEEPEST
        found.append(None if x is None or ending is None or deep else keep(x, ending))
    return tuple(found)


def chained(backend: str, call: Call, flat: Sequence[Tensor | None]) -> Any:
    """y of a unit, or where it is deferred z, mean, variance and, for gradients, the ports and a carrier.

    Args:
        backend: the namespace that serves it.
        call: see :class:`Call`.
        flat: inputs, up-weights, weight, conv_bias, residual, bn_weight, bn_bias, and of the first input's ending
            residual, mean, var, bn_weight, bn_bias and the ports; last the carrier, see :data:`CARRIER`.
    """
    if not requires_grad(flat):
        z, mean, var, y, *_ = _computed(kernels_of(backend), call, flat)
        return (z, mean, var) if y is None else y
    # Function.apply inspects forward's signature for defaults, on every call.
    made = _apply(kernels_of(backend), call, *flat)
    if not call.deferred:
        ending = made.grad_fn.__dict__.pop("ending")
        remember(made, ending)
    return made


_apply = super(torch.autograd.Function, _Unit).apply  # type: ignore[misc]
