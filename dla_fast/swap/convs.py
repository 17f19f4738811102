"""Runs of convolution, batch norm and activation in an nn.Sequential: what it becomes, and how it is recognised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast.nn.frozen import KEY
from dla_fast.ops import chain
from dla_fast.ops.ending import Ending
from dla_fast.reference.activation import ActSpec
from dla_fast.swap import verify
from dla_fast.swap.calls import are_unit, fused_act, is_act, run_deferred_on, run_unit_on, undisturbed, unit_dtype
from dla_fast.swap.found import find, keep, look, recall
from dla_fast.swap.nodes import FusedNode, class_reason
from dla_fast.swap.probe import Case


@dataclass(frozen=True)
class ConvsSpec:
    """What there is to know of a Sequential with runs: its children are looked at on every call.

    Attributes:
        backend: the backend its runs are forced to, or "auto" for whichever is in force.
    """

    backend: str


def run_at(children: Sequence[nn.Module | None], i: int) -> tuple[nn.Conv2d, nn.BatchNorm2d, ActSpec, int] | None:
    """Convolution, norm and activation that begin at child i, and how many children they are; None for no run.

    The activation is "identity" where what follows the norm is none that kernels end with.
    """
    if i + 1 >= len(children) or not are_unit(children[i], children[i + 1]):
        return None
    conv, bn = cast(nn.Conv2d, children[i]), cast(nn.BatchNorm2d, children[i + 1])
    if conv.out_channels != bn.num_features:
        return None
    act = children[i + 2] if i + 2 < len(children) else None
    if act is not None and is_act(act):
        return conv, bn, cast(ActSpec, fused_act(act)), 3
    return conv, bn, "identity", 2


class FusedConvs(FusedNode):
    """A Sequential whose runs of convolution, norm and activation go through :func:`dla_fast.functional.conv_norm_act`.

    Its other children are called as they are, in order, and so are those of a run where the call is not one that the
    fused path answers as they do: hooks or parametrizations, another norm, inputs of another dtype. Under export,
    tracing and global module hooks all of them are.
    """

    def forward(self, input: Any) -> Any:
        y = _recall(self, input)
        if y is not None:
            return y
        if not undisturbed():
            return super().forward(input)
        found = look(self, _names(self), self._dla_fast_spec.backend)
        children, x, i = list(self._modules.values()), input, 0
        while i < len(children):
            run = run_at(children, i)
            if run is not None and unit_dtype((x.z if isinstance(x, Ending) else x,), run[0], run[1]) is not None:
                conv, bn, act, count = run
                i += count
                # Between two runs the map is nobody else's.
                call = run_unit_on if run_at(children, i) is None else run_deferred_on
                x = call(self._dla_fast_spec.backend, [x], conv, bn, act=act)
            else:
                x = cast(Any, children[i])(chain.form(x) if isinstance(x, Ending) else x)
                i += 1
        keep(self, found)
        return x

    def _dla_fast_units(self) -> Iterable[tuple[nn.Module | None, nn.Module | None]]:
        return [(conv, bn) for conv, bn, _ in _runs(self)]


def _recall(module: nn.Module, x: Any) -> Tensor | None:
    """The output of a Sequential that was nothing but runs in a call before, frozen; None where anything differs."""
    found = find(module, next(iter(module._modules), ""))
    return None if found is None else recall(module, found, [x])


def _names(module: nn.Module) -> list[Sequence[str]]:
    """Names of the children of each run, where there are no others; and none where nothing is frozen."""
    names, children = list(module._modules), list(module._modules.values())
    if not children or children[0] is None or KEY not in children[0].__dict__:
        return []
    units: list[Sequence[str]] = []
    i = 0
    while i < len(children):
        run = run_at(children, i)
        if run is None:
            return []
        units.append(names[i : i + run[3]])
        i += run[3]
    return units


class ConvsAdapter:
    """nn.Sequential with runs of Conv2d, BatchNorm2d and, where there is one, an activation.

    Also of its subclasses those that do not define another forward.
    """

    unit = "convs"
    kind = "conv"
    op = "conv_norm_act"
    node: type[FusedNode] = FusedConvs

    def resembles(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Sequential):
            return False
        kind = type(module)
        plain = kind.forward is nn.Sequential.forward and kind.__iter__ is nn.Sequential.__iter__
        return plain and bool(_runs(module))

    def match(self, module: nn.Module, backend: str) -> ConvsSpec | str:
        reason = class_reason(module)
        if reason is not None:
            return reason
        for conv, bn, _ in _runs(module):
            if len({t.device for t in [*conv.parameters(), *bn.parameters(), *bn.buffers()]}) > 1:
                return "the parameters and buffers of a run lie on several devices"
        return ConvsSpec(backend)

    def placement(self, module: nn.Module, spec: ConvsSpec) -> tuple[torch.device, torch.dtype]:
        weight = _runs(module)[0][0].weight
        return weight.device, weight.dtype

    def verify(self, module: nn.Module, spec: ConvsSpec) -> str | None:
        """Each run by itself: what else a Sequential holds is called as before."""

        def fused(run: nn.Module, xs: Sequence[Tensor], name: str) -> Tensor:
            conv, bn, act, _ = cast(Any, run_at(list(run.children()), 0))
            return run_unit_on(name, xs, conv, bn, act=act)

        for conv, bn, act in _runs(module):
            run = nn.Sequential(conv, bn, *([] if act is None else [act]))
            shape = verify.input_shape([conv])
            cases = [Case(training, [shape]) for training in (False, True)]
            found = verify.compare(run, conv.weight, cases, lambda m, xs: m.forward(*xs), fused, spec.backend)
            if found is not None:
                return found
        return None

    def owned(self, module: nn.Module, spec: ConvsSpec) -> Iterable[nn.Module]:
        return ()


def _runs(module: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, nn.Module | None]]:
    children, found, i = list(module._modules.values()), [], 0
    while i < len(children):
        run = run_at(children, i)
        if run is not None:
            found.append((run[0], run[1], children[i + 2] if run[3] == 3 else None))
        i += 1 if run is None else run[3]
    return found
