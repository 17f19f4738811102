"""What a module keeps beside its parameters and buffers, and what it draws: what a call may leave behind unseen."""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

INTERNAL = frozenset(nn.Module().__dict__)
PLAIN = (types.NoneType, bool, int, float, complex, str, bytes)
_ATOMS = frozenset({types.NoneType, bool, int, str})
_HELD = (list, tuple, set, frozenset, dict, deque)
# Told from one another by identity: what they hold is not the module's, or changes of itself (a logger's cache).
_OPAQUE = (nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
_FOREIGN = ("torch", "dla_fast", "logging", "threading", "builtins", "typing", "abc")
# How much of an attribute is looked at.
_DEPTH, _ITEMS = 6, 2000


class _Same:
    """Equal to the same object alone, which it keeps alive: an address may be taken again."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


class _Values:
    """The values of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().clone()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Values):
            return False
        a, b = self.tensor, other.tensor
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and a.device == b.device
            and (a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all()))
        )

    __hash__ = None  # type: ignore[assignment]


class RandomState:
    """The state of the generators that a forward may draw from unasked: PyTorch's on the CPU, Python's and numpy's."""

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.numpy = None if numpy is None else numpy.random.get_state()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState) or self.python != other.python:
            return False
        ours, theirs = (None if s.numpy is None else (s.numpy[1].tobytes(), *s.numpy[2:]) for s in (self, other))
        return ours == theirs and torch.equal(self.torch, other.torch)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "another"

    def restore(self) -> None:
        """Bring the generators back to it."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def kept(module: nn.Module) -> dict[str, Any]:
    """What a module and its children keep, by name, to be compared with the same after a call.

    Their attributes (numbers, strings, tensors, containers, plain objects), which children, parameters and hooks there
    are, and the containers and numbers that a forward can write to from where it stands: those of its class, of the
    variables that it encloses, and of its file. Values of parameters and buffers are not among them.
    """
    found: dict[str, Any] = {}
    seen: set[Any] = set()
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for key, value in part.__dict__.items():
            if key in ("_parameters", "_modules"):
                found[prefix + key] = [(name, _Same(one)) for name, one in value.items()]
            elif key == "training":
                continue
            elif key in INTERNAL:
                if value:
                    found[prefix + key] = list(value) if isinstance(value, (dict, set)) else _Same(value)
            else:
                found[prefix + key] = _token(value)
        kind = type(part)
        if kind not in seen and not kind.__module__.startswith(("torch.", "dla_fast.")):
            seen.add(kind)
            found |= _reached(kind)
    return found


def _reached(kind: type[nn.Module]) -> dict[str, Any]:
    """What the forward of a class can write to beside the module."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "dla_fast.", "builtins", "abc", "typing")):
            continue
        own = [(k, v) for k, v in vars(base).items() if not k.startswith("__") and k != "_abc_impl"]
        found |= {f"{base.__name__}.{k}": t for k, t in _data(own)}
        forward = vars(base).get("forward")
        if not isinstance(forward, types.FunctionType):
            continue
        code = forward.__code__
        for name, cell in zip(code.co_freevars, forward.__closure__ or (), strict=True):
            try:
                found |= {f"{k} around forward": t for k, t in _data([(name, cell.cell_contents)])}
            except ValueError:  # not filled yet
                continue
        named = [(name, forward.__globals__[name]) for name in code.co_names if name in forward.__globals__]
        found |= {f"{k} beside forward": t for k, t in _data(named)}
    return found


def _data(items: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(k, _token(v)) for k, v in items if isinstance(v, (*PLAIN, *_HELD, Tensor))]


def changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The name of the first thing that differs between two of :func:`kept`."""
    for name in (*after, *before):
        if name not in before or name not in after or before[name] != after[name]:
            return name
    return None


def _token(value: Any) -> Any:
    """What is equal to itself later as long as nothing has been written to it."""
    kind = type(value)
    if kind in _ATOMS or (kind is tuple and all(type(item) in _ATOMS for item in value)):
        # Nearly all of them.
        return kind, value
    return _describe(value, _DEPTH, [_ITEMS], set())


def _describe(value: Any, depth: int, left: list[int], above: set[int]) -> Any:
    left[0] -= 1
    if isinstance(value, PLAIN):
        return type(value), repr(value) if isinstance(value, (float, complex)) else value
    if isinstance(value, Tensor):
        return type(value), _Values(value)
    if isinstance(value, _OPAQUE) or depth == 0 or left[0] <= 0 or id(value) in above:
        return _Same(value)
    above = above | {id(value)}

    def inside(items: Iterable[Any]) -> list[Any]:
        return [_describe(item, depth - 1, left, above) for item in items]

    if isinstance(value, dict):
        return type(value), len(value), inside(value.keys()), inside(value.values())
    if isinstance(value, (set, frozenset)):
        return type(value), len(value), sorted(map(repr, value))
    if isinstance(value, (list, tuple, deque)):
        return type(value), len(value), inside(value)
    if hasattr(value, "tobytes") and hasattr(value, "shape"):
        return type(value), value.shape, value.tobytes()
    if type(value).__module__.split(".")[0] not in _FOREIGN and hasattr(value, "__dict__"):
        return _Same(value), inside(vars(value).keys()), inside(vars(value).values())
    return _Same(value)
