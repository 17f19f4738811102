"""Memory layouts, as the kernels decide them; fakes must promise exactly the same strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(t: Tensor) -> bool:
    """Whether a 4-D tensor counts as channels_last, by strides: the rule of c10's ``suggest_memory_format``.

    ``is_contiguous(memory_format=...)`` cannot tell: it ignores the strides of sides of length 1, and a 1x1 weight has
    two of those.
    """
    stride = t.stride()
    if stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if t.shape[d] == 0 or stride[d] < least:
            return False
        # Both layouts fit a (N, 1, H, 1)-like tensor: it counts as contiguous.
        if d == 0 and least == stride[1]:
            return False
        least = stride[d]
        if t.shape[d] > 1:
            least *= t.shape[d]
    return True


def node_channels_last(xs: Sequence[Tensor], weight: Tensor) -> bool:
    """The layout of a node's output, as in eager: channels_last if every input or the weight is."""
    return is_channels_last(weight) or all(is_channels_last(x) for x in xs)


def empty_like_layout(like: Tensor, sizes: Sequence[int], channels_last: bool) -> Tensor:
    """A new tensor of the given sizes in a layout, with the dtype and device of ``like``."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=layout)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in, and per-channel statistics are returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
