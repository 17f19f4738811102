"""PP-HGNet, of both versions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast.swap.concat import ConcatAdapter, Merge


class HGBlock(ConcatAdapter):
    """``layers`` in a row, and ``aggregation`` over the input and all they gave.

    ``aggregation`` is a Sequential whose first unit reads the maps, with a learned scale and shift behind its
    activation or without; the rest of it is called after it. With ``residual`` the input is added to what ``drop_path``
    lets through.
    """

    child = "aggregation"

    def resembles(self, module: nn.Module) -> bool:
        return {"layers", "aggregation"} <= module._modules.keys()

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        maps = [x]
        for layer in module.layers:
            maps.append(layer(maps[-1]))
        y = merge(maps)
        return module.drop_path(y) + x if module.residual else y


class HGStem(ConcatAdapter):
    """The stem of version 2: ``stem3`` over ``stem1`` pooled, and over it through ``stem2a`` and ``stem2b``."""

    child = "stem3"

    def resembles(self, module: nn.Module) -> bool:
        return {"stem1", "stem2a", "stem2b", "stem3", "stem4", "pool"} <= module._modules.keys()

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        x = F.pad(module.stem1(x), (0, 1, 0, 1))
        y = module.stem2b(F.pad(module.stem2a(x), (0, 1, 0, 1)))
        return module.stem4(merge([module.pool(x), y]))
