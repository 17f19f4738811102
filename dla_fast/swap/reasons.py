"""Why a child's calls cannot be left out of a fused module."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from dla_fast.checks import FLOATING
from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_observed
from dla_fast.swap.calls import fused_act
from dla_fast.swap.kept import INTERNAL
from dla_fast.swap.nodes import CONV1X1
from dla_fast.swap.processes import asks_others
from dla_fast.swap.units import Unit, is_sequential, unit_tail


def class_name(value: object) -> str:
    return type(value).__name__


def child_reason(name: str, child: nn.Module, expected: type[nn.Module] | None) -> str | None:
    """Why the calls of a child cannot be left out: another kind of module, or one that somebody watches or changes."""
    if parametrize.is_parametrized(child):
        return f"{name}: has parametrizations"
    if expected is not None and type(child) is not expected:
        return f"{name}: expected {expected.__name__}, got {class_name(child)}"
    if "forward" in child.__dict__:
        return f"{name}: its forward is replaced on the instance"
    if is_observed(child):
        return f"{name}: has hooks"
    return None


def _known_reason(name: str, child: nn.Module, expected: type[nn.Module], kinds: tuple[str, ...]) -> str | None:
    """:func:`child_reason` for a child that has to be one of ``kinds`` in effect."""
    known = not parametrize.is_parametrized(child) and "forward" not in child.__dict__ and stock.kind(child) in kinds
    reason = child_reason(name, child, None if known else expected)
    if reason is None or not reason.startswith(f"{name}: expected") or not isinstance(child, expected):
        return reason
    if asks_others(child):
        return f"{reason}, whose code speaks of other processes"
    return f"{reason}, a class of {type(child).__module__} that gives something else or is not known"


def conv_reason(name: str, conv: nn.Module) -> str | None:
    """Why a child is not a convolution itself."""
    reason = _known_reason(name, conv, nn.Conv2d, stock.CONVS)
    if reason is not None:
        return reason
    weight: Any = conv.weight
    if weight.dtype not in FLOATING or type(weight) is not nn.Parameter:
        return f"{name}: weight is a {class_name(weight)} of {weight.dtype}, expected a floating Parameter"
    return None


def conv1x1_reason(name: str, conv: nn.Module) -> str | None:
    """Why a child is not a 1x1 convolution that mixes channels and does nothing else."""
    reason = conv_reason(name, conv)
    if reason is not None:
        return reason
    for option, want in CONV1X1.items():
        got = getattr(conv, option)
        if got != want:
            return f"{name}: {option} is {got!r}, expected {want!r}"
    return None


def norm_reason(name: str, norm: nn.Module, activates: bool = False) -> str | None:
    """Why a child is not a batch norm as kernels know it; one that activates as well only where that is expected."""
    if not activates and stock.kind(norm) in stock.NORM_ACTS:
        return f"{name}: {class_name(norm)} activates as well"
    return _known_reason(name, norm, nn.BatchNorm2d, stock.NORMS)


def act_reason(name: str, act: nn.Module) -> str | None:
    """Why a child is not an activation that kernels end with."""
    if fused_act(act) is None:
        return f"{name}: no kernel ends with {class_name(act)}"
    return child_reason(name, act, None)


def functions_of(module: nn.Module) -> list[str]:
    """Names of a module's attributes that can be called, and are no children."""
    return [name for name, value in module.__dict__.items() if name not in INTERNAL and callable(value)]


def unit_reason(unit: nn.Module, found: Unit | None) -> str:
    """Why a projection or node is not fused whole."""
    if found is not None:
        return f"the tail alone, behind {class_name(found.conv)}"
    if is_observed(unit):
        return f"{class_name(unit)} has hooks"
    tails = [name for name, m in unit.named_modules() if is_sequential(m) and unit_tail(m) is not None]
    if not tails:
        leaves = [m for m in unit.modules() if not m._modules and not stock.kind(m) and fused_act(m) is None]
        strange = ", ".join(dict.fromkeys(map(class_name, leaves)))
        return f"{class_name(unit)} is called as it is" + (f", no kernel knows {strange}" if strange else "")
    return f"{class_name(unit)} is called as it is; its tail {', '.join(tails)} is swapped by itself, with units=convs"
