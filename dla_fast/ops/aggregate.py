"""Operators of the aggregation node, and its autograd formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dla_fast import reference
from dla_fast.ops.autograd import frozen_statistics, norm_gradients, register_autograd, second_order
from dla_fast.ops.flops import register_flop_formula
from dla_fast.ops.layout import accumulation_dtype, empty_like_layout, node_channels_last

_NODE = "Tensor[] xs, Tensor weight, Tensor? conv_bias"

SCHEMAS = (
    f"aggregate_inference({_NODE}, Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, Tensor running_var, "
    "float eps, bool residual, str act, float slope) -> Tensor",
    # z without the bias; moments of z, empty when they are not asked for.
    f"aggregate_stage({_NODE}, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, bool moments) "
    "-> (Tensor, Tensor, Tensor)",
    "aggregate_backward(Tensor dy, Tensor[] xs, Tensor weight, Tensor z, Tensor mean, Tensor var, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor? sum_dy, Tensor? sum_dy_xhat, float count, float eps, bool residual, str act, "
    "float slope, bool[] need_dx, bool need_dw) -> (Tensor[], Tensor)",
    # The differentiable whole: y, then what its backward needs.
    f"aggregate({_NODE}, Tensor? bn_weight, Tensor? bn_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "bool training, float momentum, float eps, bool residual, str act, float slope) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


def _output(xs: list[Tensor], weight: Tensor) -> Tensor:
    sizes = (xs[0].shape[0], weight.shape[0], *xs[0].shape[2:])
    return empty_like_layout(weight, sizes, node_channels_last(xs, weight))


def _statistics(weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(weight.dtype)
    return weight.new_empty(channels, dtype=dtype), weight.new_empty(channels, dtype=dtype)


def _fake_inference(xs: list[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    return _output(xs, weight)


def _fake_stage(xs: list[Tensor], weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    moments = rest[-1]
    return _output(xs, weight), *_statistics(weight, weight.shape[0] if moments else 0)


def _fake_backward(dy: Tensor, xs: list[Tensor], weight: Tensor, *rest: Any) -> tuple[list[Tensor], Tensor]:
    *_, need_dx, need_dw = rest
    channels_last = node_channels_last(xs, weight)
    dxs = [
        empty_like_layout(x, x.shape, channels_last) if needed else x.new_empty(0)
        for x, needed in zip(xs, need_dx, strict=True)
    ]
    return dxs, torch.empty_like(weight) if need_dw else weight.new_empty(0)


def _fake_aggregate(xs: list[Tensor], weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _output(xs, weight), _output(xs, weight), *_statistics(weight, weight.shape[0])


def _forward_flops(xs_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    n, _, h, w = xs_shape[0]
    return 2 * n * h * w * weight_shape[0] * weight_shape[1]


def _backward_flops(dy_shape: Any, xs_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    need_dx, need_dw = args[-2:]
    n, out_channels, h, w = dy_shape
    columns = sum(x[1] for x, needed in zip(xs_shape, need_dx, strict=True) if needed)
    return 2 * n * h * w * out_channels * (columns + (weight_shape[1] if need_dw else 0))


class _Aggregate:
    """The differentiable operator of one backend: kernel and autograd formula."""

    def __init__(self, namespace: Any) -> None:
        self.aggregate_stage = namespace.aggregate_stage.default
        self.aggregate_backward = namespace.aggregate_backward.default
        self.tail, self.tail_backward_reduce = namespace.tail.default, namespace.tail_backward_reduce.default

    def forward(
        self,
        xs: list[Tensor],
        weight: Tensor,
        conv_bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        residual: bool,
        act: str,
        slope: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if training:
            z, mean, var = self.aggregate_stage(xs, weight, conv_bias, running_mean, running_var, momentum, True)
        else:
            z, _, _ = self.aggregate_stage(xs, weight, None, None, None, 0.0, False)
            mean, var = frozen_statistics(running_mean, running_var, conv_bias, z)
        y = self.tail(z, mean, var, bn_weight, bn_bias, xs[0] if residual else None, eps, act, slope)
        return y, z, mean, var

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        xs, weight, conv_bias, bn_weight, bn_bias, _, _, *options = inputs
        _, z, mean, var = output
        ctx.inputs = len(xs)
        ctx.training, _, ctx.eps, ctx.residual, ctx.act, ctx.slope = options
        ctx.save_for_backward(*xs, weight, conv_bias, bn_weight, bn_bias, z, mean, var)

    def backward(self, ctx: Any, dy: Tensor, needed: list[bool]) -> list[Tensor | None]:
        *inputs, z, mean, var = ctx.saved_tensors
        xs, (weight, conv_bias, bn_weight, bn_bias) = inputs[: ctx.inputs], inputs[ctx.inputs :]
        if torch.is_grad_enabled():
            return second_order(self._recompute(ctx, mean, var), inputs, needed, dy)
        need_dx, (need_dw, need_bias, need_gamma, need_beta) = needed[: ctx.inputs], needed[ctx.inputs :]
        residual = xs[0] if ctx.residual else None
        tail = (bn_weight, bn_bias, residual, ctx.eps, ctx.act, ctx.slope)
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.training or need_gamma or need_beta or need_bias:
            sums = self.tail_backward_reduce(dy, z, mean, var, *tail)
        dxs: list[Tensor | None] = [None] * ctx.inputs
        dw = None
        if any(need_dx) or need_dw:
            made, dw = self.aggregate_backward(
                dy,
                xs,
                weight,
                z,
                mean,
                var,
                bn_weight,
                bn_bias,
                *(sums if ctx.training else (None, None)),
                float(z.shape[0] * z.shape[2] * z.shape[3]),
                ctx.eps,
                ctx.residual,
                ctx.act,
                ctx.slope,
                need_dx,
                need_dw,
            )
            dxs = [dx if wanted else None for dx, wanted in zip(made, need_dx, strict=True)]
        dbias, dgamma, dbeta = norm_gradients(
            ctx, sums, var, conv_bias, bn_weight, bn_bias, (need_bias, need_gamma, need_beta)
        )
        return [*dxs, dw if need_dw else None, dbias, dgamma, dbeta]

    def _recompute(self, ctx: Any, mean: Tensor, var: Tensor) -> Any:
        def run(*tensors: Any) -> Tensor:
            xs, (weight, conv_bias, bn_weight, bn_bias) = tensors[: ctx.inputs], tensors[ctx.inputs :]
            running_mean = running_var = None
            if not ctx.training:
                dtype = mean.dtype if bn_weight is None else bn_weight.dtype
                shifted = mean if conv_bias is None else mean + conv_bias.detach().to(mean.dtype)
                running_mean, running_var = shifted.to(dtype), var.to(dtype)
            return reference.aggregate(
                xs,
                weight,
                bn_weight,
                bn_bias,
                running_mean,
                running_var,
                training=ctx.training,
                eps=ctx.eps,
                conv_bias=conv_bias,
                residual=ctx.residual,
                act=(ctx.act, ctx.slope) if ctx.act == "leaky_relu" else ctx.act,
            )

        return run


def register(library: torch.library.Library, backend: str, key: str) -> dict[str, Callable[..., Any]]:
    """Register fakes, flop formulas, the differentiable kernel and its autograd for a backend's namespace."""
    namespace = getattr(torch.ops, f"dla_fast_{backend}")
    for name, fake, flops in (
        ("aggregate_inference", _fake_inference, _forward_flops),
        ("aggregate_stage", _fake_stage, _forward_flops),
        ("aggregate_backward", _fake_backward, _backward_flops),
        ("aggregate", _fake_aggregate, _forward_flops),
    ):
        torch.library.register_fake(f"dla_fast_{backend}::{name}", fake, lib=library)
        register_flop_formula(getattr(namespace, name))(flops)
    op = _Aggregate(namespace)
    library.impl("aggregate", op.forward, key)
    return {"aggregate": register_autograd(library, namespace.aggregate.default, op, differentiable=5, lists=1)}
