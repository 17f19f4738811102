"""What a swapped module found of itself in a call, so that the next one of a frozen model need not look again.

It is kept by the first unit that the module runs: the module's own ``__dict__`` is left alone by swapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from dla_fast.nn.facts import Facts, of_attributes, of_module
from dla_fast.nn.frozen import KEY, Frozen, recalls
from dla_fast.ops import packed
from dla_fast.reference.activation import ActSpec
from dla_fast.swap.calls import fused_act

# How many modules may share a unit before what they found is dropped.
_OWNERS = 4


class Found(NamedTuple):
    """What a module is.

    Attributes:
        order: names of its children.
        children: names of those that facts are about, numbered from 1 on; 0 is the module.
        facts: about them.
        units: names of convolution and norm, and activation, of each unit.
    """

    order: tuple[str, ...]
    children: tuple[str, ...]
    facts: Facts
    units: tuple[tuple[str, str, ActSpec], ...]


def look(
    module: nn.Module,
    units: Sequence[Sequence[str]],
    backend: str,
    *,
    act: ActSpec = "identity",
    attributes: Sequence[str] = (),
    idle: Sequence[str] = (),
) -> Found | None:
    """What a module is, before a call of it is checked; None where that need not be kept.

    Args:
        module: a swapped module.
        units: names of convolution, norm and, where that is a child, activation of each unit.
        backend: that the module is forced to, or "auto".
        act: the activation where there is no child for it.
        attributes: of the module, on which its forward depends.
        idle: names of children that do nothing, or are None.
    """
    if backend not in ("auto", "cpu") or not units or not recalls():
        return None
    children: Any = module._modules
    if children.get(units[0][0]) is None or KEY not in children[units[0][0]].__dict__:
        return None
    names: list[str] = []
    found: list[tuple[str, str, ActSpec]] = []
    facts = [0, type(module), ..., *of_attributes(0, module, *attributes)]
    for conv, bn, *acts in units:
        for name in (conv, bn, *acts):
            if children.get(name) is None:
                return None
            names.append(name)
            facts += of_module(len(names), children[name], "_parameters", "training", "negative_slope")
        found.append((conv, bn, cast(ActSpec, fused_act(children[acts[0]])) if acts else act))
    for name in idle:
        names.append(name)
        child = children.get(name)
        facts += [len(names), type(None), ...] if child is None else of_module(len(names), child)
    return Found(tuple(children), tuple(names), tuple(facts), tuple(found))


def keep(module: nn.Module, found: Found | None) -> None:
    """Keep what :func:`look` has found, where each unit of the call can be recalled."""
    if found is None:
        return
    children: Any = module._modules
    for conv_name, bn_name, act in found.units:
        conv, bn = children.get(conv_name), children.get(bn_name)
        frozen: Frozen | None = None if conv is None else conv.__dict__.get(KEY)
        if frozen is None or bn is None or not frozen.knows(conv, bn, act):
            return
    first = children[found.units[0][0]].__dict__[KEY]
    others = first.found if len(first.found) < _OWNERS else {}
    first.found = {**others, id(module): found}


def find(module: nn.Module, conv: str) -> Found | None:
    """What was kept of a module, where it still holds and nobody is about who has to see its children.

    Args:
        module: a swapped module.
        conv: name of the convolution of its first unit.
    """
    if not recalls() or nn.modules.module._has_any_global_hook():
        return None
    children: Any = module._modules
    child = children.get(conv)
    frozen = None if child is None else child.__dict__.get(KEY)
    found: Found | None = None if frozen is None else frozen.found.get(id(module))
    if found is None or tuple(children) != found.order:
        return None
    return found if packed.unchanged((module, *map(children.get, found.children)), found.facts) else None


def recall(
    module: nn.Module, unit: tuple[str, str, ActSpec], xs: Sequence[Tensor], residual: int | Tensor | None = None
) -> Tensor | None:
    """The output of a unit that was found; None where no call like this one was served before."""
    children: Any = module._modules
    conv_name, bn_name, act = unit
    conv = children[conv_name]
    frozen: Frozen | None = conv.__dict__.get(KEY)
    return None if frozen is None else frozen.recall(xs, conv, children[bn_name], act, residual)
