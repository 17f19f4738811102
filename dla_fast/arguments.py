"""The arguments of a node, checked and cast: the part of a call that does not depend on who serves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dla_fast import checks
from dla_fast.checks import Upsampling
from dla_fast.ops import cuda
from dla_fast.reference.activation import ActSpec, parse_act
from dla_fast.reference.norm import Norm

# Whether autocast exists for a device type, asked once per type.
_autocasts: dict[str, bool] = {}

# How many kinds of calls are remembered; beyond that all are forgotten.
KINDS = 1024


@cuda.constant_when_traced
def _hasautocast(device: str) -> bool:
    """``torch.amp.is_autocast_available``, a question that torch 2.11's compiler cannot trace."""
    if device not in _autocasts:
        _autocasts[device] = torch.amp.is_autocast_available(device)
    return _autocasts[device]


def _autocasts_on(device: str) -> bool:
    return _hasautocast(device) and torch.is_autocast_enabled(device)


def autocast(tensors: Sequence[Any]) -> list[Any]:
    """Cast what a convolution reads as autocast casts conv2d's arguments: everything floating but float64."""
    for first in tensors:
        if isinstance(first, Tensor):
            break
    else:
        return list(tensors)
    device = first.device.type
    if not _autocasts_on(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


class Checked(NamedTuple):
    """A node's arguments when they have been checked, and cast where autocast says so.

    Attributes:
        xs: the inputs.
        weight: of the convolution.
        conv_bias: its bias, or None.
        added: the tensor that is added before the activation, where it is not an input as a kernel loads it.
        residual_input: the index of the input that is, else -1.
        upsample: per input None or ``(up_weight, factor)``; None where no input is upsampled.
        up_weights: of the inputs that are upsampled, in order.
        factors: per input, 1 where it is taken as it is.
        act: name of the activation.
        slope: of a leaky one.
    """

    xs: list[Tensor]
    weight: Tensor
    conv_bias: Tensor | None
    added: Tensor | None
    residual_input: int
    upsample: Upsampling | None
    up_weights: list[Tensor]
    factors: list[int]
    act: str
    slope: float


class _Kind(NamedTuple):
    """What the checks make of every call of a kind, see :class:`Checked`."""

    added_input: int | None
    residual_input: int
    upsample: Upsampling | None
    factors: list[int]
    act: str
    slope: float


_kinds: dict[tuple[Any, ...], _Kind] = {}


def _key(xs: Sequence[Any], tensors: Sequence[Any], options: Sequence[Any]) -> tuple[Any, ...]:
    """What the checks read of a call; values of tensors are not among it."""
    key: list[Any] = [len(xs), *options]
    for t in (*xs, *tensors):
        if t is None:
            key.append(None)
        else:
            key += type(t), t.shape, t.dtype, t.device
    return tuple(key)


def checked(
    op: str,
    xs: Sequence[Tensor],
    weight: Tensor,
    norm: Norm,
    kernels: tuple[int, ...] | None,
    conv_bias: Tensor | None,
    stride: int,
    dilation: int,
    groups: int,
    residual: int | Tensor | None,
    upsample: Upsampling | None,
    act: ActSpec,
) -> Checked:
    """The arguments of :func:`dla_fast.functional.conv_norm_act`, under the name ``op``.

    What has passed the checks is remembered by its kind: on small maps they take longer than the kernels.
    ``kernels``: those that the weight may have, or None for any odd one.

    Raises:
        ValueError: as :func:`dla_fast.functional.conv_norm_act`.
        TypeError: as :func:`dla_fast.functional.conv_norm_act`.
    """
    arguments = op, xs, weight, norm, kernels, conv_bias, stride, dilation, groups, residual, upsample, act
    gamma, beta, mean, var, training, _, eps, group, _ = norm
    added = residual if isinstance(residual, Tensor) else None
    index: Any = residual if added is None else None
    # Equal keys have to be equal calls: 1, 1.0 and True are equal, too, and sizes that are traced are tensors.
    if (
        upsample is not None
        or type(xs) not in (list, tuple)
        or not type(stride) is type(dilation) is type(groups) is int
        or not (index is None or type(index) is int)
        or type(training) is not bool
        or type(eps) is not float
        or not (type(act) is str or (type(act) is tuple and [type(part) for part in act] == [str, float]))
        or torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._is_tracing()
    ):
        return _check(*arguments)
    options = (op, kernels, stride, dilation, groups, index, act, training, eps, group is None)
    try:
        key = _key(xs, (weight, conv_bias, added, gamma, beta, mean, var), options)
        kind = _kinds.get(key)
    except (AttributeError, TypeError, RuntimeError):
        return _check(*arguments)  # something that is no tensor, or has no numbers for sizes
    if kind is None:
        call = _check(*arguments)
        added_input = index if call.added is not None else None
        if len(_kinds) >= KINDS:
            _kinds.clear()
        _kinds[key] = _Kind(added_input, call.residual_input, call.upsample, call.factors, call.act, call.slope)
        return call
    added_input, residual_input, upsample, factors, name, slope = kind
    if added_input is not None:
        added = xs[added_input]
    return Checked([*xs], weight, conv_bias, added, residual_input, upsample, [], factors, name, slope)


def _check(
    op: str,
    xs: Sequence[Tensor],
    weight: Tensor,
    norm: Norm,
    kernels: tuple[int, ...] | None,
    conv_bias: Tensor | None,
    stride: int,
    dilation: int,
    groups: int,
    residual: int | Tensor | None,
    upsample: Upsampling | None,
    act: ActSpec,
) -> Checked:
    """:func:`checked`, of a call of which nothing is known."""
    xs = checks.check_inputs(xs)
    if _autocasts_on(xs[0].device.type):
        *xs, weight, conv_bias = autocast([*xs, weight, conv_bias])
    checks.check_one_kind(xs)
    if stride != 1 or dilation != 1 or groups != 1:
        checks.check_geometry(stride, dilation, groups)
    checks.check_weight(weight, xs, kernels, groups)
    x, up_weights, factors = xs[0], [], [1] * len(xs)
    images, _, height, width = x.shape
    channels, _, kernel, _ = weight.shape
    if upsample is None and (op == "aggregate" or len(xs) == 1):
        checks.check_same_size(xs)
    else:
        upsample = checks.check_upsampling([None] * len(xs) if upsample is None else upsample, xs, autocast)
        height, width = checks.check_same_size_upsampled(xs, upsample)
        for i, up in enumerate(upsample):
            if up is not None:
                up_weights.append(up[0])
                factors[i] = up[1]
    if kernel > 1 or stride > 1:
        height, width = (checks.convolved(side, kernel, stride, dilation) for side in (height, width))
    checks.check_vector("conv_bias", conv_bias, channels, x, norm=False)
    added, residual_input = None, -1
    if residual is not None:
        if isinstance(residual, Tensor):
            (added,) = autocast([residual])
            checks.check_residual(added, (images, channels, height, width), x)
        else:
            residual_input = checks.check_residual_input(residual, xs, (images, channels, height, width))
            if stride > 1 or factors[residual_input] > 1:
                # What is added is then not what a kernel has loaded.
                added, residual_input = xs[residual_input], -1
    name, slope = parse_act(act)
    checks.check_norm(norm, channels=channels, like=x, values_per_channel=images * height * width)
    return Checked(xs, weight, conv_bias, added, residual_input, upsample, up_weights, factors, name, slope)
