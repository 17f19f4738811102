"""Adapters: which modules resemble a fused unit, and what keeps a particular one from being swapped.

An adapter recognises one family of modules by structure; the first adapter a module resembles decides about it. To add
one, write an object with the members of :class:`Adapter` and put it into :data:`ADAPTERS`, or, from outside of this
package, hand it to :func:`register_adapter`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from dla_fast.backend import OPS
from dla_fast.swap.block_adapter import BlockAdapter
from dla_fast.swap.concat import ConcatAdapter
from dla_fast.swap.convs import ConvsAdapter
from dla_fast.swap.families import FAMILIES
from dla_fast.swap.ida_adapter import IDAAdapter
from dla_fast.swap.nodes import FusedNode
from dla_fast.swap.pool import PoolAdapter
from dla_fast.swap.report import UNITS
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
    *FAMILIES,
    BlockAdapter(),
    ConvsAdapter(),
    UnitAdapter(),
    PoolAdapter(),
)

_METHODS = ("resembles", "match", "placement", "verify", "remark", "owned")
_registered: tuple[Adapter, ...] = ()
_registering = threading.Lock()


class AdapterHandle:
    """Takes an adapter back: ``handle.remove()``, or the end of a ``with`` statement over it."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def remove(self) -> None:
        """Let ``swap_`` ask the adapter no more, which is harmless where it does not anyway. Swapped modules stay."""
        global _registered
        with _registering:
            _registered = tuple(a for a in _registered if a != self.adapter)

    def __enter__(self) -> AdapterHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def register_adapter(adapter: Adapter) -> AdapterHandle:
    """Let :func:`dla_fast.swap_` recognise modules of one's own.

    A registered adapter is asked before those of this package, the newest first, for as long as the process runs or
    until it is taken back; registering an equal one again changes nothing. The easiest is a subclass of
    :class:`dla_fast.swap.ConcatAdapter`, for modules that concatenate maps; any object with the members of
    :class:`dla_fast.swap.Adapter` will do. Modules that are swapped with it, and their pickles and copies, need no
    registration, but whoever unpickles one needs the adapter's class to be importable.

    Args:
        adapter: an instance.

    Returns:
        What takes it back.

    Raises:
        TypeError: a member is missing, or is not what :class:`dla_fast.swap.Adapter` says.
        ValueError: ``unit`` or ``op`` is none that there is.
    """
    global _registered
    if isinstance(adapter, type):
        raise TypeError(f"adapter: expected an instance, got the class {adapter.__name__}; pass {adapter.__name__}()")
    given: Any = adapter
    name = type(given).__name__
    for member in ("unit", "kind", "op"):
        value = getattr(given, member, None)
        if not isinstance(value, str):
            raise TypeError(f"adapter: expected {name}.{member} to be a string, got {value!r}")
    node = getattr(given, "node", None)
    if not isinstance(node, type) or not issubclass(node, FusedNode):
        raise TypeError(f"adapter: expected {name}.node to be a subclass of FusedNode, got {node!r}")
    for method in _METHODS:
        if not callable(getattr(given, method, None)):
            raise TypeError(f"adapter: expected {name}.{method} to be a method, got {getattr(given, method, None)!r}")
    if isinstance(given, ConcatAdapter):
        given.check()
    for member, known in (("unit", (*UNITS, "pools")), ("op", (*OPS, ""))):
        if getattr(given, member) not in known:
            raise ValueError(
                f"adapter: expected {name}.{member} to be one of {', '.join(map(repr, known))}, "
                f"got {getattr(given, member)!r}"
            )
    with _registering:
        if adapter not in _registered:
            _registered = (adapter, *_registered)
    return AdapterHandle(adapter)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter that decides about a module, or that has swapped it; None where there is none."""
    if not isinstance(module, FusedNode):
        return next((a for a in (*_registered, *ADAPTERS) if a.resembles(module)), None)
    # Adapters that share a kind of fused module tell by the specification which one it was.
    own = getattr(type(module)._dla_fast_spec, "adapter", None)
    return own or next((a for a in (*_registered, *ADAPTERS) if isinstance(module, a.node)), None)
