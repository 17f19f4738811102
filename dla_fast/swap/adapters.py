"""Adapters: which modules resemble a fused unit, and what keeps a particular one from being swapped.

An adapter recognises one family of modules by structure. To add one, write an object with the members of
:class:`Adapter` and put it into :data:`ADAPTERS`; the first adapter a module resembles decides about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from dla_fast.swap.block_adapter import BlockAdapter
from dla_fast.swap.convs import ConvsAdapter
from dla_fast.swap.ida_adapter import IDAAdapter
from dla_fast.swap.nodes import FusedNode
from dla_fast.swap.pool import PoolAdapter
from dla_fast.swap.root_adapter import RootAdapter
from dla_fast.swap.unit import UnitAdapter


class Adapter(Protocol):
    """How one family of modules is recognised and swapped."""

    unit: str
    """Which of :data:`dla_fast.swap.report.UNITS` it is, by which ``swap_`` is asked for it; "pools" it swaps where
    memory is to be low."""

    kind: str
    """How the report calls it."""

    op: str
    """The op that serves it, a name of :data:`dla_fast.backend.OPS`; empty where none does."""

    node: type[FusedNode]
    """What supplies the fused forward."""

    def resembles(self, module: nn.Module) -> bool:
        """Whether the module belongs in the report at all."""
        ...

    def match(self, module: nn.Module, backend: str) -> Any:
        """The specification of the fused module, or a string: the reason there is none.

        A specification is hashable, picklable and has an attribute ``backend``.
        """
        ...

    def placement(self, module: nn.Module, spec: Any) -> tuple[torch.device, torch.dtype]:
        """Device and dtype a matched module computes on."""
        ...

    def verify(self, module: nn.Module, spec: Any) -> str | None:
        """Compare the fused call with the original forward by running both: None, or how they differ."""
        ...

    def remark(self, module: nn.Module, spec: Any) -> str:
        """What the report says of a matched module, "" where all of it is fused."""
        ...

    def owned(self, module: nn.Module, spec: Any) -> Iterable[nn.Module]:
        """Modules inside that the fused call takes apart by itself, and no other adapter is to swap."""
        ...


ADAPTERS: tuple[Adapter, ...] = (
    RootAdapter(),
    IDAAdapter(),
    BlockAdapter(),
    ConvsAdapter(),
    UnitAdapter(),
    PoolAdapter(),
)
