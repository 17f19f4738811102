"""The functional API: check the arguments, ask :mod:`dla_fast.backend` who serves the call, run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_fast import backend, checks, ops, reference
from dla_fast.ops import cuda
from dla_fast.reference.activation import ActSpec, parse_act

__all__ = ["aggregate", "batch_norm_act", "merge", "upsample", "upsample_add"]


# Whether autocast exists for a device type, asked once per type.
_autocasts: dict[str, bool] = {}


@cuda.constant_when_traced
def _has_autocast(device: str) -> bool:
    """``torch.amp.is_autocast_available``, a question that torch 2.11's compiler cannot trace."""
    if device not in _autocasts:
        _autocasts[device] = torch.amp.is_autocast_available(device)
    return _autocasts[device]


def _autocast(tensors: Sequence[Any]) -> list[Any]:
    """Cast what a convolution reads as autocast casts conv2d's arguments: everything floating but float64."""
    for first in tensors:
        if isinstance(first, Tensor):
            break
    else:
        return list(tensors)
    device = first.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _needs_reference() -> bool:
    """Whether the call is being taken apart (vmap, jvp, export, tracing), which only plain PyTorch ops survive."""
    if torch.compiler.is_compiling():
        return backend.is_exporting()
    return (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _serving(op: str, like: Tensor, inference: bool = False) -> str:
    if _needs_reference():
        return "reference"
    device = like.device.type
    if inference and device == cuda.DEVICE:
        pixels = like.shape[0] * like.shape[2] * like.shape[3]
        found = backend.serves_inference(op, device, like.dtype, pixels)
        if found is not None:
            return found
    return backend.resolve(op, device, like.dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def aggregate(
    xs: Sequence[Tensor],
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    conv_bias: Tensor | None = None,
    residual: bool = False,
    act: ActSpec = "relu",
) -> Tensor:
    """Aggregation node: ``act(batch_norm(conv1x1(cat(xs))) + (xs[0] if residual else 0))`` without the concat.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), equation 2.

    Args:
        xs: inputs of shapes (N, C_i, H, W), one dtype and device, channels_last or contiguous.
        weight: (C_out, sum of C_i, 1, 1), dtype of the inputs.
        bn_weight: (C_out,) or None for a norm without affine parameters; so is ``bn_bias``. Beside half-precision
            inputs the norm's tensors may be float32.
        bn_bias: see ``bn_weight``.
        running_mean: (C_out,), updated in place in training, or None (with ``running_var``).
        running_var: see ``running_mean``.
        training: normalise with the statistics of this batch, as in :func:`torch.nn.functional.batch_norm`.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        conv_bias: (C_out,), the convolution's bias, or None.
        residual: add ``xs[0]`` between norm and activation; needs C_0 == C_out.
        act: "relu", "identity", "silu", "leaky_relu", "hardswish", or ("leaky_relu", slope).

    Returns:
        (N, C_out, H, W) in the inputs' dtype; channels_last if every input or the weight is, else contiguous.

    Raises:
        ValueError: shapes, channel counts, devices or options that do not fit.
        TypeError: dtypes that are not floating or not equal, wrong argument types.
        RuntimeError: a forced backend cannot run the call.
    """
    xs = checks.check_inputs(xs)
    *cast, weight, conv_bias = _autocast([*xs, weight, conv_bias])
    xs = cast
    checks.check_one_kind(xs)
    checks.check_same_size(xs)
    checks.check_weight(weight, xs, kernels=(1,))
    x, channels = xs[0], weight.shape[0]
    checks.check_vector("conv_bias", conv_bias, channels, x, norm=False)
    if residual and x.shape[1] != channels:
        raise ValueError(f"residual: expected xs[0] to have the output's {channels} channels, got {x.shape[1]}")
    name, slope = parse_act(act)
    checks.check_batch_norm(
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        eps=eps,
        channels=channels,
        like=x,
        values_per_channel=x.shape[0] * x.shape[2] * x.shape[3],
    )
    differentiable = training or _needs_grad(*xs, weight, conv_bias, bn_weight, bn_bias)
    serving = _serving("aggregate", x, inference=not differentiable)
    if serving == "reference":
        return reference.aggregate(
            xs,
            weight,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            conv_bias=conv_bias,
            residual=residual,
            act=act,
        )
    if differentiable:
        return ops.differentiable(serving, "aggregate")(
            xs,
            weight,
            conv_bias,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            residual,
            name,
            slope,
        )[0]
    y: Tensor = ops.namespace(serving).aggregate_inference(
        xs, weight, conv_bias, bn_weight, bn_bias, running_mean, running_var, eps, residual, name, slope
    )
    return y


def merge(
    xs: Sequence[Tensor],
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    conv_bias: Tensor | None = None,
    upsample: Sequence[tuple[Tensor, int] | None] | None = None,
    act: ActSpec = "relu",
) -> Tensor:
    """IDA node: ``act(batch_norm(conv_kxk(cat(xs))))``, k = 1 or 3, any input upsampled first.

    Args:
        xs: inputs (N, C_i, H_i, W_i); those to be upsampled are still low-resolution.
        weight: (C_out, sum of C_i, k, k), padding ``k // 2``.
        bn_weight: as in :func:`aggregate`, like the rest of the norm's arguments.
        bn_bias: see :func:`aggregate`.
        running_mean: see :func:`aggregate`.
        running_var: see :func:`aggregate`.
        training: see :func:`aggregate`.
        momentum: see :func:`aggregate`.
        eps: see :func:`aggregate`.
        conv_bias: (C_out,) or None.
        upsample: per input None or ``(up_weight, factor)`` as :func:`upsample` takes them.
        act: see :func:`aggregate`.

    Returns:
        (N, C_out, H, W).

    Raises:
        ValueError: shapes, factors or options that do not fit.
        TypeError: dtypes that are not floating or not equal, wrong argument types.
        RuntimeError: a forced backend cannot run the call.
    """
    xs = checks.check_inputs(xs)
    ups: list[tuple[Tensor, int] | None] = list(upsample) if upsample is not None else [None] * len(xs)
    if len(ups) != len(xs):
        raise ValueError(f"upsample: expected one entry per input ({len(xs)}), got {len(ups)}")
    *cast, weight, conv_bias = _autocast([*xs, weight, conv_bias])
    xs = cast
    checks.check_one_kind(xs)
    checks.check_weight(weight, xs, kernels=(1, 3))
    sizes = []
    for i, (x, up) in enumerate(zip(xs, ups, strict=True)):
        height, width = x.shape[2:]
        if up is not None:
            if not isinstance(up, tuple) or len(up) != 2:
                raise TypeError(f"upsample[{i}]: expected None or (up_weight, factor), got {up!r}")
            factor = checks.check_factor(up[1], f"upsample[{i}] factor")
            (up_weight,) = _autocast([up[0]])
            checks.check_up_weight(f"upsample[{i}] weight", up_weight, x, factor)
            ups[i] = (up_weight, factor)
            height, width = checks.upsampled(height, factor), checks.upsampled(width, factor)
        sizes.append((x.shape[0], height, width))
        if sizes[i] != sizes[0]:
            raise ValueError(f"xs[{i}]: expected (N, H, W) = {sizes[0]} after upsampling as xs[0] has, got {sizes[i]}")
    x, channels = xs[0], weight.shape[0]
    checks.check_vector("conv_bias", conv_bias, channels, x, norm=False)
    name, slope = parse_act(act)
    checks.check_batch_norm(
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        eps=eps,
        channels=channels,
        like=x,
        values_per_channel=sizes[0][0] * sizes[0][1] * sizes[0][2],
    )
    serving = _serving("merge", x)
    if serving == "reference":
        return reference.merge(
            xs,
            weight,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            conv_bias=conv_bias,
            upsample=ups,
            act=act,
        )
    up_weights = [up[0] for up in ups if up is not None]
    factors = [1 if up is None else up[1] for up in ups]
    if training or _needs_grad(*xs, *up_weights, weight, conv_bias, bn_weight, bn_bias):
        return ops.differentiable(serving, "merge")(
            xs,
            up_weights,
            weight,
            conv_bias,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            factors,
            training,
            momentum,
            eps,
            name,
            slope,
        )[0]
    y: Tensor = ops.namespace(serving).merge_inference(
        xs, up_weights, weight, conv_bias, bn_weight, bn_bias, running_mean, running_var, factors, eps, name, slope
    )
    return y


def batch_norm_act(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: ActSpec = "relu",
) -> Tensor:
    """``act(batch_norm(x) + residual)`` in one pass after the statistics.

    Args:
        x: (N, C, H, W), channels_last or contiguous.
        bn_weight: (C,) or None, like the rest of the norm's arguments in :func:`aggregate`.
        bn_bias: see :func:`aggregate`.
        running_mean: see :func:`aggregate`.
        running_var: see :func:`aggregate`.
        training: see :func:`aggregate`.
        momentum: see :func:`aggregate`.
        eps: see :func:`aggregate`.
        residual: shape and dtype of ``x``, or None.
        act: see :func:`aggregate`.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: shapes, devices or options that do not fit.
        TypeError: dtypes that are not floating or not equal, wrong argument types.
        RuntimeError: a forced backend cannot run the call.
    """
    checks.check_tensor("x", x, rank=4)
    name, slope = parse_act(act)
    if residual is not None:
        checks.check_residual(residual, x.shape, x)
    checks.check_batch_norm(
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        eps=eps,
        channels=x.shape[1],
        like=x,
        values_per_channel=x.shape[0] * x.shape[2] * x.shape[3],
    )
    serving = _serving("batch_norm_act", x)
    if serving == "reference":
        return reference.batch_norm_act(
            x,
            bn_weight,
            bn_bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            residual=residual,
            act=act,
        )
    if training or _needs_grad(x, residual, bn_weight, bn_bias):
        return ops.differentiable(serving, "batch_norm_act")(
            x, bn_weight, bn_bias, residual, running_mean, running_var, training, momentum, eps, name, slope
        )[0]
    y: Tensor = ops.namespace(serving).tail(
        x, running_mean, running_var, bn_weight, bn_bias, residual, eps, name, slope
    )
    return y


def upsample(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """IDA's learned upsampling: depthwise transposed convolution, kernel 2f, stride f, padding f // 2.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, 2f, 2f), dtype of ``x``.
        factor: f >= 2.

    Returns:
        (N, C, H', W') with ``H' = (H - 1) * f - 2 * (f // 2) + 2 * f``.

    Raises:
        ValueError: shapes or factor that do not fit.
        TypeError: a factor that is not an integer, dtypes that are not floating or not equal.
        RuntimeError: a forced backend cannot run the call.
    """
    x, weight = _autocast([x, weight])
    checks.check_tensor("x", x, rank=4)
    checks.check_up_weight("weight", weight, x, checks.check_factor(factor))
    serving = _serving("upsample", x)
    if serving == "reference":
        return reference.upsample(x, weight, factor)
    return ops.differentiable(serving, "upsample")(x, weight, factor)


def upsample_add(x: Tensor, skip: Tensor, weight: Tensor, factor: int) -> Tensor:
    """``upsample(x, weight, factor) + skip``, the step of the add-merging IDA family.

    Args:
        x: (N, C, H, W).
        skip: the shape of the upsampled map.
        weight: (C, 1, 2f, 2f), dtype of ``x``.
        factor: f >= 2.

    Returns:
        Shape of ``skip``.

    Raises:
        ValueError: shapes or factor that do not fit.
        TypeError: a factor that is not an integer, dtypes that are not floating or not equal.
        RuntimeError: a forced backend cannot run the call.
    """
    x, weight, skip = _autocast([x, weight, skip])
    checks.check_tensor("x", x, rank=4)
    checks.check_up_weight("weight", weight, x, checks.check_factor(factor))
    size = (*x.shape[:2], checks.upsampled(x.shape[2], factor), checks.upsampled(x.shape[3], factor))
    checks.check_residual(skip, size, x, "skip")
    serving = _serving("upsample_add", x)
    if serving == "reference":
        return reference.upsample_add(x, skip, weight, factor)
    return ops.differentiable(serving, "upsample_add")(x, skip, weight, factor)
