"""Operators of a convolution of several inputs with the normalisation tail behind it, and its autograd formula.

An aggregation node (1 x 1, residual = input 0) and an IDA node (inputs upsampled on the way) are cases of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_fast import checks, reference
from dla_fast.ops.autograd import by_reference, frozen_statistics, norm_gradients, register_autograd, second_order
from dla_fast.ops.direct import direct
from dla_fast.ops.ending import NO_PROLOGUE
from dla_fast.ops.flops import register_flop_formula
from dla_fast.ops.layout import accumulation_dtype, empty_like_layout, node_channels_last
from dla_fast.ops.saved import saved, spared_of_unit, unit_names
from dla_fast.ops.upsample import upsample_flops

# factors: per input, 1 where it is taken as it is; up_weights: of the others, in order.
_NODE = "Tensor[] xs, Tensor[] up_weights, Tensor weight, Tensor? conv_bias"
_NORM = "Tensor? bn_weight, Tensor? bn_bias"
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var"
_GEOMETRY = "int[] factors, int stride, int dilation, int groups"
# residual_input: the input that is added before the activation, or -1. residual: a tensor that is, or None.
_OPTIONS = "float eps, str act, float slope"
# pre_input: the input that is given as z of the unit before, or -1; with what y = act(norm(z) + residual) of it.
_PROLOGUE = (
    "int pre_input=-1, Tensor? pre_residual=None, Tensor? pre_mean=None, Tensor? pre_var=None, "
    "Tensor? pre_weight=None, Tensor? pre_bias=None, float pre_eps=0., str pre_act='identity', float pre_slope=0."
)

SCHEMAS = (
    f"conv_norm_act_inference({_NODE}, Tensor? residual, {_NORM}, Tensor running_mean, Tensor running_var, "
    f"{_GEOMETRY}, int residual_input, {_OPTIONS}) -> Tensor",
    # z without the bias; moments of z, empty when they are not asked for.
    f"conv_norm_act_stage({_NODE}, {_RUNNING}, {_GEOMETRY}, float momentum, bool moments, {_PROLOGUE}) "
    "-> (Tensor, Tensor, Tensor)",
    # through: the gradient of the input with a prologue is dy', that of what the prologue activates, and the last list
    # has the sums of dy' and of dy' * x_hat; else it is that of y, and the list is empty. carried: is added to the
    # gradient of the first input.
    "conv_norm_act_backward(Tensor dy, Tensor[] xs, Tensor[] up_weights, Tensor weight, Tensor? residual, Tensor z, "
    f"Tensor mean, Tensor var, {_NORM}, Tensor? sum_dy, Tensor? sum_dy_xhat, {_GEOMETRY}, int residual_input, "
    f"SymInt count, {_OPTIONS}, bool[] need_dx, bool[] need_dup, bool need_dw, bool need_dresidual, {_PROLOGUE}, "
    "bool through=False, Tensor? carried=None) -> (Tensor[], Tensor[], Tensor, Tensor, Tensor[])",
    # The differentiable whole: y, then what its backward needs.
    f"conv_norm_act({_NODE}, Tensor? residual, {_NORM}, {_RUNNING}, {_GEOMETRY}, int residual_input, bool training, "
    f"float momentum, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


def _sides(x_shape: Sequence[int], weight_shape: Sequence[int], factor: int, stride: int, dilation: int) -> list[int]:
    full = [checks.upsampled(side, factor) if factor > 1 else side for side in x_shape[2:]]
    return [checks.convolved(side, weight_shape[2], stride, dilation) for side in full]


def _output(xs: list[Tensor], weight: Tensor, factors: Sequence[int], stride: int, dilation: int) -> Tensor:
    sides = _sides(xs[0].shape, weight.shape, factors[0], stride, dilation)
    return empty_like_layout(weight, (xs[0].shape[0], weight.shape[0], *sides), node_channels_last(xs, weight))


def _statistics(weight: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(weight.dtype)
    return weight.new_empty(channels, dtype=dtype), weight.new_empty(channels, dtype=dtype)


def _fake_inference(xs: list[Tensor], ups: list[Tensor], weight: Tensor, *rest: Any) -> Tensor:
    factors, stride, dilation = rest[6:9]
    return _output(xs, weight, factors, stride, dilation)


def _fake_stage(xs: list[Tensor], ups: list[Tensor], weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (factors, stride, dilation), moments = rest[3:6], rest[8]
    return _output(xs, weight, factors, stride, dilation), *_statistics(weight, weight.shape[0] if moments else 0)


def _fake_backward(
    dy: Tensor, xs: list[Tensor], ups: list[Tensor], weight: Tensor, residual: Tensor | None, z: Tensor, *rest: Any
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, list[Tensor]]:
    need_dx, need_dup, need_dw, need_dresidual, *prologue = rest[15:]
    channels_last = node_channels_last(xs, weight)
    dxs = [
        empty_like_layout(x, x.shape, channels_last) if needed else x.new_empty(0)
        for x, needed in zip(xs, need_dx, strict=True)
    ]
    dups = [w.new_empty(w.shape if needed else 0) for w, needed in zip(ups, need_dup, strict=True)]
    dw = torch.empty_like(weight) if need_dw else weight.new_empty(0)
    dresidual = empty_like_layout(z, z.shape, channels_last) if need_dresidual else z.new_empty(0)
    sums = [*_statistics(weight, xs[prologue[0]].shape[1])] if len(prologue) > 9 and prologue[9] else []
    return dxs, dups, dw, dresidual, sums


def _fake(xs: list[Tensor], ups: list[Tensor], weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    factors, stride, dilation = rest[6:9]
    y, z = (_output(xs, weight, factors, stride, dilation) for _ in range(2))
    return y, z, *_statistics(weight, weight.shape[0])


def _flops(xs_shape: Any, weight_shape: Any, geometry: Sequence[Any], wanted: Sequence[bool] | None = None) -> int:
    """One product with the inputs that are wanted, and the upsampling of those that need it."""
    factors, stride, dilation, groups = geometry
    height, width = _sides(xs_shape[0], weight_shape, factors[0], stride, dilation)
    taps = 2 * xs_shape[0][0] * height * width * weight_shape[0] * weight_shape[2] * weight_shape[3]
    total = 0
    for x, factor, needed in zip(xs_shape, factors, wanted or [True] * len(factors), strict=True):
        if needed:
            total += taps * x[1] // groups + (upsample_flops(x, factor) if factor > 1 else 0)
    return total


def _inference_flops(xs_shape: Any, ups_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(xs_shape, weight_shape, args[6:10])


def _stage_flops(xs_shape: Any, ups_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(xs_shape, weight_shape, args[3:7])


def _backward_flops(dy_shape: Any, xs_shape: Any, ups_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    geometry, need_dx, need_dw = args[8:12], args[17], args[19]
    return _flops(xs_shape, weight_shape, geometry, need_dx) + (
        _flops(xs_shape, weight_shape, geometry) if need_dw else 0
    )


class _ConvNormAct:
    """The differentiable operator of one backend: kernel and autograd formula."""

    def __init__(self, backend: str) -> None:
        self.stage = direct(backend, "conv_norm_act_stage", inputs=0)
        self.stage_backward = direct(backend, "conv_norm_act_backward", inputs=1)
        self.tail, self.tail_backward_reduce = direct(backend, "tail"), direct(backend, "tail_backward_reduce")

    def forward(
        self,
        xs: list[Tensor],
        ups: list[Tensor],
        weight: Tensor,
        conv_bias: Tensor | None,
        residual: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        factors: list[int],
        stride: int,
        dilation: int,
        groups: int,
        residual_input: int,
        training: bool,
        momentum: float,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        geometry = (factors, stride, dilation, groups)
        if training:
            z, mean, var = self.stage(
                xs, ups, weight, conv_bias, running_mean, running_var, *geometry, momentum, True, *NO_PROLOGUE
            )
        else:
            z, _, _ = self.stage(xs, ups, weight, None, None, None, *geometry, 0.0, False, *NO_PROLOGUE)
            mean, var = frozen_statistics(running_mean, running_var, conv_bias, z)
        added = residual if residual_input < 0 else xs[residual_input]
        return self.tail(z, mean, var, bn_weight, bn_bias, added, *options), z, mean, var

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        xs, ups, weight, conv_bias, residual, bn_weight, bn_bias, _, _, *options = inputs
        factors, stride, dilation, groups, residual_input, ctx.training, _, ctx.eps, act, slope = options
        ctx.rest = len(xs), len(ups), (factors, stride, dilation, groups), residual_input, (ctx.eps, act, slope)
        ctx.save_for_backward(*xs, *ups, weight, conv_bias, residual, bn_weight, bn_bias, *output[1:])

    def backward(self, ctx: Any, dy: Tensor, needed: list[bool]) -> list[Tensor | None]:
        n, m, geometry, residual_input, options = ctx.rest
        *inputs, z, mean, var = saved(
            ctx,
            "conv_norm_act",
            (dy,),
            lambda: [*unit_names(n, m), "z", "mean", "var"],
            lambda: spared_of_unit(needed, geometry[0], m, residual_input, options[1] == "identity"),
        )
        if by_reference((dy,)):
            return second_order(self._recompute(ctx, mean, var), inputs, needed, (dy,))
        xs, ups, (weight, conv_bias, residual, bn_weight, bn_bias) = inputs[:n], inputs[n : n + m], inputs[n + m :]
        need_dx, need_dup = needed[:n], needed[n : n + m]
        need_dw, need_bias, need_residual, need_gamma, need_beta = needed[n + m :]
        added = residual if residual_input < 0 else xs[residual_input]
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.training or need_gamma or need_beta or need_bias:
            sums = self.tail_backward_reduce(dy, z, mean, var, bn_weight, bn_bias, added, *options)
        made: tuple[Any, ...] = ([None] * n, [None] * m, None, None, [])
        if need_dw or need_residual or any(need_dx) or any(need_dup):
            images, _, height, width = z.shape
            made = self.stage_backward(
                dy, xs, ups, weight, residual, z, mean, var, bn_weight, bn_bias,
                *(sums if ctx.training else (None, None)), *geometry, residual_input,
                images * height * width, *options, need_dx, need_dup, need_dw, need_residual, *NO_PROLOGUE,
                False, None,
            )  # fmt: skip
        dbias, dgamma, dbeta = norm_gradients(
            ctx, sums, var, conv_bias, bn_weight, bn_bias, (need_bias, need_gamma, need_beta)
        )
        dxs, dups, dw, dresidual, _ = made
        grads = [*dxs, *dups, dw, dbias, dresidual, dgamma, dbeta]
        return [grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)]

    def _recompute(self, ctx: Any, mean: Tensor, var: Tensor) -> Any:
        n, m, (factors, stride, dilation, groups), residual_input, (_, act, slope) = ctx.rest

        def run(*tensors: Any) -> Tensor:
            xs, ups = tensors[:n], iter(tensors[n : n + m])
            weight, conv_bias, residual, bn_weight, bn_bias = tensors[n + m :]
            running: tuple[Tensor | None, Tensor | None] = (None, None)
            if not ctx.training:
                dtype = mean.dtype if bn_weight is None else bn_weight.dtype
                shifted = mean if conv_bias is None else mean + conv_bias.detach().to(mean.dtype)
                running = shifted.to(dtype), var.to(dtype)
            return reference.conv_norm_act(
                xs,
                weight,
                bn_weight,
                bn_bias,
                *running,
                training=ctx.training,
                eps=ctx.eps,
                conv_bias=conv_bias,
                stride=stride,
                dilation=dilation,
                groups=groups,
                residual=residual if residual_input < 0 else residual_input,
                upsample=[(next(ups), factor) if factor > 1 else None for factor in factors],
                act=(act, slope) if act == "leaky_relu" else act,
            )

        return run


def register(library: torch.library.Library, backend: str, key: str) -> dict[str, Callable[..., Any]]:
    """Register fakes, flop formulas, the differentiable kernel and its autograd for a backend's namespace."""
    namespace = getattr(torch.ops, f"dla_fast_{backend}")
    for name, fake, flops in (
        ("conv_norm_act_inference", _fake_inference, _inference_flops),
        ("conv_norm_act_stage", _fake_stage, _stage_flops),
        ("conv_norm_act_backward", _fake_backward, _backward_flops),
        ("conv_norm_act", _fake, _inference_flops),
    ):
        torch.library.register_fake(f"dla_fast_{backend}::{name}", fake, lib=library)
        register_flop_formula(getattr(namespace, name))(flops)
    op = _ConvNormAct(backend)
    library.impl("conv_norm_act", op.forward, key)
    return {
        "conv_norm_act": register_autograd(library, namespace.conv_norm_act.default, op, differentiable=7, lists=2),
        "conv_norm_act_inference": direct(backend, "conv_norm_act_inference", inputs=0),
    }
