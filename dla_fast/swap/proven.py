"""What a foreign module computes, found by running it beside the library's on copies: the prover of nn/stock.py.

Each kind names who may be one, by structure, and what it would have to compute; the first that agrees is what it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast.nn import stock
from dla_fast.swap import units, verify
from dla_fast.swap.probe import Case
from dla_fast.swap.processes import asks_others

# Weights of a module that is run at length, and input channels where it has more.
_LIGHT, _FEW = 2_000_000, 4

Stock = Callable[[Any, Tensor], Tensor]


def _is_norm_act(module: nn.Module) -> bool:
    """A child ``act``, and one ``drop`` at most that does nothing."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    drop = children.pop("drop", None)
    return list(children) == ["act"] and (drop is None or stock.kind(drop) == "identity")


def _frozen(m: Any, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)


def _conv_norm(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.norm(nn.Conv2d.forward(m, x))
    activation = getattr(m, "activation", None)
    return y if activation is None else activation(y)


def _candidates(module: nn.Module) -> Iterator[tuple[str, Stock]]:
    """What a module may be, and what it would compute then."""
    alone = not any(child is not None for child in module._modules.values())
    if isinstance(module, nn.Conv2d):
        if alone:
            yield "conv", nn.Conv2d.forward
        elif [name for name, child in module._modules.items() if child is not None] == ["norm"]:
            yield "conv_norm", _conv_norm
    elif isinstance(module, nn.ConvTranspose2d):
        if alone:
            yield "transposed", nn.ConvTranspose2d.forward
    elif isinstance(module, nn.BatchNorm2d):
        if alone:
            yield "norm", nn.BatchNorm2d.forward
        elif _is_norm_act(module):
            yield "norm_act", lambda m, x: m.act(nn.BatchNorm2d.forward(m, x))
    elif set(module._buffers) - {"num_batches_tracked"} == {"weight", "bias", "running_mean", "running_var"}:
        if not module._parameters and isinstance(getattr(module, "eps", None), float):
            if alone:
                yield "frozen", _frozen
            elif _is_norm_act(module):
                yield "frozen_act", lambda m, x: m.act(_frozen(m, x))
    elif alone and not module._parameters and not module._buffers:
        yield "identity", lambda m, x: x
    else:
        structure = units.structure_of(module)
        if structure is not None:
            yield "unit", structure.run
            if structure.act is None:
                yield "unit_relu", lambda m, x: structure.run(m, x).relu()


def _takes_one(module: nn.Module) -> bool:
    """Whether a forward takes one map; more may be left out."""
    try:
        parameters = list(inspect.signature(cast(Any, stock.original_class(module)).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or any(p.kind not in kinds for p in parameters):
        return False
    return parameters[0].default is inspect.Parameter.empty and all(p.default is not p.empty for p in parameters[1:])


def prove(module: nn.Module) -> stock.Known:
    """The kind of a module, as :mod:`dla_fast.nn.stock` names them, or "" for none that it agrees with.

    Beside that of a unit stands its :class:`dla_fast.swap.units.Structure`.
    """
    known = type(module).__module__.startswith("torch.nn.modules.")  # and none of those
    # Alone, a norm over several processes is as any other.
    if asks_others(module):
        return "", None
    if known or not _takes_one(module) or isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return "", None
    try:
        light = _light(module)
        for kind, expected in () if light is None else _candidates(light):
            if _agrees(cast(nn.Module, light), kind, expected):
                return kind, units.structure_of(module) if kind in stock.UNITS else None
    except Exception:  # whatever a foreign class raises when it is looked at
        return "", None
    return "", None


def _light(module: nn.Module) -> nn.Module | None:
    """The module, or one like it of fewer weights: what it does with a convolution does not depend on its width.

    None for one that is too large to be run at length.
    """
    if sum(p.numel() for p in module.parameters()) <= _LIGHT:
        return module
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    # Those that read what the first one reads.
    wide = [conv for conv in convs if conv.in_channels == convs[0].in_channels > _FEW]
    few = {id(conv.weight): nn.Parameter(conv.weight.detach()[:, :_FEW].clone()) for conv in wide}
    light = copy.deepcopy(module, dict(few))
    if sum(p.numel() for p in light.parameters()) > _LIGHT:
        return None
    narrowed = {id(weight) for weight in few.values()}
    for part in light.modules():
        if isinstance(part, nn.Conv2d) and id(part.weight) in narrowed:
            part.in_channels = _FEW
    return light


def _agrees(module: nn.Module, kind: str, expected: Stock) -> bool:
    channels = 3 if kind == "identity" else units.in_channels(module)
    if channels is None:
        return False

    def original(m: nn.Module, xs: Sequence[Tensor]) -> Any:
        return m.forward(*xs)

    def fused(m: nn.Module, xs: Sequence[Tensor], name: str) -> Tensor:
        return expected(m, xs[0])

    shapes = [[shape] for shape in units.shapes(module, channels)]
    cases = [Case(training, shapes[0]) for training in (False, True)]
    weight = torch.empty(0, device="meta")  # what it computes, and not that it runs
    # A frozen norm gives the wider dtype of two: its calls are left to it there.
    fits = lambda m, xs: "frozen" not in kind or m.running_mean.dtype == xs[0].dtype  # noqa: E731
    found = verify.compare(module, weight, cases, original, fused, "auto", shapes=shapes, fits=fits)
    return found is None
