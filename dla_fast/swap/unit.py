"""Units that are modules of their own: a class with convolution, norm and activation, as code bases write it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast.nn import stock
from dla_fast.swap import verify
from dla_fast.swap.calls import fits, run_tail_on, run_unit_on, undisturbed
from dla_fast.swap.nodes import FusedNode, class_reason
from dla_fast.swap.probe import Case
from dla_fast.swap.reasons import unit_reason
from dla_fast.swap.units import Unit, in_channels, is_sequential, parts_of, placed, shapes, unit_of


@dataclass(frozen=True)
class UnitSpec:
    """What there is to know of a unit: its children are looked at on every call.

    Attributes:
        backend: the backend it is forced to, or "auto" for whichever is in force.
    """

    backend: str


class FusedUnit(FusedNode):
    """A unit of one input that runs through :func:`dla_fast.functional.conv_norm_act`.

    Of one whose convolution no kernel knows the norm and the activation are fused. Every call first finds the parts as
    they are now, without hooks or parametrizations, for plain tensors of one dtype; else it runs the original forward,
    as it does under export, tracing and global module hooks.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = parts_of(self) if len(args) == 1 and not kwargs and undisturbed() else None
        if found is None or not _fits(found, args[0]):
            return super().forward(*args, **kwargs)
        return run_found(self._dla_fast_spec.backend, found, args[0])

    def _dla_fast_units(self) -> Iterable[tuple[nn.Module | None, nn.Module | None]]:
        found = parts_of(self)
        return [(found.conv, found.bn)] if found is not None and found.whole else []


def _fits(found: Unit, x: Any) -> bool:
    return fits(x, found.conv if found.whole else None, found.bn)


def run_found(name: str, found: Unit, x: Tensor) -> Tensor:
    """The fused call, on the backend that a module is forced to, if any."""
    if found.whole:
        return run_unit_on(name, [x], found.conv, found.bn, act=found.act)
    return run_tail_on(name, cast(Tensor, found.conv(x)), found.bn, found.act)


class UnitAdapter:
    """A module whose forward was found to be ``act(norm(conv(x)))`` of its children, or of itself and its norm.

    timm's ConvNormAct, mmcv's ConvModule, YOLO's Conv, detectron2's Conv2d: see :func:`dla_fast.swap.units.unit_of`.
    What only looks like one is not listed.
    """

    unit = "convs"
    kind = "conv"
    op = "conv_norm_act"
    node: type[FusedNode] = FusedUnit

    def resembles(self, module: nn.Module) -> bool:
        if isinstance(module, nn.Sequential) or is_sequential(module):
            return False
        found = unit_of(module)
        return found is not None and (found.whole or found.act != "identity")

    def match(self, module: nn.Module, backend: str) -> UnitSpec | str:
        if stock.kind(module) not in (*stock.UNITS, "conv_norm"):
            return "forward gives something else than its convolution, norm and activation"
        if len({t.device for t in [*module.parameters(), *module.buffers()]}) > 1:
            return "its parameters and buffers lie on several devices"
        return class_reason(module) or UnitSpec(backend)

    def placement(self, module: nn.Module, spec: UnitSpec) -> tuple[torch.device, torch.dtype]:
        return placed(module)

    def verify(self, module: nn.Module, spec: UnitSpec) -> str | None:
        def fused(m: nn.Module, xs: Sequence[Tensor], name: str) -> Tensor:
            return run_found(name, cast(Unit, unit_of(m)), xs[0])

        first, *more = shapes(module, cast(int, in_channels(module)))
        cases = [Case(training, [first]) for training in (False, True)]
        device, dtype = self.placement(module, spec)
        where = torch.empty(0, device=device, dtype=dtype)
        return verify.compare(
            module, where, cases, lambda m, xs: m.forward(*xs), fused, spec.backend,
            shapes=[[shape] for shape in more], fits=lambda m, xs: _fits(cast(Unit, unit_of(m)), xs[0]),
        )  # fmt: skip

    def remark(self, module: nn.Module, spec: UnitSpec) -> str:
        found = cast(Unit, unit_of(module))
        return "" if found.whole else unit_reason(module, found)

    def owned(self, module: nn.Module, spec: UnitSpec) -> Iterable[nn.Module]:
        found = cast(Unit, unit_of(module))
        inside = set() if found.whole else {id(m) for m in found.conv.modules()}
        return [m for m in module.modules() if m is not module and id(m) not in inside]
