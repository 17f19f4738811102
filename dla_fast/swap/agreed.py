"""What has been compared already in a swap: a network repeats its blocks."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from dla_fast.swap.kept import INTERNAL

# Comparisons that agreed, by what was compared; None outside of a swap.
_agreed: ContextVar[set[Any] | None] = ContextVar("agreed", default=None)
_WIDTHS = ("in_channels", "out_channels", "num_features")
_SIMPLE = (bool, int, float, str, type, types.FunctionType, types.BuiltinFunctionType)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Compare modules of one structure once."""
    token = _agreed.set(set())
    try:
        yield
    finally:
        _agreed.reset(token)


def once(module: nn.Module, widths: bool, key: Any, compare: Callable[[], str | None]) -> str | None:
    """Compare, unless a module of the same structure has agreed before.

    Args:
        module: what is compared.
        widths: whether one of other widths is another.
        key: what else is the same.
        compare: gives None, or in words what differs.
    """
    same, agreed = signature(module, widths), _agreed.get()
    if same is None or agreed is None:
        return compare()
    if (same, key) in agreed:
        return None
    found = compare()
    if found is None:
        agreed.add((same, key))
    return found


def signature(module: nn.Module, widths: bool) -> Any:
    """All that its forward can depend on but values: classes, attributes, dtypes, and shapes where ``widths``.

    None where an attribute is more than a number, a string, a function, a class, or a sequence of those.
    """
    parts: list[Any] = [type(module).forward]
    for name, part in module.named_modules(remove_duplicate=False):
        parts += [name, type(part), *((key, child is None) for key, child in part._modules.items())]
        hidden = () if widths or not isinstance(part, (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm)) else _WIDTHS
        for key, value in part.__dict__.items():
            if key in INTERNAL or key in hidden:
                continue
            simple = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if not all(v is None or type(v) in _SIMPLE for v in simple):
                return None
            parts += [key, type(value), *((type(v), v) for v in simple)]
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        parts += [name, tensor.dtype, tensor.device, tuple(tensor.shape) if widths else tensor.dim()]
    return tuple(parts)
