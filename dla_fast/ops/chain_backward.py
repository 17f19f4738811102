"""The backward of a unit in a chain, see :mod:`dla_fast.ops.chain`: by kernels, and by the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_fast.ops.autograd import cast, second_order
from dla_fast.ops.direct import direct
from dla_fast.ops.ending import NO_PROLOGUE, Ending, Kept, prologue, valued
from dla_fast.ops.joint import joint_sums
from dla_fast.ops.layout import accumulation_dtype
from dla_fast.reference.activation import activate
from dla_fast.reference.conv_norm_act import convolve

# What follows a call's inputs and up-weights: weight, conv_bias, residual, bn_weight, bn_bias; of the first input's
# ending residual, mean, var, bn_weight, bn_bias and three ports; the carrier that takes a residual's gradient to where
# that is an input.
RESIDUAL, BN_WEIGHT, FIRST, PORTS, CARRIER, END = 2, 3, 5, 10, 13, 14


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
        carries: of a deferred unit: take a further gradient of the first input, by a port.
        group: the process group whose processes' values are the norm's batch, or None.
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
    carries: bool = False
    group: Any = None

    @property
    def behind(self) -> int:
        """Where what follows the inputs and the up-weights begins."""
        return self.inputs + self.ups

    def place(self, i: int) -> int:
        """Where the tensor that ``kept[i]`` stands for is among all."""
        return i if i < self.inputs else self.behind + (RESIDUAL if i == self.inputs else FIRST)

    @property
    def act(self) -> str | tuple[str, float]:
        """The activation, as the reference takes it."""
        _, act, slope = self.options
        return (act, slope) if act == "leaky_relu" else act


class Kernels(NamedTuple):
    """The operators of a backend."""

    backend: str
    stage: Callable[..., Any]
    backward: Callable[..., Any]
    moments: Callable[..., tuple[Tensor, Tensor]]
    tail: Callable[..., Tensor]
    reduce: Callable[..., tuple[Tensor, Tensor]]
    apply: Callable[..., tuple[Tensor, Tensor]]

    @staticmethod
    def of(backend: str) -> Kernels:
        return Kernels(
            backend,
            direct(backend, "conv_norm_act_stage", inputs=0),
            direct(backend, "conv_norm_act_backward", inputs=1),
            direct(backend, "moments"),
            direct(backend, "tail"),
            direct(backend, "tail_backward_reduce"),
            direct(backend, "tail_backward_apply"),
        )


def pixels(z: Tensor) -> int:
    """How many values a channel of a map has."""
    return z.shape[0] * z.shape[2] * z.shape[3]


def once(
    ctx: Any,
    flat: list[Any],
    endings: list[Ending | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    made: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor | None]:
    """The gradients by kernels."""
    call: Call = ctx.call
    kernels: Kernels = ctx.kernels
    n, at = call.inputs, call.behind
    (z, mean, var), (eps, act, slope) = made, call.options
    weight, conv_bias, residual, bn_weight, bn_bias, *of_first = flat[at:]
    need_dx, need_dup = list(needed[:n]), list(needed[n:at])
    need_dw, need_bias, need_residual, *_ = needed[at:]
    carrier = needed[at + CARRIER]
    through = call.first >= 0 and (need_dx[call.first] or any(needed[at + FIRST : at + CARRIER]))
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
        act, slope, added, residual, need_residual = "identity", 0.0, None, None, False
        dy, sums, bn_weight = _returned(grads, made, bn_weight, eps)
    else:
        sums = kernels.reduce(dy, z, mean, var, bn_weight, bn_bias, added, eps, act, slope)
    dxs: Sequence[Any] = [None] * n
    dups: Sequence[Any] = [None] * call.ups
    dw = dresidual = None
    of_norm: Sequence[Tensor | None] = [None, None]
    if need_dw or need_residual or any(need_dx) or any(need_dup):
        joint = sums if call.group is None else joint_sums(sums, ctx.share, call.group)
        dxs, dups, dw, dresidual, through_sums = kernels.backward(
            dy, xs, flat[n:at], weight, residual, z, mean, var, bn_weight, bn_bias, *joint, *call.geometry,
            -1 if call.deferred else call.residual_input, pixels(z), eps, act, slope, need_dx,
            need_dup, need_dw, need_residual, *pre, through, grads[6] if call.carries and need_dx[0] else None,
        )  # fmt: skip
        of_norm = through_sums if through else of_norm
    # Zero, unless something is not finite.
    dbias = like(sums[1] * 0, conv_bias) if need_bias else None
    dgamma, dbeta = (None, None) if call.deferred else (sums[1], sums[0])
    du = dxs[call.first] if through else None
    dxs = [None if through and i == call.first else dx for i, dx in enumerate(dxs)]
    # The gradient of what was added before an activation goes by the carrier, where there is one.
    summed = du if call.first >= 0 and of_first[0] is not None else dresidual
    carried = summed if carrier else None
    found = [
        *dxs, *dups, dw, dbias, None if carrier else dresidual, like(dgamma, bn_weight), like(dbeta, bn_bias),
        None if carrier else du, None, None, like(of_norm[1], of_first[3]), like(of_norm[0], of_first[4]),
        du, *of_norm, carried,
    ]  # fmt: skip
    return [grad if wanted else None for grad, wanted in zip(found, needed, strict=True)]


def _returned(
    grads: Sequence[Tensor | None], made: tuple[Tensor, Tensor, Tensor], bn_weight: Tensor | None, eps: float
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """dy' of a deferred unit, its sums, and the weight of the norm that they are of."""
    if grads[0] is grads[1] is grads[2] is None:
        dy, *sums = (torch.zeros_like(t) if grad is None else grad for t, grad in zip(made, grads[3:6], strict=True))
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
        torch.zeros_like(t) if grad is None else grad for t, grad in zip((*made, *made), grads[:6], strict=True)
    )
    rstd = (var + eps).rsqrt()
    scale = rstd if bn_weight is None else rstd * bn_weight.to(rstd.dtype)
    dz = dz + (du * scale[:, None, None]).to(z.dtype)
    return [dz, dmean - scale * total, dvar - 0.5 * scale * rstd * total_xhat]


def like(total: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if total is None or parameter is None else cast(total, parameter.dtype)


def twice(
    ctx: Any,
    flat: list[Any],
    endings: list[Ending | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    made: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor | None]:
    """The gradients by the reference, to be differentiated again, or of batches of gradients."""
    call: Call = ctx.call
    n, at = call.inputs, call.inputs + call.ups
    for i, (kept, ending) in enumerate(zip(call.kept, endings, strict=True)):
        if kept is not None and ending is not None:
            with torch.no_grad():
                y = ending.form(ctx.kernels.tail, {})
            with torch.enable_grad():
                flat[call.place(i)] = valued(kept.edge, y)

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
        y = F.batch_norm(z, None, None, bn_weight, bn_bias, True, 0.0, call.options[0])
        residual = residual if call.residual_input < 0 else xs[call.residual_input]
        return activate(y if residual is None else y + residual, call.act)

    if call.deferred:
        grads = grads[:3] if grads[3] is None else gradients_of(grads, made, flat[at + BN_WEIGHT], call.options[0])
    return [*second_order(run, flat, needed[: at + PORTS], grads), *[None] * (END - PORTS)]


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
