"""A unit in training as its neighbours know it: what it reads may be normalised on load, what it gives may be left to
its reader to normalise, and maps that can be formed again are not saved.

Between two units of a chain no y exists. The first gives z, mean and variance, its reader forms y while it loads z.
What comes back is not the gradient of the three but what the norm's backward needs: dy' (the gradient of what the
activation is applied to) and its sums, alone and times x_hat, which the reader has taken on the way. So that nobody
takes the one for the other it comes back for three tensors that stand beside them, the ports. Both are linear in the
gradient: several readers' add up. A backward that is itself differentiated goes through the reference and gives
gradients, and what is differentiated then gives both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_fast.ops.autograd import cast, requires_grad, second_order
from dla_fast.ops.direct import direct
from dla_fast.ops.ending import NO_PROLOGUE, Ending, Kept, keep, prologue, recall, remember, valued
from dla_fast.ops.layout import accumulation_dtype
from dla_fast.reference.activation import activate
from dla_fast.reference.conv_norm_act import convolve


class Call(NamedTuple):
    """A unit's call, but for the tensors that it is differentiable in.

    Attributes:
        inputs: how many inputs there are.
        ups: how many of them are upsampled.
        running: the running mean and variance, each a tensor or None.
        geometry: the inputs' factors; stride, dilation and groups of the convolution.
        residual_input: the input that is added before the activation, or -1.
        momentum: weight of the batch in the running statistics.
        options: eps, name and slope of the activation; of a deferred ending eps alone is read.
        first: the input that is z of the unit before, or -1.
        first_options: eps, name and slope of that unit's ending.
        deferred: give z, mean and variance, and no y.
        kept: per input, and behind them for the residual and for that of the first input's ending, what is saved in
            its place, or None.
    """

    inputs: int
    ups: int
    running: tuple[Tensor | None, Tensor | None]
    geometry: tuple[Sequence[int], int, int, int]
    residual_input: int
    momentum: float
    options: tuple[float, str, float]
    first: int
    first_options: tuple[float, str, float]
    deferred: bool
    kept: tuple[Kept | None, ...]


# Behind the inputs and the up-weights: weight, conv_bias, residual, bn_weight, bn_bias, and of the first input's ending
# residual, mean, var, bn_weight, bn_bias and three ports.
_REST = 13


class _Kernels(NamedTuple):
    """The operators of a backend."""

    backend: str
    stage: Callable[..., Any]
    backward: Callable[..., Any]
    tail: Callable[..., Tensor]
    reduce: Callable[..., tuple[Tensor, Tensor]]
    apply: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def of(backend: str) -> _Kernels:
        return _Kernels(
            backend,
            direct(backend, "conv_norm_act_stage", inputs=0),
            direct(backend, "conv_norm_act_backward", inputs=1),
            direct(backend, "tail"),
            direct(backend, "tail_backward_reduce"),
            direct(backend, "tail_backward_apply"),
        )


class _Unit(torch.autograd.Function):
    """The unit itself; its inputs are a backend's kernels, the call, and the tensors in the order of a call."""

    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, call: Call, *flat: Any) -> Any:
        n, at = call.inputs, call.inputs + call.ups
        xs, ups = list(flat[:n]), list(flat[n:at])
        weight, conv_bias, residual, bn_weight, bn_bias, *of_first = flat[at : at + 10]
        pre = NO_PROLOGUE if call.first < 0 else (call.first, *of_first, *call.first_options)
        with torch._C._AutoDispatchBelowAutograd():
            z, mean, var = kernels.stage(
                xs, ups, weight, conv_bias, *call.running, *call.geometry, call.momentum, True, *pre
            )
            added = residual if call.residual_input < 0 else xs[call.residual_input]
            norm = mean, var, bn_weight, bn_bias
            y = None if call.deferred else kernels.tail(z, *norm, added, *call.options)
        ctx.set_materialize_grads(False)
        saved: list[Tensor | None] = list(flat[:-3])
        endings: list[Tensor | None] = []
        kept = list(call.kept)
        for i, one in enumerate(kept):
            if one is not None:
                saved[_place(call, i)] = None
                endings += one.ending.flat()
                # What is saved is freed with the graph's buffers; what a context holds is not.
                kept[i] = one._replace(ending=one.ending.skeleton())
        ctx.kernels, ctx.call = kernels, call._replace(kept=tuple(kept))
        ctx.save_for_backward(*saved, z, mean, var, *endings)
        if y is None:
            return z, mean, var, z.new_empty(1).expand(z.shape), torch.empty_like(mean), torch.empty_like(var)
        of_residual = call.kept[n if call.residual_input < 0 else call.residual_input]
        summed = added if of_residual is None else of_residual.ending
        ctx.ending = Ending(z, mean, var, bn_weight, bn_bias, summed, *call.options, kernels.backend)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return (None,) * (len(needed) + 2)
        call: Call = ctx.call
        count = call.inputs + call.ups + _REST - 3
        tensors = list(ctx.saved_tensors)
        flat, (z, mean, var), rest = tensors[:count], tensors[count : count + 3], iter(tensors[count + 3 :])
        endings = [None if kept is None else kept.ending.with_tensors(rest) for kept in call.kept]
        if torch.is_grad_enabled():
            made = _twice(ctx, flat, endings, needed, grads, (z, mean, var))
        else:
            made = _once(ctx, flat, endings, needed, grads, (z, mean, var))
        return (None, None, *made)


def _once(
    ctx: Any,
    flat: list[Any],
    endings: list[Ending | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    made: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor | None]:
    """The gradients by kernels."""
    call: Call = ctx.call
    kernels: _Kernels = ctx.kernels
    n, at = call.inputs, call.inputs + call.ups
    (z, mean, var), (eps, act, slope) = made, call.options
    weight, conv_bias, residual, bn_weight, bn_bias, *of_first = flat[at:]
    need_dx, need_dup = list(needed[:n]), list(needed[n:at])
    need_dw, need_bias, need_residual, _, _, *need_first = needed[at:]
    through = call.first >= 0 and (need_dx[call.first] or any(need_first))
    xs: list[Any] = flat[:n]
    maps: dict[int, Tensor] = {}
    of_residual, of_added = endings[n:]
    if of_residual is not None:
        residual = of_residual.form(kernels.tail, maps)
    if of_added is not None:
        of_first[0] = of_added.form(kernels.tail, maps)
    pre = NO_PROLOGUE if call.first < 0 else (call.first, *of_first, *call.first_options)
    for i, ending in enumerate(endings[:n]):
        if ending is None:
            continue
        read = i == call.residual_input or call.geometry[0][i] > 1
        if not need_dw and not read:
            xs[i] = ending.z  # for its shape
        elif pre is NO_PROLOGUE and not read and not isinstance(ending.residual, Ending):
            # One input is formed while it is read.
            xs[i], pre = ending.z, prologue(i, ending)
        else:
            xs[i] = ending.form(kernels.tail, maps)
    added = residual if call.residual_input < 0 else xs[call.residual_input]
    if through:
        need_dx[call.first] = True
    dy: Any = grads[0]
    sums: Sequence[Tensor]
    if call.deferred:
        act, slope, added, residual = "identity", 0.0, None, None
        dy, sums, bn_weight = _returned(grads, made, bn_weight, eps)
    else:
        sums = kernels.reduce(dy, z, mean, var, bn_weight, bn_bias, added, eps, act, slope)
    dxs: Sequence[Any] = [None] * n
    dups: Sequence[Any] = [None] * call.ups
    dw = dresidual = None
    of_norm: Sequence[Tensor | None] = [None, None]
    if need_dw or need_residual or any(need_dx) or any(need_dup):
        images, _, height, width = z.shape
        dxs, dups, dw, dresidual, through_sums = kernels.backward(
            dy, xs, flat[n:at], weight, residual, z, mean, var, bn_weight, bn_bias, *sums, *call.geometry,
            -1 if call.deferred else call.residual_input, float(images * height * width), eps, act, slope, need_dx,
            need_dup, need_dw, need_residual and not call.deferred, *pre, through,
        )  # fmt: skip
        of_norm = through_sums if through else of_norm
    dbias = torch.zeros_like(conv_bias) if need_bias and conv_bias is not None else None
    dgamma, dbeta = (None, None) if call.deferred else (sums[1], sums[0])
    du = dxs[call.first] if through else None
    dxs = [None if through and i == call.first else dx for i, dx in enumerate(dxs)]
    found = [
        *dxs, *dups, dw, dbias, dresidual, _like(dgamma, bn_weight), _like(dbeta, bn_bias),
        du, None, None, _like(of_norm[1], of_first[3]), _like(of_norm[0], of_first[4]), du, *of_norm,
    ]  # fmt: skip
    return [grad if wanted else None for grad, wanted in zip(found, needed, strict=True)]


def _returned(
    grads: Sequence[Tensor | None], made: tuple[Tensor, Tensor, Tensor], bn_weight: Tensor | None, eps: float
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """dy' of a deferred unit, its sums, and the weight of the norm that they are of."""
    if grads[0] is grads[1] is grads[2] is None:
        dy, *sums = (torch.zeros_like(t) if grad is None else grad for t, grad in zip(made, grads[3:], strict=True))
        return dy, sums, bn_weight
    # Gradients are those of a norm whose scale is 1.
    dz, dmean, dvar = gradients_of(grads, made, bn_weight, eps)
    deviation = (made[2] + eps).sqrt()
    return dz, [-dmean, -2 * dvar * deviation], deviation


def gradients_of(
    grads: Sequence[Tensor | None], made: tuple[Tensor, Tensor, Tensor], bn_weight: Tensor | None, eps: float
) -> list[Tensor]:
    """The gradients of z, mean and variance, from those and from what came back for the ports."""
    z, mean, var = made
    dz, dmean, dvar, du, total, total_xhat = (
        torch.zeros_like(t) if grad is None else grad for t, grad in zip((*made, *made), grads, strict=True)
    )
    rstd = (var + eps).rsqrt()
    scale = rstd if bn_weight is None else rstd * bn_weight.to(rstd.dtype)
    dz = dz + (du * scale[:, None, None]).to(z.dtype)
    return [dz, dmean - scale * total, dvar - 0.5 * scale * rstd * total_xhat]


def _place(call: Call, i: int) -> int:
    """Where the tensor of ``call.kept[i]`` is among all."""
    behind = call.inputs + call.ups
    return i if i < call.inputs else behind + (2 if i == call.inputs else 5)


def _like(total: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if total is None or parameter is None else cast(total, parameter.dtype)


def _twice(
    ctx: Any,
    flat: list[Any],
    endings: list[Ending | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    made: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor | None]:
    """The gradients by the reference, to be differentiated again."""
    call: Call = ctx.call
    n, at = call.inputs, call.inputs + call.ups
    for i, (kept, ending) in enumerate(zip(call.kept, endings, strict=True)):
        if kept is not None and ending is not None:
            with torch.no_grad():
                y = ending.form(ctx.kernels.tail, {})
            flat[_place(call, i)] = valued(kept.edge, y)

    def run(*tensors: Any) -> Any:
        xs, ups = list(tensors[:n]), iter(tensors[n:at])
        weight, conv_bias, residual, bn_weight, bn_bias, added, mean, var, *affine = tensors[at:]
        if call.first >= 0:
            xs[call.first] = formed(xs[call.first], (mean, var, *affine), added, call.first_options)
        factors, stride, dilation, groups = call.geometry
        upsample = [(next(ups), factor) if factor > 1 else None for factor in factors]
        z = convolve(xs, weight, None if call.deferred else conv_bias, stride, dilation, groups, upsample)
        if call.deferred:
            wide = z.to(accumulation_dtype(z.dtype))
            return z, wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
        eps, act, slope = call.options
        y = F.batch_norm(z, None, None, bn_weight, bn_bias, True, 0.0, eps)
        residual = residual if call.residual_input < 0 else xs[call.residual_input]
        return activate(y if residual is None else y + residual, (act, slope) if act == "leaky_relu" else act)

    if call.deferred:
        norm = (flat[at + 3], call.options[0])
        grads = grads[:3] if grads[3] is None else gradients_of(grads, made, *norm)
    return [*second_order(run, flat, needed[:-3], grads), None, None, None]


def formed(
    z: Tensor, norm: Sequence[Tensor | None], residual: Tensor | None, options: tuple[float, str, float]
) -> Tensor:
    """An ending's y in plain PyTorch, differentiable in all of its tensors; norm: mean, var, weight and bias."""
    (mean, var, weight, bias), (eps, act, slope) = norm, options
    assert mean is not None
    assert var is not None
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight.to(var.dtype)
    y = (z.to(var.dtype) - mean[:, None, None]) * scale[:, None, None]
    if bias is not None:
        y = y + bias.to(var.dtype)[:, None, None]
    y = y.to(z.dtype)
    return activate(y if residual is None else y + residual, (act, slope) if act == "leaky_relu" else act)


class _Formed(torch.autograd.Function):
    """y of an ending for a reader that takes no other; what it gives back is what a unit would."""

    @staticmethod
    def forward(ctx: Any, kernels: _Kernels, options: tuple[float, str, float], *tensors: Any) -> Tensor:
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
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():

            def run(z: Tensor, residual: Tensor | None, *norm: Any) -> Tensor:
                return formed(z, norm, residual, ctx.options)

            return (None, None, *second_order(run, tensors, needed[:6], (dy,)), None, None, None)
        z, residual, *norm = tensors
        sums = ctx.kernels.reduce(dy, z, *norm, residual, *ctx.options)
        _, du = ctx.kernels.apply(dy, z, *norm, residual, None, None, 0.0, *ctx.options, True)
        found = [None, du, None, None, _like(sums[1], norm[2]), _like(sums[0], norm[3]), du, *sums]
        return (None, None, *(grad if wanted else None for grad, wanted in zip(found, needed, strict=True)))


_backends: dict[str, _Kernels] = {}


def _kernels(backend: str) -> _Kernels:
    if backend not in _backends:
        _backends[backend] = _Kernels.of(backend)
    return _backends[backend]


def form(ending: Ending) -> Tensor:
    """y of an ending that a unit has left to its reader, differentiable, for what is no unit."""
    tensors = (ending.z, ending.residual, *ending[1:5], *(ending.ports or ()))
    y: Tensor = _Formed.apply(_kernels(ending.backend), ending.options, *tensors)
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
    for i, x in enumerate((*xs, residual, of_first)):
        ending = None if x is None or i == first or not x.requires_grad else recall(x)
        if ending is not None and not low:
            added = ending.residual
            free = added is None or (kernel == 1 and any(added is other for other in xs))
            # One input is formed on the way, and none that is added or is the residual.
            if not free or i >= len(xs) or i == residual_input or any(k is not None for k in found) or first >= 0:
                ending = None
        lean = ending is not None and ending.depth() <= _DEEPEST
        found.append(keep(x) if x is not None and lean else None)
    return tuple(found)


def chained(backend: str, call: Call, flat: Sequence[Tensor | None]) -> Any:
    """y of a unit, or where it is deferred z, mean, variance and the ports.

    Args:
        backend: the namespace that serves it.
        call: see :class:`Call`.
        flat: inputs, up-weights, weight, conv_bias, residual, bn_weight, bn_bias, and of the first input's ending
            residual, mean, var, bn_weight, bn_bias and the ports.
    """
    if not requires_grad(flat):
        return _Unit.forward(_NoContext(), _kernels(backend), call, *flat)
    # Function.apply inspects forward's signature for defaults, on every call.
    made = _apply(_kernels(backend), call, *flat)
    if not call.deferred:
        ending = made.grad_fn.__dict__.pop("ending")
        remember(made, ending)
    return made


_apply = super(torch.autograd.Function, _Unit).apply  # type: ignore[misc]


class _NoContext:
    """Takes what a call without gradients would save."""

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing to do."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Nothing to do."""
