"""Runs of convolution, batch norm and activation in an nn.Sequential: what it becomes, and how it is recognised.

A batch norm and an activation alone are a run too: what is behind a convolution that no kernel knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dla_fast.nn import stock
from dla_fast.nn.batch_norm import parameter
from dla_fast.nn.frozen import KEY
from dla_fast.ops import chain
from dla_fast.ops.ending import Ending
from dla_fast.reference.activation import ActSpec
from dla_fast.swap import verify
from dla_fast.swap.calls import fits, is_conv, run_deferred_on, run_tail_on, run_unit_on, undisturbed
from dla_fast.swap.found import find, keep, look, recall
from dla_fast.swap.nodes import FusedNode, class_reason
from dla_fast.swap.probe import Case
from dla_fast.swap.units import in_order, norm_channels, placed, tail_of


@dataclass(frozen=True)
class ConvsSpec:
    """What there is to know of a Sequential with runs: its children are looked at on every call.

    Attributes:
        backend: the backend its runs are forced to, or "auto" for whichever is in force.
    """

    backend: str


class Run(NamedTuple):
    """Children in a row that are one call.

    Attributes:
        conv: the convolution, None where the run begins with the norm.
        bn: the norm.
        act: "identity" where what follows the norm is none that kernels end with.
        length: how many children they are.
    """

    conv: nn.Module | None
    bn: nn.Module
    act: ActSpec
    length: int


def run_at(children: Sequence[nn.Module | None], i: int) -> Run | None:
    """The run that begins at child i."""
    first = children[i] if i < len(children) else None
    if first is None:
        return None
    conv = first if is_conv(first) else None
    at = i if conv is None else i + 1
    bn = children[at] if at < len(children) else None
    if bn is None:
        return None
    act = children[at + 1] if at + 1 < len(children) else None
    tail = None if act is None else tail_of(bn, act)
    count = at + 1 - i + (tail is not None)
    tail = tail or tail_of(bn, None)
    if tail is None or (conv is None and tail[1] == "identity"):
        return None
    if conv is not None and norm_channels(bn) != parameter(conv, "weight").shape[0]:
        return None
    return Run(conv, bn, tail[1], count)


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
            if run is not None and fits(x.z if isinstance(x, Ending) else x, run.conv, run.bn):
                i += run.length
                x = _run(self._dla_fast_spec.backend, run, x, run_at(children, i))
            else:
                x = cast(Any, children[i])(chain.form(x) if isinstance(x, Ending) else x)
                i += 1
        keep(self, found)
        return x

    def _dla_fast_units(self) -> Iterable[tuple[nn.Module | None, nn.Module | None]]:
        return [(run.conv, run.bn) for run, _ in _runs(self) if run.conv is not None]


def _run(name: str, run: Run, x: Any, behind: Run | None) -> Any:
    """The call of a run, on the backend that it is forced to, if any."""
    if run.conv is None:
        return run_tail_on(name, chain.form(x) if isinstance(x, Ending) else x, run.bn, run.act)
    # Between two units the map is nobody else's.
    call = run_unit_on if behind is None or behind.conv is None else run_deferred_on
    return call(name, [x], run.conv, run.bn, act=run.act)


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
        # A norm that activates as well has no name for that.
        if run is None or run.conv is None or stock.kind(run.bn) in stock.NORM_ACTS:
            return []
        units.append(names[i : i + run.length])
        i += run.length
    return units


class ConvsAdapter:
    """nn.Sequential with runs of Conv2d, BatchNorm2d and an activation, without the first or the last of them too.

    Also of its subclasses those that do not define another forward.
    """

    unit = "convs"
    kind = "conv"
    op = "conv_norm_act"
    node: type[FusedNode] = FusedConvs

    def resembles(self, module: nn.Module) -> bool:
        return in_order(module) and bool(_runs(module))

    def match(self, module: nn.Module, backend: str) -> ConvsSpec | str:
        reason = class_reason(module)
        if reason is not None:
            return reason
        for _, run in _runs(module):
            if len({t.device for t in [*run.parameters(), *run.buffers()]}) > 1:
                return "the parameters and buffers of a run lie on several devices"
        return ConvsSpec(backend)

    def placement(self, module: nn.Module, spec: ConvsSpec) -> tuple[torch.device, torch.dtype]:
        return placed(_runs(module)[0][1])

    def verify(self, module: nn.Module, spec: ConvsSpec) -> str | None:
        """Each run by itself: what else a Sequential holds is called as before."""

        def fused(run: nn.Module, xs: Sequence[Tensor], name: str) -> Tensor:
            return cast(Tensor, _run(name, cast(Run, run_at(list(run.children()), 0)), xs[0], None))

        for (conv, bn, _, _), run in _runs(module):
            shape = (
                (2, cast(int, norm_channels(bn)), 3, 4) if conv is None else verify.input_shape([cast(nn.Conv2d, conv)])
            )
            cases = [Case(training, [shape]) for training in (False, True)]
            device, dtype = placed(run)
            where = torch.empty(0, device=device, dtype=dtype)
            found = verify.compare(run, where, cases, lambda m, xs: m.forward(*xs), fused, spec.backend)
            if found is not None:
                return found
        return None

    def remark(self, module: nn.Module, spec: ConvsSpec) -> str:
        return ""

    def owned(self, module: nn.Module, spec: ConvsSpec) -> Iterable[nn.Module]:
        return ()


def _runs(module: nn.Module) -> list[tuple[Run, nn.Sequential]]:
    """The runs of a Sequential, each with the children of it."""
    children, found, i = list(module._modules.values()), [], 0
    while i < len(children):
        run = run_at(children, i)
        count = 1 if run is None else run.length
        if run is not None:
            found.append((run, nn.Sequential(*(cast(nn.Module, c) for c in children[i : i + count]))))
        i += count
    return found
