"""The aggregation node as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dla_fast import checks
from dla_fast.nn.unit import run_unit
from dla_fast.ops.ending import Ending
from dla_fast.reference.activation import ActSpec, parse_act


class AggregationNode(nn.Module):
    """Concat, 1x1 convolution, batch norm, residual, activation, without the concat.

    The aggregation node of Deep Layer Aggregation (CVPR 2018). State dict keys: ``conv.weight`` and ``bn.*``.

    Args:
        in_channels: channels of the inputs together, or a sequence with those of each, which ``forward`` then holds
            them to.
        out_channels: channels of the output.
        residual: add the first input between norm and activation.
        act: "relu", "identity", "silu", "leaky_relu", "hardswish", or ("leaky_relu", slope).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown ``act``, an ``in_channels`` that is empty or has a value below 1; in ``forward`` inputs
            whose number or channels are not those of ``in_channels``.

    Shape:
        ``forward(*xs)`` or ``forward([xs])``: inputs (N, C_i, H, W), output (N, out_channels, H, W).
    """

    # None in nodes that were pickled before they kept it.
    in_channels: int | tuple[int, ...] | None = None

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
        self.in_channels = in_channels if isinstance(in_channels, int) else tuple(in_channels)
        if self.in_channels == ():
            raise ValueError("in_channels: expected an integer, or the channels of one input or more, got none")
        if isinstance(self.in_channels, tuple) and min(self.in_channels) < 1:
            raise ValueError(f"in_channels: expected channels >= 1 of each input, got {list(self.in_channels)}")
        total = self.in_channels if isinstance(self.in_channels, int) else sum(self.in_channels)
        self.conv = nn.Conv2d(total, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.residual = residual
        self.act = act

    def forward(self, *xs: Tensor | Sequence[Tensor]) -> Tensor:
        inputs = cast(Sequence[Tensor], xs[0] if len(xs) == 1 and not isinstance(xs[0], Tensor) else xs)
        # Two inputs exchanged have the same channels together, and would be taken silently.
        if isinstance(self.in_channels, tuple) and isinstance(inputs, Sequence):
            checks.check_channels("xs", inputs, self.in_channels, "in_channels")
        return self.run(inputs)

    def run(self, xs: Sequence[Tensor | Ending]) -> Tensor:
        """:meth:`forward` of inputs that fit, of which some may be as :func:`~dla_fast.nn.unit.run_deferred` gives."""
        return run_unit(xs, self.conv, self.bn, act=self.act, residual=0 if self.residual else None)

    def extra_repr(self) -> str:
        channels = list(self.in_channels) if isinstance(self.in_channels, tuple) else self.in_channels
        shown = "" if channels is None else f"in_channels={channels}, "
        return f"{shown}residual={self.residual}, act={self.act!r}"
