"""Reference of the node: upsample some inputs, concat, convolution, batch norm, residual, activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_fast.reference.activation import ActSpec
from dla_fast.reference.batch_norm_act import normalise
from dla_fast.reference.norm import Norm
from dla_fast.reference.upsample import upsample as _upsample


def convolve(
    xs: Sequence[Tensor],
    weight: Tensor,
    conv_bias: Tensor | None,
    stride: int,
    dilation: int,
    groups: int,
    upsample: Sequence[tuple[Tensor, int] | None] | None,
) -> Tensor:
    """The convolution of the inputs' concatenation, any of them upsampled first."""
    ups = upsample if upsample is not None else [None] * len(xs)
    full = [x if up is None else _upsample(x, *up) for x, up in zip(xs, ups, strict=True)]
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(torch.cat(full, 1), weight, conv_bias, stride, padding, dilation, groups)


def node(
    xs: Sequence[Tensor],
    weight: Tensor,
    norm: Norm,
    *,
    conv_bias: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    residual: int | Tensor | None = None,
    upsample: Sequence[tuple[Tensor, int] | None] | None = None,
    act: ActSpec = "relu",
) -> Tensor:
    """:func:`conv_norm_act` of a norm."""
    z = convolve(xs, weight, conv_bias, stride, dilation, groups, upsample)
    return normalise(z, norm, xs[residual] if isinstance(residual, int) else residual, act)


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
    upsample: Sequence[tuple[Tensor, int] | None] | None = None,
    act: ActSpec = "relu",
    groups: int = 1,
) -> Tensor:
    """Convolution of the inputs' concatenation, batch norm, residual and activation in plain PyTorch.

    Same arguments as :func:`dla_fast.functional.conv_norm_act`.
    """
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return node(
        xs, weight, norm, conv_bias=conv_bias, stride=stride, dilation=dilation, groups=groups, residual=residual,
        upsample=upsample, act=act,
    )  # fmt: skip


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
    """The aggregation node of Deep Layer Aggregation (Yu et al., CVPR 2018, eq. 2) in plain PyTorch.

    Same arguments as :func:`dla_fast.functional.aggregate`.
    """
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return node(xs, weight, norm, conv_bias=conv_bias, residual=added_to_aggregate(residual), act=act)


def added_to_aggregate(residual: bool | Tensor) -> int | Tensor | None:
    """An aggregation node's residual as :func:`conv_norm_act` takes it: its first input, where it is just wanted."""
    if isinstance(residual, Tensor):
        return residual
    return 0 if residual else None


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
    stride: int = 1,
    dilation: int = 1,
    residual: int | Tensor | None = None,
) -> Tensor:
    """The iterative-aggregation node (Yu et al., CVPR 2018, eq. 1) in plain PyTorch.

    Same arguments as :func:`dla_fast.functional.merge`.
    """
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return node(
        xs, weight, norm, conv_bias=conv_bias, stride=stride, dilation=dilation, residual=residual, upsample=upsample,
        act=act,
    )  # fmt: skip
