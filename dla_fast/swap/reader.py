"""What reads a concatenation: a convolution, the norm and activation behind it, and what comes after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple, cast

from torch import nn

from dla_fast.nn import stock
from dla_fast.reference.activation import ActSpec
from dla_fast.swap.calls import fused_act
from dla_fast.swap.kept import INTERNAL
from dla_fast.swap.reasons import class_name

Path = tuple[str, ...]
_SIMPLE = (type(None), bool, int, float, str)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Passed(NamedTuple):
    """A module whose call is left out, as it was when it was looked at.

    Attributes:
        path: names that lead to it.
        original: its class, before it was swapped.
        kind: of a convolution or a norm, as :mod:`dla_fast.nn.stock` names it: another class of that kind will do.
        forward: name of the method that it runs.
        children: their names, and whether each is None.
        attributes: numbers and strings on which its forward may depend.
    """

    path: Path
    original: type
    kind: str
    forward: str
    children: tuple[tuple[str, bool], ...]
    attributes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Reader:
    """The parts of what reads a concatenation, by the names that lead to them.

    Attributes:
        conv: the convolution.
        bn: the norm, None where it is folded into the convolution.
        act: the activation behind it.
        rest: what is called after it, in order.
        passed: all the modules whose calls are left out, conv and bn among them.
    """

    conv: Path
    bn: Path | None
    act: ActSpec
    rest: tuple[Path, ...]
    passed: tuple[Passed, ...]


def at(module: nn.Module, path: Path) -> nn.Module | None:
    """The module that a path leads to."""
    found: nn.Module | None = module
    for name in path:
        if found is None:
            return None
        found = found._modules.get(name)
    return found


def own_method(module: nn.Module) -> str | None:
    """Name of the method of its class that a module runs, None for a forward from elsewhere.

    Folding a norm may leave a module with another method of its own for its forward.
    """
    own = module.__dict__.get("forward")
    if own is None:
        return "forward"
    if not isinstance(own, MethodType) or own.__self__ is not module:
        return None
    name = own.__func__.__name__
    return name if getattr(type(module), name, None) is own.__func__ else None


def hooked(module: nn.Module) -> bool:
    return any(module.__dict__[name] for name in _HOOKS)


def children_of(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    return tuple((name, child is None) for name, child in module._modules.items())


def attributes_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """A module's own numbers and strings."""
    return tuple(
        (key, value)
        for key, value in module.__dict__.items()
        if key not in INTERNAL and not key.startswith("_dla_fast") and type(value) in _SIMPLE
    )


def same_attributes(module: nn.Module, attributes: tuple[tuple[str, Any], ...]) -> bool:
    own = module.__dict__
    return all(key in own and own[key] == value for key, value in attributes)


def pass_by(module: nn.Module, path: Path, options: bool = True) -> Passed | str:
    """What a module is whose calls are to be left out, or why they cannot be.

    Args:
        module: any.
        path: that leads to it.
        options: its attributes are not looked at on every call.
    """
    name = ".".join(path)
    if hooked(module):
        return f"{name}: has hooks"
    method = own_method(module)
    if method is None:
        return f"{name}: its forward is replaced on the instance"
    attributes = attributes_of(module) if options else ()
    kind = "" if options else stock.kind(module)
    return Passed(path, stock.original_class(module), kind, method, children_of(module), attributes)


def is_passed(module: nn.Module, was: Passed) -> bool:
    """Whether a module is what it was, so that its calls can still be left out."""
    found = at(module, was.path)
    if found is None:
        return False
    if stock.original_class(found) is not was.original and not (was.kind and stock.kind(found) == was.kind):
        return False
    return (
        not hooked(found)
        and own_method(found) == was.forward
        and children_of(found) == was.children
        and same_attributes(found, was.attributes)
    )


class _Unfit(Exception):
    """Why something is no reader that kernels know."""


class _Parts:
    """What is called one after the other, of which the first are left out one by one."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.left: list[tuple[Path, nn.Module]] = []
        self.passed: list[Passed] = []
        for name in names:
            child = module._modules.get(name)
            if child is None:
                raise _Unfit(f"no child {name}")
            self.left.append(((name,), child))

    def take(self, options: bool = True) -> tuple[Path, nn.Module]:
        path, part = self.left.pop(0)
        was = pass_by(part, path, options)
        if isinstance(was, str):
            raise _Unfit(was)
        self.passed.append(was)
        return path, part

    def open(self) -> None:
        """Leave out the call of the first, and have its children in its place."""
        path, part = self.take()
        self.left[:0] = [((*path, name), c) for name, c in part._modules.items() if c is not None]

    def drop(self) -> None:
        """Leave out what does nothing."""
        while self.left and stock.kind(self.left[0][1]) == "identity":
            self.take()

    def conv(self) -> Path:
        self.drop()
        while self.left and stock.kind(self.left[0][1]) != "conv":
            path, part = self.left[0]
            if not part._modules:
                raise _Unfit(f"{'.'.join(path)}: expected a convolution, got {class_name(part)}")
            self.open()
            self.drop()
        if not self.left:
            raise _Unfit("holds no convolution")
        return self.take(options=False)[0]

    def norm(self) -> tuple[Path | None, ActSpec | None]:
        """The norm, and the activation where that is in it; neither where the norm is folded."""
        self.drop()
        if not self.left:
            raise _Unfit("nothing behind the convolution to fuse with it")
        path, part = self.left[0]
        kind = stock.kind(part)
        if kind not in stock.NORMS:
            if fused_act(part) is None:
                raise _Unfit(f"{'.'.join(path)}: expected a batch norm, got {class_name(part)}")
            return None, None
        self.take(options=False)
        if not kind.endswith("_act"):
            return path, None
        inner = [(name, c) for name, c in part._modules.items() if c is not None]
        self.left[:0] = [((*path, name), c) for name, c in inner]
        for _ in inner:
            self.take()
        act = cast(nn.Module, part._modules["act"])
        if fused_act(act) is None:
            raise _Unfit(f"{'.'.join(path)}: no kernel ends with {class_name(act)}")
        return path, fused_act(act)

    def act(self) -> ActSpec:
        """The activation, where the next part is one."""
        self.drop()
        act = fused_act(self.left[0][1]) if self.left else None
        if act is None:
            return "identity"
        self.take()
        return act


def reader_of(module: nn.Module, child: str | Sequence[str]) -> Reader | str:
    """What reads the concatenations of a module, or why it is none that kernels know.

    Args:
        module: whose forward concatenates.
        child: name of the child that is called on the concatenation: one that holds a convolution, a norm and an
            activation, in this order, and possibly more behind them; or names of convolution, norm and activation.
    """
    try:
        parts = _Parts(module, [child] if isinstance(child, str) else child)
        conv = parts.conv()
        bn, act = parts.norm()
        if act is None:
            act = parts.act()
        return Reader(conv, bn, act, tuple(path for path, _ in parts.left), tuple(parts.passed))
    except _Unfit as reason:
        return str(reason)
