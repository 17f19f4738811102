"""Reference of IDA's learned upsampling: a depthwise transposed convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upsample(x: Tensor, weight: Tensor, factor: int) -> Tensor:
    """Depthwise transposed convolution with kernel ``2f``, stride ``f`` and padding ``f // 2``.

    Args:
        x: ``(N, C, H, W)``.
        weight: ``(C, 1, 2f, 2f)``.
        factor: ``f >= 2``.

    Returns:
        ``(N, C, H', W')`` with ``H' = (H - 1) * f - 2 * (f // 2) + 2 * f``,
        that is ``f * H`` for even f and ``f * H + 1`` for odd.
    """
    return F.conv_transpose2d(x, weight, stride=factor, padding=factor // 2, groups=x.shape[1])
