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
        facts: about them; not what a unit's own facts are about.
        units: of each unit the numbers of convolution and norm, and the activation; once it is kept what ``recall``
            takes.
    """

    order: tuple[str, ...]
    children: tuple[str, ...]
    facts: Facts
    units: tuple[tuple[Any, ...], ...]

    def modules(self, module: nn.Module) -> tuple[Any, ...]:
        return (module, *map(module._modules.get, self.children))


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
    found: list[tuple[int, int, ActSpec]] = []
    facts = [0, type(module), ..., *of_attributes(0, module, *attributes)]
    for conv, bn, *acts in units:
        for name in (conv, bn, *acts):
            if children.get(name) is None:
                return None
            names.append(name)
            # A module's own dict of parameters stands for the module.
            facts += of_attributes(len(names), children[name], "_parameters")
        if acts:
            facts += of_module(len(names), children[acts[0]], "negative_slope")
        number = len(names) - 1 - len(acts)
        found.append((number, number + 1, cast(ActSpec, fused_act(children[acts[0]])) if acts else act))
    for name in idle:
        names.append(name)
        child = children.get(name)
        facts += [len(names), type(None), ...] if child is None else of_module(len(names), child)
    return Found(tuple(children), tuple(names), tuple(facts), tuple(found))


def keep(module: nn.Module, found: Found | None) -> None:
    """Keep what :func:`look` has found, where each unit of the call can be recalled."""
    if found is None:
        return
    modules, units = found.modules(module), []
    for conv, bn, act in found.units:
        frozen = _frozen(modules[conv])
        unit = None if frozen is None or modules[bn] is None else frozen.known(modules[conv], modules[bn], act)
        if unit is None:
            return
        units.append(unit.at(conv, bn))
    first = cast(Frozen, _frozen(modules[1]))
    others = first.found if len(first.found) < _OWNERS else {}
    first.found = {**others, id(module): found._replace(units=tuple(units))}


def _frozen(conv: nn.Module | None) -> Frozen | None:
    return None if conv is None else conv.__dict__.get(KEY)


def find(module: nn.Module, conv: str) -> Found | None:
    """What was kept of a module, where nobody is about who has to see its children. :func:`recall` asks the rest.

    Args:
        module: a swapped module.
        conv: name of the convolution of its first unit.
    """
    if not recalls() or nn.modules.module._has_any_global_hook():
        return None
    frozen = _frozen(module._modules.get(conv))
    found: Found | None = None if frozen is None else frozen.found.get(id(module))
    return found if found is not None and tuple(module._modules) == found.order else None


def recall(
    module: nn.Module,
    found: Found,
    xs: Sequence[Tensor],
    residual: int | Tensor | None = None,
    units: slice = slice(None),  # noqa: B008
) -> Tensor | None:
    """The output of units that were found; None, and nothing is kept any more, where no such call was served before.

    Args:
        module: a swapped module.
        found: what :func:`find` has given for it.
        xs: what the first of the units reads.
        residual: what the last one adds, as in :func:`dla_fast.functional.conv_norm_act`.
        units: which of them.
    """
    modules = found.modules(module)
    y = packed.recall(modules, found.facts, found.units[units], xs, residual) if type(xs) in (list, tuple) else None
    if y is None:
        frozen = _frozen(modules[1])
        if frozen is not None:
            frozen.found.pop(id(module), None)
    return y
