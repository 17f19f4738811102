"""Who asks other processes, and copies that do not: a module is swapped by each process for itself."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn

_WORDS = ("all_reduce", "all_gather", "allreduce", "allgather", "world_size", "process_group", "sync")
# How many functions deep a class's methods are read.
_DEEP = 3


def local(copied: nn.Module) -> nn.Module:
    """A copy whose norms ask no other process: no comparison may wait for others, who perhaps make none.

    Raises:
        TypeError: a part of a foreign class may ask them, and they could be asked.
    """
    initialised = dist.is_available() and dist.is_initialized()
    for part in copied.modules():
        if type(part) is nn.SyncBatchNorm:
            object.__setattr__(part, "__class__", nn.BatchNorm2d)
        elif initialised and asks_others(part):
            raise TypeError(f"{type(part).__name__} may wait for other processes")
    return copied


def asks_others(module: nn.Module) -> bool:
    """Whether a module's own code speaks of other processes: alone it may compute what it does not among them."""
    return any(_class_asks(cls) for cls in type(module).__mro__ if issubclass(cls, nn.Module))


def _class_asks(cls: type) -> bool:
    if _is_known(cls.__module__):
        return cls is nn.SyncBatchNorm
    if "sync" in cls.__name__.lower():
        return True
    methods = [getattr(value, "__func__", value) for value in vars(cls).values()]
    return any(_asks(f, _DEEP) for f in methods if isinstance(f, types.FunctionType))


def _asks(function: types.FunctionType, deep: int) -> bool:
    for name in _names(function.__code__):
        # Whoever only asks what kind of norm one is has a SyncBatchNorm among its children, or none.
        if name != "SyncBatchNorm" and any(word in name.lower() for word in _WORDS):
            return True
        value: Any = function.__globals__.get(name)
        if value is dist:
            return True
        foreign = isinstance(value, types.FunctionType) and not _is_known(value.__module__)
        if foreign and deep > 1 and _asks(value, deep - 1):
            return True
    return False


def _is_known(name: str | None) -> bool:
    return (name or "").split(".")[0] in ("torch", "dla_fast")


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
