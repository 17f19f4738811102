"""Facts about modules, which one call of the extension compares with what they are now.

A call of a module asks dozens of small questions (classes, hooks, options) before it may leave its children out. Once
they were answered it is enough that nothing they are about has changed. Facts are taken before the questions are asked,
so that what changes meanwhile is found by the next call. They hold what modules hold, and never a module: no cycle
keeps a model alive.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Threes in a row, as csrc/recall.h reads them. Modules are numbered in the order in which they are handed over.
Facts = tuple[Any, ...]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def of_dict(held: dict[str, Any], *keys: str) -> list[Any]:
    """What a dict holds at keys, or that it has no such key."""
    return [fact for key in keys for fact in (held, key, held.get(key, ...))]


def of_module(number: int, module: nn.Module, *attributes: str) -> list[Any]:
    """A module's class, its hooks, a forward of its own, and attributes in its ``__dict__``."""
    own = module.__dict__
    facts = [number, type(module), ..., *of_attributes(number, module, "forward", *_HOOKS, *attributes)]
    for name in _HOOKS:
        facts += own[name], len(own[name]), ...
    return facts


def of_attributes(number: int, module: nn.Module, *names: str) -> list[Any]:
    """What a module's ``__dict__`` holds."""
    return [fact for name in names for fact in (number, name, module.__dict__.get(name, ...))]


def of_unit(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> list[Any]:
    """A convolution (number 0) and a norm (1): their options, and which tensors they hold."""
    options = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "_parameters")
    return [
        *of_module(0, conv, *options),
        *of_dict(conv._parameters, "weight", "bias"),
        *of_module(1, bn, "training", "eps", "_parameters", "_buffers"),
        *of_dict(bn._parameters, "weight", "bias"),
        *of_dict(bn._buffers, "running_mean", "running_var"),
    ]
