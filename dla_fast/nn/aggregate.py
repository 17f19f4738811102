"""The aggregation node as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dla_fast import functional
from dla_fast.nn.batch_norm import batch_norm_arguments, count_batch, is_observed, is_plain
from dla_fast.reference.activation import ActSpec, activate, parse_act


def run_aggregate(xs: Sequence[Tensor], conv: nn.Conv2d, bn: nn.BatchNorm2d, *, residual: bool, act: ActSpec) -> Tensor:
    """One aggregation node on the parameters of a 1x1 convolution and a batch norm.

    Op by op where a child has become something else (SyncBatchNorm, a folded norm) or is watched by hooks.
    """
    if not is_plain(bn) or is_observed(conv):
        y = bn(conv(torch.cat(list(xs), 1)))
        return activate(y + xs[0] if residual else y, act)
    y = functional.aggregate(
        xs, conv.weight, conv_bias=conv.bias, residual=residual, act=act, **batch_norm_arguments(bn)
    )
    count_batch(bn)
    return y


class AggregationNode(nn.Module):
    """Concat, 1x1 convolution, batch norm, residual, activation, without the concat.

    The aggregation node of Deep Layer Aggregation (CVPR 2018). State dict keys: ``conv.weight`` and ``bn.*``.

    Args:
        in_channels: channels of the inputs together, or a sequence with those of each.
        out_channels: channels of the output.
        residual: add the first input between norm and activation.
        act: "relu", "identity", "silu", "leaky_relu", "hardswish", or ("leaky_relu", slope).
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``forward(*xs)`` or ``forward([xs])``: inputs (N, C_i, H, W), output (N, out_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int,
        residual: bool = False,
        act: ActSpec = "relu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parse_act(act)
        total = in_channels if isinstance(in_channels, int) else sum(in_channels)
        self.conv = nn.Conv2d(total, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.residual = residual
        self.act = act

    def forward(self, *xs: Tensor | Sequence[Tensor]) -> Tensor:
        inputs = cast(Sequence[Tensor], xs[0] if len(xs) == 1 and not isinstance(xs[0], Tensor) else xs)
        return run_aggregate(inputs, self.conv, self.bn, residual=self.residual, act=self.act)

    def extra_repr(self) -> str:
        return f"residual={self.residual}, act={self.act!r}"
