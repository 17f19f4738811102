"""The ops as networks write them in eager PyTorch: the peer that everybody has.

Functions with the names and arguments of :mod:`dla_fast.functional`, so that one problem runs on either. Residual and
activation work in place, as they do in the networks; :mod:`dla_fast.reference`, which must be differentiable twice and
by every transform, does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast.nn import AggregationNode
from dla_fast.reference.activation import ActSpec, activate


def _tail(x: Tensor, norm: Sequence[Tensor | None], options: dict[str, Any], residual: Tensor | None) -> Tensor:
    bn_weight, bn_bias, running_mean, running_var = norm
    act: ActSpec = options.get("act", "relu")
    y = F.batch_norm(
        x,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        options["training"],
        options.get("momentum", 0.1),
        options.get("eps", 1e-5),
    )
    if residual is not None:
        y += residual
    return torch.relu_(y) if act == "relu" else activate(y, act)


def aggregate(xs: Sequence[Tensor], weight: Tensor, *norm: Tensor | None, **options: Any) -> Tensor:
    """Concat, 1x1 convolution, batch norm, in-place residual and ReLU; see :func:`dla_fast.functional.aggregate`."""
    z = F.conv2d(torch.cat(list(xs), 1), weight, options.get("conv_bias"))
    return _tail(z, norm, options, xs[0] if options.get("residual") else None)


def conv_norm_act(xs: Sequence[Tensor], weight: Tensor, *norm: Tensor | None, **options: Any) -> Tensor:
    """Upsample, concat, convolve, normalise, add, ReLU; see :func:`dla_fast.functional.conv_norm_act`."""
    ups = options.get("upsample") or [None] * len(xs)
    full = [x if up is None else upsample(x, *up) for x, up in zip(xs, ups, strict=True)]
    x = full[0] if len(full) == 1 else torch.cat(full, 1)
    stride, dilation, groups = (options.get(name, 1) for name in ("stride", "dilation", "groups"))
    z = F.conv2d(x, weight, options.get("conv_bias"), stride, dilation * (weight.shape[-1] // 2), dilation, groups)
    residual = options.get("residual")
    return _tail(z, norm, options, xs[residual] if isinstance(residual, int) else residual)


def merge(xs: Sequence[Tensor], weight: Tensor, *norm: Tensor | None, **options: Any) -> Tensor:
    """Upsample, concat, convolve, normalise, ReLU in place; see :func:`dla_fast.functional.merge`."""
    return conv_norm_act(xs, weight, *norm, **options)


def batch_norm_act(x: Tensor, *norm: Tensor | None, **options: Any) -> Tensor:
    """Batch norm, in-place residual and ReLU; see :func:`dla_fast.functional.batch_norm_act`."""
    return _tail(x, norm, options, options.get("residual"))


def upsample(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """The transposed convolution; see :func:`dla_fast.functional.upsample`."""
    return F.conv_transpose2d(x, weight, stride=factor, padding=factor // 2, groups=x.shape[1])


def upsample_add(x: Tensor, skip: Tensor, weight: Tensor, factor: int) -> Tensor:
    """The transposed convolution, and an addition; see :func:`dla_fast.functional.upsample_add`."""
    return upsample(x, weight, factor).add_(skip)


class EagerNode(nn.Module):
    """An aggregation node op by op, on the parameters of a fused one."""

    def __init__(self, node: AggregationNode) -> None:
        super().__init__()
        self.conv, self.bn, self.residual = node.conv, node.bn, node.residual
        self.relu = nn.ReLU(inplace=True)

    def forward(self, *xs: Tensor) -> Tensor:
        x = self.bn(self.conv(torch.cat(xs, 1)))
        if self.residual:
            x += xs[0]
        return self.relu(x)
