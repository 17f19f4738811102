"""Forwards that can do nothing but call children, concatenate, add and activate, as their source shows.

Such a forward cannot see the size, the number or the values of its inputs, nor the mode of gradients, and has nowhere
to keep anything: what it does once it does always, so that a short run convinces. Any other is tried at length
(:func:`dla_fast.swap.probe.thorough`). The source counts only where it compiles to the very code that runs.
"""

from __future__ import annotations

import ast
import inspect
import types
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dla_fast.nn import stock
from dla_fast.nn.stock import original_class

# Those that neither draw nor clamp, and do the same at every size.
_LIBRARY = frozenset(
    {
        nn.AvgPool2d, nn.BatchNorm2d, nn.Conv2d, nn.ConvTranspose2d, nn.Hardswish, nn.Identity, nn.LeakyReLU,
        nn.MaxPool2d, nn.ModuleList, nn.ReLU, nn.Sequential, nn.SiLU,
    }
)  # fmt: skip
_FUNCTIONS = (torch.cat, torch.add, torch.relu, F.relu, F.silu, F.hardswish, F.leaky_relu)
_FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
_SIMPLE = (bool, int, types.NoneType)
_read: weakref.WeakKeyDictionary[Any, tuple[Any, _Forward | None]] = weakref.WeakKeyDictionary()


class _OtherwiseError(Exception):
    """The forward does something else."""


@dataclass(frozen=True)
class _Forward:
    """What a forward uses.

    Attributes:
        called: attributes of self that it calls.
        tested: attributes of self on which it branches.
        functions: dotted names of the functions that it calls.
    """

    called: frozenset[str]
    tested: frozenset[str]
    functions: frozenset[str]


def is_known(module: nn.Module) -> bool:
    """Whether a module and all its children are plain ones of PyTorch's, or have forwards of those above."""
    return all(_is_known(part) for part in module.modules())


def _is_known(module: nn.Module) -> bool:
    # One that is swapped already does what it did before.
    kind: Any = original_class(module)
    # Nor does one without children that was found, at length, to do what such a one does.
    if kind in _LIBRARY or (not module._modules and stock.kind(module)):
        return "forward" not in module.__dict__
    plain = (
        "forward" not in module.__dict__
        and kind.__getattr__ is nn.Module.__getattr__
        and kind.__getattribute__ is object.__getattribute__
        and kind.__call__ is nn.Module.__call__
    )
    forward = kind.forward
    if not plain or type(forward) is not types.FunctionType:
        return False
    known = _read.get(forward)
    if known is None or known[0] is not forward.__code__:
        known = _read[forward] = (forward.__code__, _parse(forward))
    used = known[1]
    if used is None:
        return False
    for name in used.called | used.tested:
        # An attribute of the class would come before the child.
        child = name in module._modules and not hasattr(kind, name)
        value = inspect.getattr_static(module, name, ...)
        if not child and (value is not None if name in used.called else not isinstance(value, _SIMPLE)):
            return False
    return all(_resolved(name, forward.__globals__) in _FUNCTIONS for name in used.functions)


def _resolved(dotted: str, names: dict[str, Any]) -> Any:
    first, *rest = dotted.split(".")
    value = names.get(first)
    for name in rest:
        # No code of anybody's is run: only a module's own names are looked up.
        value = vars(value).get(name) if isinstance(value, types.ModuleType) else None
    return value


def _parse(forward: types.FunctionType) -> _Forward | None:
    """What a forward uses, None where that is more than is known, or cannot be told."""
    defaults = [*(forward.__defaults__ or ()), *(forward.__kwdefaults__ or {}).values()]
    if forward.__closure__ or any(value is not None for value in defaults):
        return None
    try:
        source = inspect.getsource(forward)
        # Not dedented: that would change the text of a docstring, which is part of the code. What is imported is said
        # beside it, as a call through an imported name compiles to other code.
        names = [n for n in forward.__code__.co_names if isinstance(forward.__globals__.get(n), types.ModuleType)]
        imports = f"import {', '.join(names)}\n" if names else ""
        tree = ast.parse(f"{imports}if 1:\n{source}" if source[:1].isspace() else imports + source)
        function = tree.body[-1]
        if isinstance(function, ast.If):
            (function,) = function.body
        if not isinstance(function, ast.FunctionDef) or function.decorator_list:
            return None
        compiled = next(
            c
            for c in compile(tree, "", "exec", dont_inherit=True).co_consts
            if isinstance(c, types.CodeType) and c.co_name == function.name
        )
        if _essence(compiled) != _essence(forward.__code__):
            return None
        reader = _Reader(function)
        reader.statements(function.body)
    except (OSError, TypeError, ValueError, SyntaxError, StopIteration, _OtherwiseError):
        return None
    return _Forward(frozenset(reader.called), frozenset(reader.tested), frozenset(reader.functions))


def _essence(code: types.CodeType) -> tuple[Any, ...]:
    """All of a code object that says what it does."""
    constants = tuple((type(c), c) for c in code.co_consts)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    table = getattr(code, "co_exceptiontable", b"")
    return code.co_code, constants, names, code.co_argcount, code.co_kwonlyargcount, code.co_flags & _FLAGS, table


class _Reader:
    """Goes through a forward, and raises at the first thing that is not of the few known ones."""

    def __init__(self, function: ast.FunctionDef) -> None:
        given = function.args
        names = [a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs]]
        names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
        self.own = names[0] if given.posonlyargs or given.args else ""
        self.locals = set(names[1:])
        self.called: set[str] = set()
        self.tested: set[str] = set()
        self.functions: set[str] = set()

    def statements(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.Expr(ast.Constant()):
                    pass
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.value(value)
                    self.store(name)
                case ast.AugAssign(target=ast.Name(id=name), op=ast.Add(), value=value) if name in self.locals:
                    self.value(value)
                case ast.If(test=test, body=then, orelse=otherwise):
                    self.test(test)
                    self.statements([*then, *otherwise])
                case ast.Return(value=ast.expr() as value):
                    self.value(value)
                case _:
                    raise _OtherwiseError

    def store(self, name: str) -> None:
        if name == self.own:
            raise _OtherwiseError
        self.locals.add(name)

    def value(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=None | bool() | int()):
                pass
            case ast.Name(id=name) if name in self.locals:
                pass
            case ast.Starred(value=ast.Name(id=name)) if name in self.locals:
                pass
            case ast.List(elts=items) | ast.Tuple(elts=items):
                for item in items:
                    self.value(item)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                self.value(left)
                self.value(right)
            case ast.Subscript(value=ast.Name(id=name), slice=index) if name in self.locals:
                if not isinstance(index, (ast.Constant, ast.UnaryOp)) or type(ast.literal_eval(index)) is not int:
                    raise _OtherwiseError
            case ast.IfExp(test=test, body=then, orelse=otherwise):
                self.test(test)
                self.value(then)
                self.value(otherwise)
            case ast.Call(func=func, args=args, keywords=keywords):
                self.function(func)
                for arg in [*args, *(k.value for k in keywords)]:
                    self.value(arg)
            case _:
                raise _OtherwiseError

    def function(self, node: ast.expr) -> None:
        """A child, or a function by its dotted name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.locals:
            raise _OtherwiseError
        if node.id != self.own:
            self.functions.add(".".join([node.id, *parts]))
        elif len(parts) == 1:
            self.called.add(parts[0])
        else:
            raise _OtherwiseError

    def test(self, node: ast.expr) -> None:
        """What is there or not, and a flag of self; never a tensor or what is said of one."""
        match node:
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
                if not (isinstance(left, ast.Name) and left.id in self.locals):
                    self.test(left)
            case ast.Attribute(value=ast.Name(id=self.own), attr=name):
                self.tested.add(name)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self.test(operand)
            case _:
                raise _OtherwiseError
