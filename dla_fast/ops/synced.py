"""Batch norm, residual and activation where the batch lies on several processes (SyncBatchNorm).

A convolution with such a norm behind it is a link of a chain as any other, :mod:`dla_fast.ops.chain`; here is the norm
without one, by a backend's operators and in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_fast.ops.autograd import by_reference
from dla_fast.ops.chain import kernels_of
from dla_fast.ops.chain_backward import Kernels, formed, like, pixels
from dla_fast.ops.joint import joint_moments, joint_sums, refuse
from dla_fast.ops.layout import accumulation_dtype
from dla_fast.ops.saved import saved
from dla_fast.reference.activation import ActSpec, parse_act
from dla_fast.reference.conv_norm_act import convolve
from dla_fast.reference.norm import Norm


class _BatchNormAct(torch.autograd.Function):
    """The whole by a backend's operators."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        norm: Norm,
        options: tuple[float, str, float],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        running = norm.running_mean, norm.running_var
        with torch._C._AutoDispatchBelowAutograd():
            own = kernels.moments(x, None, None, 0.0)
        mean, var, share = joint_moments(*own, pixels(x), norm.group, running, norm.momentum)
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.options, ctx.group = kernels, options, norm.group
        ctx.save_for_backward(x, weight, bias, residual, mean, var, share)
        with torch._C._AutoDispatchBelowAutograd():
            return kernels.tail(x, mean, var, weight, bias, residual, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        if by_reference((dy,)):
            refuse()
        need_dx, need_weight, need_bias, need_residual = ctx.needs_input_grad[3:]
        x, weight, bias, residual, mean, var, share = saved(
            ctx,
            "batch_norm_act",
            (dy,),
            lambda: ("x", "bn_weight", "bn_bias", "residual", "mean", "var", "share"),
            lambda: (2, 3) if ctx.options[1] == "identity" else (),
        )
        tail = (mean, var, weight, bias, residual)
        sums = ctx.kernels.reduce(dy, x, *tail, *ctx.options)
        dx = dresidual = None
        if need_dx or need_residual:
            joint = joint_sums(sums, share, ctx.group) if need_dx else (None, None)
            dx, dresidual = ctx.kernels.apply(dy, x, *tail, *joint, pixels(x), *ctx.options, need_residual)
        return (
            None, None, None, dx if need_dx else None, like(sums[1], weight) if need_weight else None,
            like(sums[0], bias) if need_bias else None, dresidual if need_residual else None,
        )  # fmt: skip


class _Moments(torch.autograd.Function):
    """Joint mean and biased variance of maps in plain PyTorch, in the accumulation dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        values = pixels(x)
        wide = x.to(accumulation_dtype(x.dtype))
        if values:
            mean = wide.mean((0, 2, 3))
            var = (wide - mean[:, None, None]).square().mean((0, 2, 3))
        else:
            mean, var = wide.new_zeros(x.shape[1]), wide.new_zeros(x.shape[1])
        running = norm.running_mean, norm.running_var
        mean, var, share = joint_moments(mean, var, values, norm.group, running, norm.momentum)
        ctx.group = norm.group
        ctx.save_for_backward(x, mean, share)
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, None]:
        if by_reference((dmean, dvar)):
            refuse()
        x, mean, share = ctx.saved_tensors
        dmean, dvar = joint_sums((dmean, dvar), share, ctx.group)
        centered = x.to(mean.dtype) - mean[:, None, None]
        dx = (dmean[:, None, None] + 2 * dvar[:, None, None] * centered) / max(1, pixels(x))
        return dx.to(x.dtype), None


def batch_norm_act(backend: str, x: Tensor, norm: Norm, residual: Tensor | None, act: ActSpec) -> Tensor:
    """``act(batch_norm(x) + residual)`` with the statistics of all processes of ``norm.group``.

    Every process of the group has to call it, also one whose batch is empty. Differentiable once; the gradients of the
    norm's weight and bias are those of this process's values, as DistributedDataParallel expects them.

    Args:
        backend: whose operators serve it, or "reference" for plain PyTorch.
        x: (N, C, H, W).
        norm: in training, with a group.
        residual: of the shape and dtype of ``x``, or None.
        act: as in :func:`dla_fast.functional.batch_norm_act`.

    Raises:
        ValueError: all processes together have one value per channel.
    """
    name, slope = parse_act(act)
    options = (norm.eps, name, slope)
    if backend == "reference":
        mean, var = _Moments.apply(x, norm)
        return formed(x, (mean, var, norm.weight, norm.bias), residual, options)
    y: Tensor = _BatchNormAct.apply(kernels_of(backend), norm, options, x, norm.weight, norm.bias, residual)
    return y


def node(
    xs: Sequence[Tensor],
    weight: Tensor,
    norm: Norm,
    *,
    conv_bias: Tensor | None,
    stride: int,
    dilation: int,
    groups: int,
    residual: int | Tensor | None,
    upsample: Sequence[tuple[Tensor, int] | None] | None,
    act: ActSpec,
) -> Tensor:
    """:func:`dla_fast.reference.conv_norm_act.node` with the statistics of all processes of ``norm.group``."""
    z = convolve(xs, weight, conv_bias, stride, dilation, groups, upsample)
    return batch_norm_act("reference", z, norm, xs[residual] if isinstance(residual, int) else residual, act)
