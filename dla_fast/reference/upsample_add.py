"""Reference of the add-merging IDA step: upsample, then add the skip connection."""

from __future__ import annotations

from torch import Tensor

from dla_fast.reference.upsample import upsample


def upsample_add(x: Tensor, skip: Tensor, weight: Tensor, factor: int) -> Tensor:
    """``upsample(x, weight, factor) + skip``; ``skip`` has the upsampled shape."""
    return upsample(x, weight, factor) + skip
