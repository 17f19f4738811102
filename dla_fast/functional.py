"""The functional API: check the arguments (:mod:`dla_fast.checks`), ask :mod:`dla_fast.backend` who serves, run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dla_fast import backend, checks, ops, reference
from dla_fast.arguments import autocast, checked
from dla_fast.ops import chain, cuda, synced
from dla_fast.ops.autograd import is_transformed, requires_grad
from dla_fast.ops.ending import Ending
from dla_fast.ops.inference import saveable
from dla_fast.reference.activation import ActSpec, parse_act
from dla_fast.reference.batch_norm_act import normalise
from dla_fast.reference.conv_norm_act import added_to_aggregate, node
from dla_fast.reference.norm import Norm

__all__ = ["aggregate", "batch_norm_act", "conv_norm_act", "merge", "upsample", "upsample_add"]


def _serving(op: str, device: str, dtype: torch.dtype) -> str:
    return "reference" if backend.needs_reference() else backend.resolve(op, device, dtype)


def run_node(*arguments: Any) -> Tensor:
    """y of :func:`run_link`, whose first arguments these are: a unit that is no link of a chain."""
    return cast(Tensor, run_link(*arguments))


def run_link(
    op: str,
    given: Sequence[Tensor],
    given_weight: Tensor,
    norm: Norm,
    kernels: tuple[int, ...] | None,
    given_bias: Tensor | None,
    stride: int,
    dilation: int,
    groups: int,
    residual: int | Tensor | None,
    given_upsample: checks.Upsampling | None,
    act: ActSpec,
    first: int = -1,
    ending: Ending | None = None,
    deferred: bool = False,
    carries: bool = False,
    carried: bool = False,
    low: bool = False,
) -> Tensor | Ending:
    """:func:`conv_norm_act` under the name ``op``, with a norm in one piece (:func:`checked`), as a link of a chain.

    Args:
        op: see :func:`conv_norm_act`, like all that follow, up to ``act``.
        first: the input that is ``ending.z``, or -1.
        ending: of the unit before, which has left it to this one.
        deferred: leave this unit's ending to its reader, where a call allows that.
        carries: where it is left, take a further gradient of the only input, by a carrier.
        carried: the residual is the input of the unit whose carrier ``ending`` has: its gradient goes there.
        low: save as little for the backward pass as can be formed again there.

    Returns:
        y, or where that is deferred how it is formed.
    """
    xs, weight, conv_bias, added, residual_input, upsample, up_weights, factors, name, slope = checked(
        op, given, given_weight, norm, kernels, given_bias, stride, dilation, groups, residual, given_upsample, act
    )
    gamma, beta, running_mean, running_var, training, momentum, eps, group, batches = norm
    x, device = xs[0], xs[0].device.type
    differentiable = training or requires_grad([*xs, weight, conv_bias, added, gamma, beta, *up_weights])
    serving = None
    if device == cuda.DEVICE and not differentiable and not backend.needs_reference():
        # Those kernels are for the inference of aggregation nodes alone.
        plain = weight.shape[2] == stride == groups == 1 and not up_weights and added is None and residual_input <= 0
        serving = backend.serves_inference("aggregate", device, x.dtype) if plain else None
    serving = serving or _serving(op, device, x.dtype)
    chains = (
        training
        and serving != "reference"
        and not torch.compiler.is_compiling()
        and not is_transformed([*xs, weight, conv_bias, added, gamma, beta, *up_weights])
    )
    if ending is not None and not (
        chains and serving == ending.backend and xs[first] is ending.z and residual_input != first
    ):
        whole = [chain.form(ending) if i == first else x for i, x in enumerate(given)]
        return run_link(
            op, whole, given_weight, norm, kernels, given_bias, stride, dilation, groups, residual, given_upsample, act,
            deferred=deferred, carries=carries, low=low,
        )  # fmt: skip
    if serving != "reference" and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        xs, up_weights, weight, conv_bias, added, gamma, beta = saveable(
            xs, up_weights, weight, conv_bias, added, gamma, beta, factors, batches
        )
    if batches is not None:
        batches.add_(1)
    if chains:
        of_first: tuple[Any, ...] = (None,) * 8
        carrier = arrived = None
        if ending is not None:
            of_first = (ending.residual, *ending[1:5], *(ending.ports or (None,) * 3))
            arrived = ending.carrier
            # What was added before this unit's activation, or before that of the unit before.
            carrier = arrived if ending.residual is not None or (carried and not deferred) else None
        carries = carries and deferred and first < 0 and xs[0].requires_grad
        kept = chain.kept_of(
            xs, None if deferred else added, of_first[0], residual_input, first, weight.shape[2], low
        )  # fmt: skip
        call = chain.Call(
            len(xs), len(up_weights), (running_mean, running_var), (factors, stride, dilation, groups), residual_input,
            momentum, (eps, name, slope), first, ending.options if ending else (0.0, "identity", 0.0), deferred, kept,
            carries, group,
        )  # fmt: skip
        flat = (*xs, *up_weights, weight, conv_bias, None if deferred else added, gamma, beta, *of_first, carrier)
        made: Any = chain.chained(serving, call, flat)
        if not deferred:
            return cast(Tensor, made)
        z, mean, var, *ports = made
        # What arrived goes on to the unit that adds the input it is for.
        passed_on = arrived if added is None or carried else None
        return Ending(
            z, mean, var, gamma, beta, added, eps, name, slope, serving, tuple(ports[:3]) or None,
            ports[3] if len(ports) > 3 else passed_on,
        )  # fmt: skip
    if serving == "reference" or group is not None:
        return (node if group is None else synced.node)(
            xs, weight, norm, conv_bias=conv_bias, stride=stride, dilation=dilation, groups=groups,
            residual=added if added is not None else residual, upsample=upsample, act=act,
        )  # fmt: skip
    if differentiable:
        y: Tensor = ops.operator(serving, "conv_norm_act")(
            xs, up_weights, weight, conv_bias, added, gamma, beta, running_mean, running_var, factors, stride, dilation,
            groups, residual_input, training, momentum, eps, name, slope,
        )[0]  # fmt: skip
        return y
    inferred: Tensor = ops.operator(serving, "conv_norm_act_inference")(
        xs, up_weights, weight, conv_bias, added, gamma, beta, running_mean, running_var, factors, stride, dilation,
        groups, residual_input, eps, name, slope,
    )  # fmt: skip
    return inferred


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
    residual: bool | Tensor = False,
    act: ActSpec = "relu",
) -> Tensor:
    """Aggregation node: ``act(batch_norm(conv1x1(cat(xs))) + (xs[0] if residual else 0))`` without the concat.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), equation 2.

    Args:
        xs: inputs of shapes (N, C_i, H, W), one dtype and device; the faster where they are channels_last or
            contiguous.
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
        residual: True adds ``xs[0]`` between norm and activation, which needs C_0 == C_out; a tensor
            (N, C_out, H, W) of the inputs' dtype adds that.
        act: "relu", "identity", "silu", "leaky_relu", "hardswish", or ("leaky_relu", slope).

    Returns:
        (N, C_out, H, W) in the inputs' dtype; channels_last if every input or the weight is, else contiguous.

    Raises:
        ValueError: shapes, channel counts, devices or options that do not fit.
        TypeError: dtypes that are not floating or not equal, wrong argument types.
        RuntimeError: a forced backend cannot run the call.
    """
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return run_node(
        "aggregate", xs, weight, norm, (1,), conv_bias, 1, 1, 1, added_to_aggregate(residual), None, act
    )  # fmt: skip


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
    upsample: checks.Upsampling | None = None,
    act: ActSpec = "relu",
    stride: int = 1,
    dilation: int = 1,
    residual: int | Tensor | None = None,
) -> Tensor:
    """IDA node: ``act(batch_norm(conv_kxk(cat(xs))))``, k = 1 or 3, any input upsampled first.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), equation 1. Arguments, result and errors are
    those of :func:`conv_norm_act`, without its groups and larger kernels.
    """
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return run_node(
        "merge", xs, weight, norm, (1, 3), conv_bias, stride, dilation, 1, residual, upsample, act
    )  # fmt: skip


def conv_norm_act(
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
    stride: int = 1,
    dilation: int = 1,
    residual: int | Tensor | None = None,
    upsample: checks.Upsampling | None = None,
    act: ActSpec = "relu",
    groups: int = 1,
) -> Tensor:
    """``act(batch_norm(conv(cat(xs))) + residual)``, any input upsampled first: what every unit of a DLA network is.

    Convolutions without groups are this package's where that pays: kernels of 1 and 3, on CPUs in float32 and float64
    every kernel, stride and dilation. Others are the library's, with this package's norm behind them.

    Args:
        xs: inputs (N, C_i, H_i, W_i), one dtype and device; those to be upsampled are still low-resolution.
        weight: (C_out, sum of C_i / groups, k, k), k odd, dtype of the inputs; the padding is
            ``dilation * (k // 2)``.
        bn_weight: as in :func:`aggregate`, like the rest of the norm's arguments.
        bn_bias: see :func:`aggregate`.
        running_mean: see :func:`aggregate`.
        running_var: see :func:`aggregate`.
        training: see :func:`aggregate`.
        momentum: see :func:`aggregate`.
        eps: see :func:`aggregate`.
        conv_bias: (C_out,) or None.
        stride: of the convolution, in pixels, the same in both directions.
        dilation: of the convolution, likewise.
        residual: what is added between norm and activation: None, the index of an input that has the output's shape
            and is not upsampled, or a tensor of the output's shape and the inputs' dtype.
        upsample: per input None or ``(up_weight, factor)`` as :func:`upsample` takes them.
        act: see :func:`aggregate`.
        groups: of the convolution over the inputs' concatenation.

    Returns:
        (N, C_out, H', W') in the inputs' dtype; channels_last if every input or the weight is, else contiguous.

    Raises:
        ValueError: shapes, factors or options that do not fit.
        TypeError: dtypes that are not floating or not equal, wrong argument types.
        RuntimeError: a forced backend cannot run the call.
    """
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return run_node(
        "conv_norm_act", xs, weight, norm, None, conv_bias, stride, dilation, groups, residual, upsample, act
    )  # fmt: skip


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
        x: (N, C, H, W); the faster where it is channels_last or contiguous.
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
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return run_norm(x, norm, residual, act)


def run_norm(x: Tensor, norm: Norm, residual: Tensor | None, act: ActSpec) -> Tensor:
    """:func:`batch_norm_act`, with a norm in one piece."""
    gamma, beta, running_mean, running_var, training, momentum, eps, group, batches = norm
    checks.check_tensor("x", x, rank=4, kind=ValueError)
    name, slope = parse_act(act)
    if residual is not None:
        checks.check_residual(residual, x.shape, x)
    values = x.shape[0] * x.shape[2] * x.shape[3]
    checks.check_norm(norm, channels=x.shape[1], like=x, values_per_channel=values)
    serving = _serving("batch_norm_act", x.device.type, x.dtype)
    if serving != "reference" and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        (x,), _, _, _, residual, gamma, beta = saveable([x], [], None, None, residual, gamma, beta, (1,), batches)
        norm = norm._replace(weight=gamma, bias=beta)
    if batches is not None:
        batches.add_(1)
    if group is not None:
        return synced.batch_norm_act(serving, x, norm, residual, act)
    if serving == "reference":
        return normalise(x, norm, residual, act)
    if training or requires_grad((x, residual, gamma, beta)):
        return ops.operator(serving, "batch_norm_act")(
            x, gamma, beta, residual, running_mean, running_var, training, momentum, eps, name, slope
        )[0]
    y: Tensor = ops.namespace(serving).tail(x, running_mean, running_var, gamma, beta, residual, eps, name, slope)
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
    x, weight = autocast([x, weight])
    checks.check_map("x", x)
    checks.check_up_weight("weight", weight, x, checks.check_factor(factor))
    serving = _serving("upsample", x.device.type, x.dtype)
    if serving == "reference":
        return reference.upsample(x, weight, factor)
    return ops.operator(serving, "upsample")(x, weight, factor)


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
    x, weight, skip = autocast([x, weight, skip])
    checks.check_map("x", x)
    checks.check_up_weight("weight", weight, x, checks.check_factor(factor))
    size = (*x.shape[:2], checks.upsampled(x.shape[2], factor), checks.upsampled(x.shape[3], factor))
    checks.check_residual(skip, size, x, "skip")
    serving = _serving("upsample_add", x.device.type, x.dtype)
    if serving == "reference":
        return reference.upsample_add(x, skip, weight, factor)
    return ops.operator(serving, "upsample_add")(x, skip, weight, factor)
