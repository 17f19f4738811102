"""The demo's units by themselves: each swapped module on the inputs that it has inside the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast.commands.demo_setup import detached, tensors_of
from dla_fast.proof import measure

# Arguments by position, and by name.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def arguments(model: nn.Module, names: list[str], run: Callable[[], object]) -> dict[str, Arguments]:
    """What each unit is really called with while ``run`` runs the network."""
    seen: dict[str, Arguments] = {}
    modules = dict(model.named_modules())

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen.__setitem__(name, (args, kwargs))

    hooks = [modules[name].register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def steps(model: nn.Module, given: dict[str, Arguments], *, training: bool) -> dict[str, Callable[[], object]]:
    """One call per unit on its own inputs: inference, or forward and backward."""
    modules = dict(model.named_modules())
    found: dict[str, Callable[[], object]] = {}
    for name, (args, kwargs) in given.items():
        unit, own = modules[name], detached([list(args), list(kwargs.values())], requires_grad=training)
        named = dict(zip(kwargs, own[1], strict=True))
        if not training:
            found[name] = _no_grad(unit, own[0], named)
            continue
        with torch.no_grad():
            dy = torch.randn_like(copy.deepcopy(unit)(*own[0], **named))
        found[name] = _forward_backward(unit, own[0], named, [*tensors_of(own), *unit.parameters()], dy)
    return found


def _no_grad(unit: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> Callable[[], object]:
    def step() -> object:
        with torch.inference_mode():
            return unit(*args, **kwargs)

    return step


def _forward_backward(
    unit: nn.Module, args: list[Any], kwargs: dict[str, Any], leaves: list[Tensor], dy: Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(unit(*args, **kwargs), leaves, dy, allow_unused=True)


def times(
    pair: dict[str, nn.Module],
    names: list[str],
    x: Tensor,
    rounds: int,
    progress: Callable[[], object],
    *,
    training: bool,
) -> dict[str, dict[str, float]]:
    """Medians of every unit, by the network that it is in.

    Args:
        pair: the networks, by the name that the medians have; the first says what the units are called with.
        names: of the units.
        x: the images.
        rounds: that each median is of.
        progress: called after each.
        training: forward and backward in place of inference.
    """
    models = {key: copy.deepcopy(model).train(training) for key, model in pair.items()}
    first = next(iter(models.values()))
    given = arguments(first, names, lambda: first(x))
    found = {
        (key, name): step
        for key, model in models.items()
        for name, step in steps(model, given, training=training).items()
    }
    medians = measure.interleave(found, rounds=rounds, device=x.device, progress=progress)
    return {name: {key: medians[key, name].median_ms for key in models} for name in names}
