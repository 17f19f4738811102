"""What a swapped module found of itself in a call, so that the next one of a frozen model need not look again.

It is kept by the first unit that the module runs: the module's own ``__dict__`` is left alone by swapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from dla_fast.nn.facts import Facts, of_dict, of_module
from dla_fast.nn.frozen import KEY, Frozen, recalls
from dla_fast.ops import packed
from dla_fast.reference.activation import ActSpec
from dla_fast.swap.calls import fused_act

# How many modules may share a unit before what they found is dropped.
_OWNERS = 4


class Unit(NamedTuple):
    """A frozen unit among a module's children."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    act: ActSpec
    frozen: Frozen

    def recall(self, xs: Sequence[Tensor], residual: int | Tensor | None = None) -> Tensor | None:
        return self.frozen.recall(xs, self.conv, self.bn, self.act, residual)


class Found(NamedTuple):
    """Facts of a module, names of its children in order, and its units."""

    facts: Facts
    children: tuple[str, ...]
    units: tuple[Unit, ...]


def found_before(module: nn.Module, conv: str) -> Found | None:
    """What a module has found, where it still holds and nobody is about who has to see its children.

    Args:
        module: a swapped module.
        conv: name of the convolution of its first unit.
    """
    if not recalls() or nn.modules.module._has_any_global_hook():
        return None
    child = module._modules.get(conv)
    frozen = None if child is None else child.__dict__.get(KEY)
    found: Found | None = None if frozen is None else frozen.found.get(id(module))
    if found is None or tuple(module._modules) != found.children or not packed.unchanged(found.facts):
        return None
    return found


def keep_found(
    module: nn.Module,
    names: Sequence[tuple[str, ...]],
    backend: str,
    own: Sequence[Any] = (),
    act: ActSpec = "identity",
) -> None:
    """Keep what a call has found, where all units are frozen and no other backend is asked for.

    Args:
        module: a swapped module, whose call was checked and run.
        names: of convolution, norm and, where that is a child, activation of each unit.
        backend: that the module is forced to, or "auto".
        own: facts about what else the module is.
        act: the activation where there is no child for it.
    """
    if not recalls() or backend not in ("auto", "cpu"):
        return
    children: Any = module._modules
    facts, units = list(own), []
    for conv_name, bn_name, *act_names in names:
        conv, bn = children[conv_name], children[bn_name]
        frozen = conv.__dict__.get(KEY)
        if frozen is None:
            return
        facts += [*of_dict(children, conv_name, bn_name), *of_dict(conv.__dict__, KEY)]
        ending = act
        for name in act_names:
            ending = cast(ActSpec, fused_act(children[name]))
            facts += [*of_dict(children, name), *of_module(children[name], "negative_slope")]
        units.append(Unit(conv, bn, ending, frozen))
    if not units:
        return
    kept = units[0].frozen
    others = kept.found if len(kept.found) < _OWNERS else {}
    found = Found((*of_module(module, "_modules"), *facts), tuple(children), tuple(units))
    kept.found = {**others, id(module): found}
