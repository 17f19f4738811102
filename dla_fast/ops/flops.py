"""Flop formulas, registered with torch's flop counter when somebody imports it.

``torch.utils.flop_counter`` imports Triton where that is installed, which takes longer than all of this package. So the
formulas wait, and a finder on the import path hands them over right after that module has been executed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def _hand_over(module: ModuleType) -> None:
    for op, formula in _waiting:
        module.register_flop_formula(op)(formula)
    _waiting.clear()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, once, as the other finders do, and acts after its execution."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _hand_over(module)

            loader.exec_module = exec_module
        return spec


def register_flop_formula(op: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """As torch's decorator of this name: the formula counts calls of ``op``, an operator packet."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _waiting.append((op, formula))
        if _MODULE in sys.modules:
            _hand_over(sys.modules[_MODULE])
        return formula

    return register


if _MODULE not in sys.modules:
    sys.meta_path.insert(0, _Finder())
