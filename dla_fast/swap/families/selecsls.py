"""SelecSLS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dla_fast.swap.concat import ConcatAdapter, Merge, first_channels


class SelecSLS(ConcatAdapter):
    """``conv1`` to ``conv5`` in a row, and ``conv6`` over what the first, third and fifth gave, and over the skip.

    Takes and gives a list: the map, and the skip that the first block of a stage (``is_first``) makes.
    """

    child = "conv6"

    def resembles(self, module: nn.Module) -> bool:
        return {f"conv{i}" for i in range(1, 7)} <= module._modules.keys() and "is_first" in module.__dict__

    def forward(self, module: Any, merge: Merge, x: Any) -> list[Tensor]:
        given = x if isinstance(x, list) else [x]
        assert len(given) in (1, 2)
        first = module.conv1(given[0])
        second = module.conv3(module.conv2(first))
        third = module.conv5(module.conv4(second))
        if module.is_first:
            y = merge([first, second, third])
            return [y, y]
        return [merge([first, second, third, given[1]]), given[1]]

    def calls(self, module: Any, n: int, height: int, width: int) -> Sequence[Sequence[Sequence[int]]]:
        x = (n, first_channels(module), height, width)
        made = sum(_outputs(module._modules[name]) for name in ("conv1", "conv3", "conv5"))
        skip = first_channels(module.conv6) - made
        if module.is_first or skip < 1:
            return [[x]]
        step = module.stride if isinstance(module.stride, int) else 1
        return [[x, (n, skip, -(-height // step), -(-width // step))]]

    def arguments(self, xs: Sequence[Any]) -> tuple[Any, ...]:
        return (list(xs),)


def _outputs(module: nn.Module) -> int:
    """Channels of the last convolution inside."""
    return [m.out_channels for m in module.modules() if isinstance(m, nn.Conv2d)][-1]
