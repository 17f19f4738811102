"""Bytes that kernels move, counted where Triton's interpreter loads and stores.

Every load and store of the interpreter, through plain pointers, block pointers and descriptors alike, ends in two
methods of its builder; :func:`counting` stands between. Elements that a mask leaves out are not counted.
"""

from __future__ import annotations

import bisect
import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


@dataclass
class Operand:
    """A storage that a launch was given, and what the launch did with it.

    Attributes:
        names: parameters that lie in it, ``"xs[0]"`` for the first of a tuple.
        shape: of the first of them.
        start: address of its first byte.
        nbytes: its size.
        loaded: bytes loaded, those that are loaded again included.
        stored: the same for stores.
    """

    names: list[str]
    shape: tuple[int, ...]
    start: int
    nbytes: int
    loaded: int = 0
    stored: int = 0
    _read: np.ndarray | None = None
    _written: np.ndarray | None = None

    @property
    def read(self) -> int:
        """Distinct bytes loaded."""
        return 0 if self._read is None else int(np.count_nonzero(self._read))

    @property
    def written(self) -> int:
        """Distinct bytes stored."""
        return 0 if self._written is None else int(np.count_nonzero(self._written))

    @property
    def moved(self) -> int:
        """Distinct bytes loaded plus distinct bytes stored: what has to cross the memory's pins in one pass."""
        return self.read + self.written

    @property
    def issued(self) -> int:
        """Bytes of every load and store, repeated ones included."""
        return self.loaded + self.stored

    def touch(self, addresses: np.ndarray, itemsize: int, store: bool) -> None:
        """Count accesses of ``itemsize`` bytes each."""
        name = "_written" if store else "_read"
        seen = getattr(self, name)
        if seen is None:
            seen = np.zeros(self.nbytes, dtype=bool)
            setattr(self, name, seen)
        offsets = (addresses - np.uint64(self.start)).astype(np.int64)
        for byte in range(itemsize):
            seen[offsets + byte] = True
        if store:
            self.stored += offsets.size * itemsize
        else:
            self.loaded += offsets.size * itemsize


@dataclass
class Pass:
    """One launch: its kernel, its operands by address, and how many programs it had."""

    kernel: str
    operands: list[Operand] = field(default_factory=list)
    programs: int = 0

    def operand(self, name: str) -> Operand:
        """The operand that holds a parameter.

        Raises:
            KeyError: no parameter of that name was given a tensor.
        """
        for operand in self.operands:
            if name in operand.names:
                return operand
        raise KeyError(name)

    def find(self, addresses: np.ndarray, itemsize: int) -> Operand:
        """The operand that all of these addresses lie in.

        Raises:
            IndexError: one of them lies outside of every operand, or they are spread over several.
        """
        low, high = int(addresses.min()), int(addresses.max()) + itemsize
        at = bisect.bisect_right([o.start for o in self.operands], low) - 1
        if at < 0 or high > self.operands[at].start + self.operands[at].nbytes:
            raise IndexError(f"{self.kernel}: an access at {low:#x} to {high:#x} lies outside of every operand")
        return self.operands[at]


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a kernel's arguments, by parameter name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple):
        for i, v in enumerate(value):
            yield from tensors_of(f"{name}[{i}]", v)
    elif isinstance(getattr(value, "base", None), Tensor):
        yield name, value.base


def operands_of(arguments: dict[str, Any]) -> list[Operand]:
    """The storages among a launch's arguments, by address."""
    found: dict[int, Operand] = {}
    for name, value in arguments.items():
        for path, t in tensors_of(name, value):
            storage = t.untyped_storage()
            if storage.nbytes() == 0:
                continue
            operand = found.setdefault(
                storage.data_ptr(), Operand([], tuple(t.shape), storage.data_ptr(), storage.nbytes())
            )
            operand.names.append(path)
    return [found[start] for start in sorted(found)]


@contextlib.contextmanager
def counting() -> Iterator[list[Pass]]:
    """Count every launch inside; the list grows by one :class:`Pass` for each.

    Raises:
        RuntimeError: a kernel uses an atomic operation, whose traffic is not counted.
    """
    passes: list[Pass] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def touch(pointers: Any, mask: Any, is_store: bool) -> None:
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(_mask(mask), pointers.data.shape)]
        if addresses.size:
            passes[-1].find(addresses, itemsize).touch(addresses, itemsize, is_store)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(pointers, mask, False)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(pointers, mask, True)
        return store(self, pointers, value, mask, *rest, **named)

    def counted_call(self: Any, *args: Any, **named: Any) -> Any:
        accepted = inspect.getfullargspec(self.fn).args
        arguments = inspect.getcallargs(self.fn, *args, **{k: v for k, v in named.items() if k in accepted})
        passes.append(Pass(self.fn.__name__, operands_of(arguments)))
        result = call(self, *args, **named)
        passes[-1].programs = math.prod(interpreter.interpreter_builder.grid_dim)
        return result

    def refused(self: Any, *args: Any, **named: Any) -> Any:
        raise RuntimeError(f"{passes[-1].kernel}: atomic operations are not counted")

    atomics = {name: getattr(builder, name) for name in dir(builder) if name.startswith("create_atomic")}
    patches = {"create_masked_load": counted_load, "create_masked_store": counted_store}
    try:
        for name, patch in [*patches.items(), *((name, refused) for name in atomics)]:
            setattr(builder, name, patch)
        executor.__call__ = counted_call
        yield passes
    finally:
        for name, original in {"create_masked_load": load, "create_masked_store": store, **atomics}.items():
            setattr(builder, name, original)
        executor.__call__ = call


def _mask(mask: Any) -> np.ndarray:
    """The mask of an access: block pointers hand on a bare array, and arithmetic may have made integers of it."""
    return np.asarray(mask if isinstance(mask, np.ndarray) else mask.data).astype(bool)
