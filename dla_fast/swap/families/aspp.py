"""Atrous spatial pyramid pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dla_fast.swap.concat import ConcatAdapter, Merge


class ASPP(ConcatAdapter):
    """``convs`` side by side on one map, and ``project`` over all they gave; its dropout is called after the unit."""

    child = "project"

    def resembles(self, module: nn.Module) -> bool:
        return module._modules.keys() == {"convs", "project"} and isinstance(module._modules["convs"], nn.ModuleList)

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        return merge([conv(x) for conv in module.convs])
