"""Operators for eager calls, with as little as can be between them and Python."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from dla_fast._extension import STATUS


def direct(backend: str, name: str, *, inputs: int | None = None) -> Callable[..., Any]:
    """The operator ``dla_fast_<backend>::<name>``, called by position.

    The CPU's are functions of the extension where it is built: they go through the dispatcher as well, so modes,
    subclasses and transforms see them, but do not make boxed values of their arguments first.

    Args:
        backend: a backend's name.
        name: of an operator, which takes no keywords.
        inputs: which argument is a list of tensors, if any.
    """
    op: Callable[..., Any] = getattr(getattr(torch.ops, f"dla_fast_{backend}"), name).default
    function = getattr(importlib.import_module("dla_fast._C"), name, None) if STATUS.loaded else None
    if backend != "cpu" or function is None:
        return op
    overridden = torch._C._has_torch_function

    def call(*args: Any) -> Any:
        # Compilers know operators: a backward that they trace has to be made of those.
        if torch.compiler.is_compiling() or overridden(args) or (inputs is not None and overridden(args[inputs])):
            return op(*args)
        return function(*args)

    return call
