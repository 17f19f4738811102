"""Max pooling that keeps a byte of an output for its backward pass, where PyTorch's keeps its input and an int64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast.backend import needs_reference
from dla_fast.nn.memory import LOW
from dla_fast.ops.autograd import by_reference, is_transformed, requires_grad


class _MaxPool(torch.autograd.Function):
    """Windows of ``side`` by ``side`` pixels that tile the map. Saved is where in its window each maximum lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, side: int) -> Tensor:
        y, index = F.max_pool2d(x, side, return_indices=True)
        width = x.shape[3]
        row, column = index // width, index % width
        ctx.side = side
        ctx.save_for_backward(((row % side) * side + column % side).to(torch.uint8))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return _scattered(dy, place, ctx.side), None


def _scattered(dy: Tensor, place: Tensor, side: int) -> Tensor:
    images, channels, height, width = dy.shape
    if by_reference((dy,)):
        parts = [torch.where(place == i, dy, 0) for i in range(side * side)]
        return F.pixel_shuffle(torch.stack(parts, 2).reshape(images, channels * side * side, height, width), side)
    last = place.is_contiguous(memory_format=torch.channels_last) and not place.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    sizes = (images, channels, height * side, width * side)
    dx = torch.empty(sizes, dtype=dy.dtype, device=dy.device, memory_format=layout)
    none = dy.new_zeros(())
    for i in range(side * side):
        dx[:, :, i // side :: side, i % side :: side] = torch.where(place == i, dy, none)
    return dx


def max_pool(x: Tensor, side: int) -> Tensor:
    """``max_pool2d(x, side)``, keeping little for the backward pass where its windows tile the map.

    Args:
        x: (N, C, H, W).
        side: of a window, and the stride.

    Returns:
        (N, C, H // side, W // side).
    """
    compact = (
        type(x) is Tensor
        and x.dim() == 4
        and 1 < side <= 16
        and not torch.compiler.is_compiling()
        and requires_grad([x])
        and x.shape[2] % side == x.shape[3] % side == 0
        and not needs_reference()
        and not is_transformed([x])
    )
    if not compact:
        return F.max_pool2d(x, side)
    y: Tensor = _MaxPool.apply(x, side)
    return y


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` that keeps little for its backward pass where its model is to."""

    def forward(self, input: Tensor) -> Tensor:
        side = tiling(self) if LOW in self.__dict__ else None
        return super().forward(input) if side is None else max_pool(input, side)


def tiling(pool: nn.MaxPool2d) -> int | None:
    """The side of a pooling's windows where they tile the map, and it does nothing else; None where they do not."""
    side = _one(pool.kernel_size)
    plain = _one(pool.padding) == 0 and _one(pool.dilation) == 1 and not pool.return_indices and not pool.ceil_mode
    return side if plain and side is not None and _one(pool.stride) == side else None


def _one(value: Any) -> int | None:
    """An option of both directions as one number, where they are the same."""
    if isinstance(value, int):
        return value
    values = set(value) if isinstance(value, (tuple, list)) else set()
    return values.pop() if len(values) == 1 else None
