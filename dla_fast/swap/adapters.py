"""Adapters: which modules resemble a fused unit, and what keeps a particular one from being swapped.

An adapter recognises one family of modules by structure. To add one, write an object with the members of
:class:`Adapter` and put it into :data:`ADAPTERS`; the first adapter a module resembles decides about it.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import parametrize

from dla_fast.checks import FLOATING
from dla_fast.nn.batch_norm import is_observed
from dla_fast.swap import verify
from dla_fast.swap.ida_adapter import IDAAdapter
from dla_fast.swap.nodes import (
    CONV1X1,
    AggregateSpec,
    FusedAggregate,
    FusedNode,
    class_reason,
    fused_act,
)

_NORMS = ("bn", "norm")
_ACTS = ("relu", "act")
_FLAGS = ("residual", "shortcut", "add_identity")


class Adapter(Protocol):
    """How one family of modules is recognised and swapped."""

    kind: str
    """The op that serves it, a name of :data:`dla_fast.backend.OPS`; shown in the report."""

    node: type[FusedNode]
    """What supplies the fused forward."""

    def resembles(self, module: nn.Module) -> bool:
        """Whether the module belongs in the report at all."""
        ...

    def match(self, module: nn.Module, backend: str) -> Any:
        """The specification of the fused module, or a string: the reason there is none.

        A specification is hashable, picklable and has an attribute ``backend``.
        """
        ...

    def placement(self, module: nn.Module, spec: Any) -> tuple[torch.device, torch.dtype]:
        """Device and dtype a matched module computes on."""
        ...

    def verify(self, module: nn.Module, spec: Any) -> str | None:
        """Compare the fused call with the original forward by running both: None, or how they differ."""
        ...


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


def conv_reason(name: str, conv: nn.Module) -> str | None:
    """Why a child is not a 1x1 convolution that mixes channels and does nothing else."""
    reason = child_reason(name, conv, nn.Conv2d)
    if reason is not None:
        return reason
    for option, want in CONV1X1.items():
        got = getattr(conv, option)
        if got != want:
            return f"{name}: {option} is {got!r}, expected {want!r}"
    weight: Any = conv.weight
    if weight.dtype not in FLOATING or type(weight) is not nn.Parameter:
        return f"{name}: weight is a {class_name(weight)} of {weight.dtype}, expected a floating Parameter"
    return None


def norm_reason(name: str, norm: nn.Module) -> str | None:
    """Why a child is not a batch norm as kernels know it."""
    return child_reason(name, norm, nn.BatchNorm2d)


def act_reason(name: str, act: nn.Module) -> str | None:
    """Why a child is not an activation that kernels end with."""
    if fused_act(act) is None:
        return f"{name}: no kernel ends with {class_name(act)}"
    return child_reason(name, act, None)


def takes_list(forward: Any) -> bool | None:
    """Whether a forward (seen from its class) takes one list, or each input as an argument; None for neither."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    if len(parameters) == 1 and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if parameters and parameters[0].kind in positional:
        needed = [p for p in parameters[1:] if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        return None if needed else True
    return None


def _present(names: tuple[str, ...], where: Any) -> list[str]:
    return [name for name in names if where.get(name) is not None]


class RootAdapter:
    """``Root`` of Deep Layer Aggregation networks: the original's, and those shaped like it.

    Children ``conv``, ``bn`` (or ``norm``), ``relu`` (or ``act``) and nothing else; a boolean ``residual`` (or
    ``shortcut``, ``add_identity``); ``forward(*xs)`` or ``forward(xs)``.
    """

    kind = "aggregate"
    node: type[FusedNode] = FusedAggregate

    def resembles(self, module: nn.Module) -> bool:
        children = module._modules
        flags = [v for v in (module.__dict__.get(name) for name in _FLAGS) if isinstance(v, (bool, int))]
        named_root = type(module).__name__.endswith("Root")
        if isinstance(children.get("conv"), nn.Module):
            return bool(flags) or named_root or takes_list(type(module).forward) is False
        return named_root and bool(flags or _present(_NORMS, children))

    def match(self, module: nn.Module, backend: str) -> AggregateSpec | str:
        reason = class_reason(module)
        if reason is not None:
            return reason
        children = module._modules
        norms, acts = _present(_NORMS, children), _present(_ACTS, children)
        flags = [name for name in _FLAGS if hasattr(module, name)]
        reasons = []
        if children.get("conv") is None:
            reasons.append("no child conv")
        for wanted, found in ((_NORMS, norms), (_ACTS, acts), (_FLAGS, flags)):
            if len(found) != 1:
                what = "attribute" if wanted is _FLAGS else "child"
                reasons.append(f"{'both ' + ' and '.join(found) if found else f'no {what} ' + ' or '.join(wanted)}")
        if reasons:
            return "; ".join(reasons)
        conv: Any = children["conv"]
        bn: Any = children[norms[0]]
        act: Any = children[acts[0]]
        reasons += [r for r in (conv_reason("conv", conv), norm_reason(norms[0], bn), act_reason(acts[0], act)) if r]
        residual = getattr(module, flags[0])
        if not isinstance(residual, bool):
            reasons.append(f"{flags[0]}: expected a bool, got {residual!r}")
        further = [name for name in children if name not in ("conv", norms[0], acts[0])]
        further += [*module._parameters, *module._buffers]
        if further:
            reasons.append(f"has more than a node: {', '.join(further)}")
        convention = takes_list(type(module).forward)
        if convention is None:
            reasons.append("forward takes neither *xs nor one list")
        if reasons:
            return "; ".join(reasons)
        if conv.out_channels != bn.num_features:
            return f"{norms[0]}: {bn.num_features} features, the convolution has {conv.out_channels}"
        if residual and conv.in_channels < conv.out_channels:
            return f"{flags[0]}: {conv.in_channels} input channels cannot hold a residual of {conv.out_channels}"
        tensors = [*conv.parameters(), *bn.parameters(), *bn.buffers()]
        if len({t.device for t in tensors}) > 1:
            return "its parameters and buffers lie on several devices"
        return AggregateSpec(norms[0], acts[0], flags[0], residual, bool(convention), backend)

    def placement(self, module: nn.Module, spec: AggregateSpec) -> tuple[torch.device, torch.dtype]:
        weight: Any = module._modules["conv"].weight  # type: ignore[union-attr]
        return weight.device, weight.dtype

    def verify(self, module: nn.Module, spec: AggregateSpec) -> str | None:
        return verify.verify_aggregate(module, spec)


ADAPTERS: tuple[Adapter, ...] = (RootAdapter(), IDAAdapter())
