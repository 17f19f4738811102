"""Facts about Python objects, which one call of the extension compares with what they are now.

A call of a module asks dozens of small questions (classes, hooks, options) before it may leave its children out. Once
they were answered it is enough that nothing they are about has changed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Threes in a row, as csrc/recall.h reads them.
Facts = tuple[Any, ...]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def of_dict(held: dict[Any, Any], *keys: Any) -> list[Any]:
    """What a dict holds at keys, or that it has no such key."""
    return [fact for key in keys for fact in (held, key, held.get(key, ...))]


def of_size(held: dict[Any, Any]) -> list[Any]:
    """How many entries a dict has."""
    return [held, len(held), ...]


def of_module(module: nn.Module, *attributes: str) -> list[Any]:
    """A module's class, its hooks, a forward of its own, and attributes in its ``__dict__``."""
    own = module.__dict__
    facts = [module, type(module), own, *of_dict(own, "forward", *_HOOKS, *attributes)]
    for name in _HOOKS:
        facts += of_size(own[name])
    return facts


def of_unit(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> list[Any]:
    """A convolution and a norm: their options, and which tensors they hold."""
    options = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "_parameters")
    return [
        *of_module(conv, *options),
        *of_dict(conv._parameters, "weight", "bias"),
        *of_module(bn, "training", "eps", "_parameters", "_buffers"),
        *of_dict(bn._parameters, "weight", "bias"),
        *of_dict(bn._buffers, "running_mean", "running_var"),
    ]
