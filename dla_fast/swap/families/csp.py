"""Cross-stage partial networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dla_fast.swap.concat import ConcatAdapter, Merge

_STAGE = {"conv_exp", "blocks", "conv_transition"}


class CrossStage(ConcatAdapter):
    """``conv_down``, ``conv_exp``, and of its halves the first as it is, the second through ``blocks``.

    The second goes through ``conv_transition_b`` too; ``conv_transition`` reads both.
    """

    child = "conv_transition"

    def resembles(self, module: nn.Module) -> bool:
        return {*_STAGE, "conv_transition_b"} <= module._modules.keys()

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        first, second = module.conv_exp(module.conv_down(x)).split(module.expand_chs // 2, dim=1)
        return merge([first, module.conv_transition_b(module.blocks(second)).contiguous()])


class CrossStage3(ConcatAdapter):
    """``conv_down``, ``conv_exp``, and of its halves the first through ``blocks``, the second as it is.

    ``conv_transition`` reads both.
    """

    child = "conv_transition"

    def resembles(self, module: nn.Module) -> bool:
        return module._modules.keys() >= _STAGE and "conv_transition_b" not in module._modules

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        first, second = module.conv_exp(module.conv_down(x)).split(module.expand_chs // 2, dim=1)
        return merge([module.blocks(first), second])
