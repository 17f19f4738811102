"""A unit's inference from a norm that was folded and a weight that was packed before: the CPU's operators for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_fast._extension import STATUS

if STATUS.loaded:
    from dla_fast._C import fingerprint
else:

    def fingerprint(tensors: Sequence[Tensor | None]) -> int:
        """A number of where tensors lie, what they are and what is in them, as csrc/cpu/operators/fingerprint.h says.

        Zero where there is none.
        """
        return 0


def way_of(
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    factors: Sequence[int],
    stride: int,
    dilation: int,
    groups: int,
) -> int:
    """Which of the CPU's products serves a call, by its shapes, layouts and dtype."""
    return 0


def pack(weight: Tensor, in_channels: Sequence[int], way: int) -> Tensor:
    """The weight as a product reads it; opaque."""
    return weight.clone(memory_format=torch.preserve_format)


def run(
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    packed: Tensor,
    way: int,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    factors: Sequence[int],
    stride: int,
    dilation: int,
    groups: int,
    residual_input: int,
    act: str,
    slope: float,
) -> Tensor:
    """``act(scale * conv(cat(xs)) + shift + residual)``."""
    y: Tensor = torch.ops.dla_fast_cpu.conv_norm_act_inference.default(
        xs, up_weights, packed, None, residual, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), factors,
        stride, dilation, groups, residual_input, 0.0, act, slope,
    )  # fmt: skip
    return y


def release_maps() -> None:
    """Free the memory that packed calls keep for their maps."""
