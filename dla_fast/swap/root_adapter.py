"""Recognising aggregation nodes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dla_fast.swap import verify
from dla_fast.swap.nodes import AggregateSpec, FusedAggregate, FusedNode, class_reason
from dla_fast.swap.reasons import act_reason, class_name, conv1x1_reason, functions_of, norm_reason
from dla_fast.swap.units import norm_channels, tail_of

_NORMS = ("bn", "norm")
_ACTS = ("relu", "act")
_FLAGS = ("residual", "shortcut", "add_identity")


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
    ``shortcut``, ``add_identity``); ``forward(*xs)`` or ``forward(xs)``. The convolution may hold the norm as its child
    ``norm``, the norm the activation, and a ReLU need not be a child.
    """

    unit = "nodes"
    kind = "aggregate"
    op = "aggregate"
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
        held: Any = children.get("conv")
        inner: Any = None if held is None else held._modules.get("norm")
        flags = [name for name in _FLAGS if hasattr(module, name)]
        reasons = []
        if children.get("conv") is None:
            reasons.append("no child conv")
        for wanted, found in ((_NORMS, norms), (_ACTS, acts), (_FLAGS, flags)):
            # The convolution may hold the norm, and a ReLU need not be a child.
            if len(found) != 1 and (found or not (wanted is _ACTS or (wanted is _NORMS and inner is not None))):
                what = "attribute" if wanted is _FLAGS else "child"
                reasons.append(f"{'both ' + ' and '.join(found) if found else f'no {what} ' + ' or '.join(wanted)}")
        if reasons:
            return "; ".join(reasons)
        conv: Any = children["conv"]
        bn: Any = children[norms[0]] if norms else inner
        named = norms[0] if norms else "conv.norm"
        act: Any = children[acts[0]] if acts else None
        told = [conv1x1_reason("conv", conv), norm_reason(named, bn, True), act and act_reason(acts[0], act)]
        if not any(told) and act is not None and tail_of(bn, act) is None:
            told.append(f"{named}: {class_name(bn)} activates, and {acts[0]} again")
        reasons += [r for r in told if r]
        residual = getattr(module, flags[0])
        if not isinstance(residual, bool):
            reasons.append(f"{flags[0]}: expected a bool, got {residual!r}")
        further = [name for name in children if name not in ("conv", *norms, *acts)]
        further += [*module._parameters, *module._buffers]
        if further:
            reasons.append(f"has more than a node: {', '.join(further)}")
        convention = takes_list(type(module).forward)
        if convention is None:
            reasons.append("forward takes neither *xs nor one list")
        functions = [] if acts else functions_of(module)
        if functions:
            reasons.append(f"what activates may be {', '.join(functions)}, which can be exchanged")
        if reasons:
            return "; ".join(reasons)
        if conv.out_channels != norm_channels(bn):
            return f"{named}: {norm_channels(bn)} features, the convolution has {conv.out_channels}"
        if residual and conv.in_channels < conv.out_channels:
            return f"{flags[0]}: {conv.in_channels} input channels cannot hold a residual of {conv.out_channels}"
        tensors = [*conv.parameters(), *bn.parameters(), *bn.buffers()]
        if len({t.device for t in tensors}) > 1:
            return "its parameters and buffers lie on several devices"
        return AggregateSpec(
            norms[0] if norms else "", acts[0] if acts else "", flags[0], residual, bool(convention), backend
        )

    def placement(self, module: nn.Module, spec: AggregateSpec) -> tuple[torch.device, torch.dtype]:
        weight: Any = module._modules["conv"].weight  # type: ignore[union-attr]
        return weight.device, weight.dtype

    def verify(self, module: nn.Module, spec: AggregateSpec) -> str | None:
        return verify.verify_aggregate(module, spec)

    def remark(self, module: nn.Module, spec: AggregateSpec) -> str:
        return ""

    def owned(self, module: nn.Module, spec: AggregateSpec) -> Iterable[nn.Module]:
        return ()
