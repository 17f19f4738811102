"""How much the modules of a model keep for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# In the dict of a module that is to keep little. It stays with copies and pickles, and is no part of a state dict.
LOW = "_dla_fast_low_memory"

MEMORY = ("default", "low")


def check_memory(memory: str) -> None:
    """Refuse what is no memory mode.

    Raises:
        ValueError: neither "default" nor "low".
    """
    if memory not in MEMORY:
        raise ValueError(f"memory: expected {' or '.join(map(repr, MEMORY))}, got {memory!r}")


def mark(modules: Iterable[nn.Module], memory: str) -> None:
    """Let the units of convolutions, and poolings, keep as much as is fastest, or little."""
    for module in modules:
        if memory == "low":
            module.__dict__[LOW] = True
        else:
            module.__dict__.pop(LOW, None)


def set_memory(model: nn.Module, memory: str) -> None:
    """:func:`mark` of all convolutions and max poolings of a model."""
    mark((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)), memory)
