"""Res2Net, by itself and in DLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast.swap.concat import ConcatAdapter, Merge, first_channels

_NAMES = {"conv1", "bn1", "convs", "bns", "conv3", "bn3", "relu"}


def _scales(module: Any, x: Tensor) -> list[Tensor]:
    """What ``conv3`` reads: the widths of the first unit's output, each through a unit but the last."""
    widths = torch.split(module.relu(module.bn1(module.conv1(x))), module.width, 1)
    maps: list[Tensor] = []
    for i, (conv, bn) in enumerate(zip(module.convs, module.bns, strict=False)):
        y = widths[i] if i == 0 or module.is_first else maps[-1] + widths[i]
        maps.append(module.relu(bn(conv(y))))
    if module.scale > 1:
        maps.append(widths[-1] if module.pool is None else module.pool(widths[-1]))
    return maps


class Bottle2neck(ConcatAdapter):
    """A bottleneck of several widths: ``conv3`` and ``bn3`` over them, the shortcut, ``relu``.

    The shortcut is the input, or what ``downsample`` makes of it; ``se`` and ``drop_path``, where there are such, come
    before the addition. ``drop_block`` has to do nothing.
    """

    child = ("conv3", "bn3", "relu")

    def resembles(self, module: nn.Module) -> bool:
        return module._modules.keys() >= _NAMES and hasattr(module, "downsample")

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        maps = _scales(module, x)
        if module.se is None and module.drop_path is None:
            return merge(maps, x if module.downsample is None else module.downsample(x), in_place=True)
        y = merge(maps, act=False)
        if module.se is not None:
            y = module.se(y)
        if module.drop_path is not None:
            y = module.drop_path(y)
        shortcut = x if module.downsample is None else module.downsample(x)
        return module.relu((y + shortcut).to(y.dtype))  # as added in place


class DlaBottle2neck(ConcatAdapter):
    """:class:`Bottle2neck` as a block of DLA: the shortcut is an argument, or the input."""

    child = ("conv3", "bn3", "relu")

    def resembles(self, module: nn.Module) -> bool:
        return module._modules.keys() >= _NAMES and not hasattr(module, "downsample")

    def forward(self, module: Any, merge: Merge, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return merge(_scales(module, x), x if shortcut is None else shortcut, in_place=True)

    def calls(self, module: Any, n: int, height: int, width: int) -> Sequence[Sequence[Sequence[int] | None]]:
        channels, outputs, step = first_channels(module), module.conv3.out_channels, module.convs[0].stride[0]
        x = (n, channels, height, width)
        y = (n, outputs, -(-height // step), -(-width // step))
        return [[x, y], [x, None]] if x == y else [[x, y]]
