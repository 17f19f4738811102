"""Recognising the residual blocks of DLA networks, of ResNets, and of what is shaped like them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast.nn import stock
from dla_fast.swap import verify
from dla_fast.swap.block import BlockSpec, FusedBlock, can_fuse, output_shape, run_block
from dla_fast.swap.kept import INTERNAL
from dla_fast.swap.nodes import FusedNode, class_reason
from dla_fast.swap.probe import Case, Shapes
from dla_fast.swap.reasons import act_reason, class_name, conv_reason, functions_of, norm_reason
from dla_fast.swap.units import norm_channels

_ARGUMENTS = ("shortcut", "residual", "identity")
_DOWNSAMPLES = ("downsample", "shortcut")
_ACTS = ("act{}", "relu{}", "relu", "act")


def _signature(forward: Any) -> tuple[str | None, bool, int] | None:
    """Name of the argument that brings a shortcut, whether it is required, and number of arguments by position.

    None for another signature than (x), (x, shortcut), or (x, shortcut=None) with further arguments that are None too.
    """
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in kinds]
    if not positional or len(positional) != len(parameters):
        return None
    argument = positional[1].name if len(positional) > 1 and positional[1].name in _ARGUMENTS else None
    required = argument is not None and positional[1].default is inspect.Parameter.empty
    if any(p.default is not None for p in positional[2 if required else 1 :]):
        return None
    return argument, required, len(positional)


def _units(module: nn.Module) -> list[tuple[str, str, str]]:
    """Names of convolution, norm and activation of each unit; an empty one for an activation that there is not."""
    children = module._modules
    units: list[tuple[str, str, str]] = []
    while isinstance(children.get(f"conv{len(units) + 1}"), nn.Module):
        i = len(units) + 1
        acts = [name.format(i) for name in _ACTS if isinstance(children.get(name.format(i)), nn.Module)]
        units.append((f"conv{i}", f"bn{i}", acts[0] if acts else ""))
    return units


def _convs(module: nn.Module, spec: BlockSpec) -> list[nn.Conv2d]:
    return [cast(nn.Conv2d, module._modules[conv]) for conv, _, _ in spec.units]


class BlockAdapter:
    """Residual blocks: ``conv1``, ``bn1``, ``conv2``, ``bn2`` and so on, with the shortcut before the last activation.

    The activations are ``act1``, ``act2``, or ``relu1``, or one ``relu`` or ``act`` for all, or no children: then they
    have to be ReLUs. The shortcut comes as an argument (``shortcut`` or ``residual``), from a child ``downsample`` (or
    ``shortcut``), or is the input. Other children may only be those that do nothing: nn.Identity, or None.
    """

    unit = "blocks"
    kind = "block"
    op = "conv_norm_act"
    node: type[FusedNode] = FusedBlock

    def resembles(self, module: nn.Module) -> bool:
        children = module._modules
        if not all(isinstance(children.get(name), nn.Module) for name in ("conv1", "bn1", "conv2", "bn2")):
            return False
        if any(name in children or name in module.__dict__ for name in _DOWNSAMPLES):
            return True
        signature = _signature(type(module).forward)
        return signature is not None and signature[0] is not None

    def match(self, module: nn.Module, backend: str) -> BlockSpec | str:
        reason = class_reason(module)
        if reason is not None:
            return reason
        children, units = module._modules, _units(module)
        signature = _signature(type(module).forward)
        reasons = [] if signature is not None else ["forward takes neither (x) nor (x, shortcut=None)"]
        functional = not any(act for _, _, act in units)
        for conv, bn, act in units:
            for name, reason_of in ((conv, conv_reason), (bn, norm_reason), (act, act_reason)):
                child = children.get(name)
                if child is not None:
                    reasons.append(reason_of(name, child) or "")
                elif name or not functional:
                    reasons.append(f"no child {name}" if name else f"no activation for {bn}")
        downsamples = [name for name in _DOWNSAMPLES if children.get(name) is not None]
        if len(downsamples) > 1:
            reasons.append(f"both {' and '.join(downsamples)}")
        used = {*(name for unit in units for name in unit), *downsamples}
        others = tuple(name for name in children if name not in used)
        kinds = {name: stock.kind(child) for name, child in children.items() if child is not None}
        further = [name for name in others if kinds.get(name, "identity") != "identity"]
        further += [*module._parameters, *module._buffers]
        if further:
            named = (f"{n} ({class_name(children[n])})" if n in children else n for n in further)
            reasons.append(f"has more than a block: {', '.join(named)}")
        functions = functions_of(module) if functional else []
        if functions:
            reasons.append(f"what activates may be {', '.join(functions)}, which can be exchanged")
        told = [r for r in dict.fromkeys(reasons) if r]
        if signature is None or told:
            return "; ".join(told)
        attributes = tuple(
            (key, value)
            for key, value in module.__dict__.items()
            if key not in INTERNAL and (value is None or type(value) in (bool, int, float, str))
        )
        downsample = downsamples[0] if downsamples else None
        spec = BlockSpec(tuple(units), *signature, downsample, others, len(children), attributes, backend)
        return self._misfit(module, spec) or spec

    def _misfit(self, module: nn.Module, spec: BlockSpec) -> str | None:
        """Why children do not fit each other."""
        convs, before = _convs(module, spec), None
        for conv, (conv_name, bn_name, _) in zip(convs, spec.units, strict=True):
            bn = cast(nn.Module, module._modules[bn_name])
            if conv.out_channels != norm_channels(bn):
                return f"{bn_name}: {norm_channels(bn)} features, the convolution has {conv.out_channels}"
            if before is not None and conv.in_channels != before.out_channels:
                return f"{conv_name}: {conv.in_channels} input channels, the one before gives {before.out_channels}"
            before = conv
        if len({t.device for t in [*module.parameters(), *module.buffers()]}) > 1:
            return "its parameters and buffers lie on several devices"
        if not _cases(module, spec):
            return "its input has not the output's shape, and nothing makes a shortcut of it"
        return None

    def placement(self, module: nn.Module, spec: BlockSpec) -> tuple[torch.device, torch.dtype]:
        weight = _convs(module, spec)[0].weight
        return weight.device, weight.dtype

    def verify(self, module: nn.Module, spec: BlockSpec) -> str | None:
        def original(m: nn.Module, xs: Sequence[Tensor | None]) -> Any:
            x, shortcut = xs
            return m.forward(x) if shortcut is None else m.forward(x, **{cast(str, spec.argument): shortcut})

        def fused(m: nn.Module, xs: Sequence[Any], name: str) -> Any:
            return run_block(m, replace(spec, backend=name), *xs)

        weight, cases, shapes = _convs(module, spec)[0].weight, _cases(module, spec), _shapes(module, spec)
        fits = partial(_fits, spec=spec)
        return verify.compare(module, weight, cases, original, fused, spec.backend, shapes=shapes, fits=fits)

    def remark(self, module: nn.Module, spec: BlockSpec) -> str:
        return ""

    def owned(self, module: nn.Module, spec: BlockSpec) -> Iterable[nn.Module]:
        return ()


def _cases(module: nn.Module, spec: BlockSpec) -> list[Case]:
    """What is run: with a shortcut where one can be given, and without where that is possible."""
    given = _given(module, spec, verify.input_shape(_convs(module, spec)))
    return [Case(training, shapes) for training in (False, True) for shapes in given]


def _given(module: nn.Module, spec: BlockSpec, x: Sequence[int]) -> list[Shapes]:
    """Input of a shape without a shortcut, where that is possible, and with one, where one can be given."""
    y = output_shape(_convs(module, spec), x)
    shortcuts = [y] if spec.argument is not None else []
    without = [None] if not spec.required and (spec.downsample is not None or y == tuple(x)) else []
    return [[x, shortcut] for shortcut in [*without, *shortcuts]]


def _shapes(module: nn.Module, spec: BlockSpec) -> list[Shapes]:
    """More sizes of the input, those of which every convolution makes a map."""
    convs = _convs(module, spec)
    rows = [convs[: i + 1] for i in range(len(convs))]
    sizes = [x for x in verify.sizes(convs) if all(min(output_shape(row, x)) > 0 for row in rows)]
    return [shapes for x in sizes for shapes in _given(module, spec, x)]


def _fits(module: nn.Module, xs: Sequence[Any], spec: BlockSpec) -> bool:
    return can_fuse(module, spec, *xs)
