"""Max poolings of a model that is to keep little for its backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dla_fast.nn.memory import LOW
from dla_fast.nn.pool import max_pool, tiling
from dla_fast.swap.calls import PLAIN, undisturbed
from dla_fast.swap.nodes import FusedNode, class_reason


@dataclass(frozen=True)
class PoolSpec:
    """What there is to know of a pooling: its options are looked at on every call.

    Attributes:
        backend: that was asked for, which poolings have no use for.
    """

    backend: str


class LeanPool(FusedNode):
    """An nn.MaxPool2d that keeps a byte of each output, where its windows tile the map."""

    def _dla_fast_keepers(self) -> Iterable[nn.Module]:
        return [self]

    def forward(self, input: Any) -> Any:
        pool: Any = self
        side = tiling(pool) if LOW in self.__dict__ and undisturbed() else None
        return super().forward(input) if side is None or type(input) not in PLAIN else max_pool(input, side)


class PoolAdapter:
    """nn.MaxPool2d itself whose windows tile the map: the shortcuts of trees."""

    unit = "pools"
    kind = "pool"
    op = ""
    node: type[FusedNode] = LeanPool

    def resembles(self, module: nn.Module) -> bool:
        return type(module) is nn.MaxPool2d and (tiling(module) or 0) > 1

    def match(self, module: nn.Module, backend: str) -> PoolSpec | str:
        return class_reason(module) or PoolSpec("auto")

    def placement(self, module: nn.Module, spec: PoolSpec) -> tuple[torch.device, torch.dtype]:
        return torch.device("cpu"), torch.float32

    def verify(self, module: nn.Module, spec: PoolSpec) -> str | None:
        """Nothing is computed in another way: the maxima are PyTorch's."""
        return None

    def remark(self, module: nn.Module, spec: PoolSpec) -> str:
        return ""

    def owned(self, module: nn.Module, spec: PoolSpec) -> Iterable[nn.Module]:
        return ()
