"""The differentiable operator of batch norm, residual and activation, over the operators of the tail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dla_fast import reference
from dla_fast.ops.autograd import by_reference, frozen_statistics, norm_gradients, register_autograd, second_order
from dla_fast.ops.flops import register_flop_formula
from dla_fast.ops.saved import saved
from dla_fast.ops.tail import _FLOPS, _like, _statistics

SCHEMAS = (
    # y, then the mean and variance that its backward needs. residual stands early: it can have a gradient.
    "batch_norm_act(Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, str act, float slope) "
    "-> (Tensor, Tensor, Tensor)",
)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), *_statistics(x)


def _flops(x_shape: Any, *args: Any, **kwargs: Any) -> int:
    return (_FLOPS["moments"] + _FLOPS["tail"]) * math.prod(x_shape)


class _BatchNormAct:
    """The differentiable operator of one backend: kernel and autograd formula."""

    def __init__(self, namespace: Any) -> None:
        self.moments, self.tail = namespace.moments.default, namespace.tail.default
        self.tail_backward_reduce = namespace.tail_backward_reduce.default
        self.tail_backward_apply = namespace.tail_backward_apply.default

    def forward(
        self,
        x: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        act: str,
        slope: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if training:
            mean, var = self.moments(x, running_mean, running_var, momentum)
        else:
            mean, var = frozen_statistics(running_mean, running_var, None, x)
        return self.tail(x, mean, var, bn_weight, bn_bias, residual, eps, act, slope), mean, var

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, bn_weight, bn_bias, residual, _, _, ctx.training, _, ctx.eps, ctx.act, ctx.slope = inputs
        ctx.save_for_backward(x, bn_weight, bn_bias, residual, *output[1:])

    def backward(self, ctx: Any, dy: Tensor, needed: list[bool]) -> list[Tensor | None]:
        *inputs, mean, var = saved(
            ctx,
            "batch_norm_act",
            (dy,),
            lambda: ("x", "bn_weight", "bn_bias", "residual", "mean", "var"),
            lambda: (2, 3) if ctx.act == "identity" else (),
        )
        x, bn_weight, bn_bias, residual = inputs
        need_dx, need_gamma, need_beta, need_residual = needed
        if by_reference((dy,)):
            return second_order(self._recompute(ctx, mean, var), inputs, needed, (dy,))
        tail = (mean, var, bn_weight, bn_bias, residual)
        options = (ctx.eps, ctx.act, ctx.slope)
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if (ctx.training and need_dx) or need_gamma or need_beta:
            sums = self.tail_backward_reduce(dy, x, *tail, *options)
        dx = dresidual = None
        if need_dx or need_residual:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            batch = sums if ctx.training else (None, None)
            dx, dresidual = self.tail_backward_apply(dy, x, *tail, *batch, count, *options, need_residual)
        _, dgamma, dbeta = norm_gradients(ctx, sums, var, None, bn_weight, bn_bias, (False, need_gamma, need_beta))
        return [dx if need_dx else None, dgamma, dbeta, dresidual if need_residual else None]

    def _recompute(self, ctx: Any, mean: Tensor, var: Tensor) -> Any:
        def run(x: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None) -> Tensor:
            running: tuple[Tensor | None, Tensor | None] = (None, None)
            if not ctx.training:
                dtype = mean.dtype if bn_weight is None else bn_weight.dtype
                running = (mean.to(dtype), var.to(dtype))
            return reference.batch_norm_act(
                x,
                bn_weight,
                bn_bias,
                *running,
                training=ctx.training,
                eps=ctx.eps,
                residual=residual,
                act=(ctx.act, ctx.slope) if ctx.act == "leaky_relu" else ctx.act,
            )

        return run


def register(library: torch.library.Library, backend: str, key: str) -> dict[str, Callable[..., Any]]:
    """Register fake, flop formula, kernel and autograd for a backend's namespace."""
    namespace = getattr(torch.ops, f"dla_fast_{backend}")
    torch.library.register_fake(f"dla_fast_{backend}::batch_norm_act", _fake, lib=library)
    register_flop_formula(namespace.batch_norm_act)(_flops)
    op = _BatchNormAct(namespace)
    library.impl("batch_norm_act", op.forward, key)
    return {"batch_norm_act": register_autograd(library, namespace.batch_norm_act.default, op, differentiable=4)}
