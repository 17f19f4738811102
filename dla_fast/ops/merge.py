"""Operators of the IDA node (upsample some inputs, k x k convolution, norm, activation), and its autograd formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_fast import checks, reference
from dla_fast.ops.autograd import frozen_statistics, norm_gradients, register_autograd, second_order
from dla_fast.ops.flops import register_flop_formula
from dla_fast.ops.layout import accumulation_dtype, empty_like_layout, node_channels_last
from dla_fast.ops.upsample import upsample_flops

# factors: per input, 1 where it is taken as it is; up_weights: of the others, in order.
_NODE = "Tensor[] xs, Tensor[] up_weights, Tensor weight, Tensor? conv_bias"
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var"

SCHEMAS = (
    f"merge_inference({_NODE}, Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, Tensor running_var, "
    "int[] factors, float eps, str act, float slope) -> Tensor",
    f"merge_stage({_NODE}, {_RUNNING}, int[] factors, float momentum, bool moments) -> (Tensor, Tensor, Tensor)",
    "merge_backward(Tensor dy, Tensor[] xs, Tensor[] up_weights, Tensor weight, Tensor z, Tensor mean, Tensor var, "
    "Tensor? bn_weight, Tensor? bn_bias, Tensor? sum_dy, Tensor? sum_dy_xhat, int[] factors, float count, float eps, "
    "str act, float slope, bool[] need_dx, bool[] need_dup, bool need_dw) -> (Tensor[], Tensor[], Tensor)",
    f"merge({_NODE}, Tensor? bn_weight, Tensor? bn_bias, {_RUNNING}, int[] factors, bool training, float momentum, "
    "float eps, str act, float slope) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _sides(x_shape: Sequence[int], factor: int) -> list[int]:
    return [checks.upsampled(side, factor) if factor > 1 else side for side in x_shape[2:]]


def _output(xs: list[Tensor], weight: Tensor, factors: Sequence[int]) -> Tensor:
    sizes = (xs[0].shape[0], weight.shape[0], *_sides(xs[0].shape, factors[0]))
    return empty_like_layout(weight, sizes, node_channels_last(xs, weight))


def _statistics(weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(weight.dtype)
    return weight.new_empty(channels, dtype=dtype), weight.new_empty(channels, dtype=dtype)


def _fake_inference(xs: list[Tensor], ups: list[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    return _output(xs, weight, rest[-4])


def _fake_stage(xs: list[Tensor], ups: list[Tensor], weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    factors, _, moments = rest[-3:]
    return _output(xs, weight, factors), *_statistics(weight, weight.shape[0] if moments else 0)


def _fake_backward(
    dy: Tensor, xs: list[Tensor], ups: list[Tensor], weight: Tensor, *rest: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    need_dx, need_dup, need_dw = rest[-3:]
    channels_last = node_channels_last(xs, weight)
    dxs = [
        empty_like_layout(x, x.shape, channels_last) if needed else x.new_empty(0)
        for x, needed in zip(xs, need_dx, strict=True)
    ]
    dups = [w.new_empty(w.shape if needed else 0) for w, needed in zip(ups, need_dup, strict=True)]
    return dxs, dups, torch.empty_like(weight) if need_dw else weight.new_empty(0)


def _fake_merge(
    xs: list[Tensor], ups: list[Tensor], weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors = rest[-6]
    return _output(xs, weight, factors), _output(xs, weight, factors), *_statistics(weight, weight.shape[0])


def _flops(xs_shape: Any, weight_shape: Any, factors: Sequence[int], wanted: Sequence[bool] | None = None) -> int:
    """One product with the inputs that are wanted, and the upsampling of those that need it."""
    height, width = _sides(xs_shape[0], factors[0])
    taps = 2 * xs_shape[0][0] * height * width * weight_shape[0] * weight_shape[2] * weight_shape[3]
    total = 0
    for x, factor, needed in zip(xs_shape, factors, wanted or [True] * len(factors), strict=True):
        if needed:
            total += taps * x[1] + (upsample_flops(x, factor) if factor > 1 else 0)
    return total


def _inference_flops(xs_shape: Any, ups_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(xs_shape, weight_shape, args[-4])


def _stage_flops(xs_shape: Any, ups_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(xs_shape, weight_shape, args[-3])


def _merge_flops(xs_shape: Any, ups_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(xs_shape, weight_shape, args[-6])


def _backward_flops(dy_shape: Any, xs_shape: Any, ups_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    factors, (need_dx, _, need_dw) = args[-8], args[-3:]
    return _flops(xs_shape, weight_shape, factors, need_dx) + (
        _flops(xs_shape, weight_shape, factors) if need_dw else 0
    )


class _Merge:
    """The differentiable operator of one backend: kernel and autograd formula."""

    def __init__(self, namespace: Any) -> None:
        self.merge_stage, self.merge_backward = namespace.merge_stage.default, namespace.merge_backward.default
        self.tail, self.tail_backward_reduce = namespace.tail.default, namespace.tail_backward_reduce.default

    def forward(
        self,
        xs: list[Tensor],
        ups: list[Tensor],
        weight: Tensor,
        conv_bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        factors: list[int],
        training: bool,
        momentum: float,
        eps: float,
        act: str,
        slope: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if training:
            z, mean, var = self.merge_stage(
                xs, ups, weight, conv_bias, running_mean, running_var, factors, momentum, True
            )
        else:
            z, _, _ = self.merge_stage(xs, ups, weight, None, None, None, factors, 0.0, False)
            mean, var = frozen_statistics(running_mean, running_var, conv_bias, z)
        y = self.tail(z, mean, var, bn_weight, bn_bias, None, eps, act, slope)
        return y, z, mean, var

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        xs, ups, weight, conv_bias, bn_weight, bn_bias, _, _, *options = inputs
        ctx.counts = len(xs), len(ups)
        ctx.factors, ctx.training, _, ctx.eps, ctx.act, ctx.slope = options
        ctx.save_for_backward(*xs, *ups, weight, conv_bias, bn_weight, bn_bias, *output[1:])

    def backward(self, ctx: Any, dy: Tensor, needed: list[bool]) -> list[Tensor | None]:
        *inputs, z, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(self._recompute(ctx, mean, var), inputs, needed, dy)
        n, m = ctx.counts
        xs, ups, (weight, conv_bias, bn_weight, bn_bias) = inputs[:n], inputs[n : n + m], inputs[n + m :]
        need_dx, need_dup = needed[:n], needed[n : n + m]
        need_dw, need_bias, need_gamma, need_beta = needed[n + m :]
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.training or need_gamma or need_beta or need_bias:
            sums = self.tail_backward_reduce(dy, z, mean, var, bn_weight, bn_bias, None, ctx.eps, ctx.act, ctx.slope)
        dxs, dups, dw = [None] * n, [None] * m, None
        if any(need_dx) or any(need_dup) or need_dw:
            dxs, dups, dw = self.merge_backward(
                dy,
                xs,
                ups,
                weight,
                z,
                mean,
                var,
                bn_weight,
                bn_bias,
                *(sums if ctx.training else (None, None)),
                ctx.factors,
                float(z.shape[0] * z.shape[2] * z.shape[3]),
                ctx.eps,
                ctx.act,
                ctx.slope,
                need_dx,
                need_dup,
                need_dw,
            )
        norm = norm_gradients(ctx, sums, var, conv_bias, bn_weight, bn_bias, (need_bias, need_gamma, need_beta))
        return [grad if wanted else None for grad, wanted in zip([*dxs, *dups, dw, *norm], needed, strict=True)]

    def _recompute(self, ctx: Any, mean: Tensor, var: Tensor) -> Any:
        n, m = ctx.counts

        def run(*tensors: Any) -> Tensor:
            ups = iter(tensors[n : n + m])
            weight, conv_bias, bn_weight, bn_bias = tensors[n + m :]
            running_mean = running_var = None
            if not ctx.training:
                dtype = mean.dtype if bn_weight is None else bn_weight.dtype
                shifted = mean if conv_bias is None else mean + conv_bias.detach().to(mean.dtype)
                running_mean, running_var = shifted.to(dtype), var.to(dtype)
            return reference.merge(
                tensors[:n],
                weight,
                bn_weight,
                bn_bias,
                running_mean,
                running_var,
                training=ctx.training,
                eps=ctx.eps,
                conv_bias=conv_bias,
                upsample=[(next(ups), factor) if factor > 1 else None for factor in ctx.factors],
                act=(ctx.act, ctx.slope) if ctx.act == "leaky_relu" else ctx.act,
            )

        return run


def register(library: torch.library.Library, backend: str, key: str) -> dict[str, Callable[..., Any]]:
    """Register fakes, flop formulas, the differentiable kernel and its autograd for a backend's namespace."""
    namespace = getattr(torch.ops, f"dla_fast_{backend}")
    for name, fake, flops in (
        ("merge_inference", _fake_inference, _inference_flops),
        ("merge_stage", _fake_stage, _stage_flops),
        ("merge_backward", _fake_backward, _backward_flops),
        ("merge", _fake_merge, _merge_flops),
    ):
        torch.library.register_fake(f"dla_fast_{backend}::{name}", fake, lib=library)
        register_flop_formula(getattr(namespace, name))(flops)
    op = _Merge(namespace)
    library.impl("merge", op.forward, key)
    return {"merge": register_autograd(library, namespace.merge.default, op, differentiable=6, lists=2)}
