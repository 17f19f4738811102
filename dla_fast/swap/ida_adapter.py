"""Recognising IDA ladders by structure, and finding out by running how each treats the caller's list."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast import backend as backends
from dla_fast import checks
from dla_fast.nn import stock
from dla_fast.swap.ida import FusedIDA, IDASpec, child, fused_unit, run_forced, run_ida, units, up_factor
from dla_fast.swap.nodes import FusedNode, class_reason
from dla_fast.swap.reasons import class_name, unit_reason
from dla_fast.swap.units import channels_of
from dla_fast.swap.verify import TOLERANCE, difference, isolated, random_copy, set_training

_LISTS = ("projs", "ups", "nodes")


def _numbered(module: nn.Module, kind: str) -> list[int]:
    """The i of children ``kind_i``."""
    found = []
    for name in module._modules:
        head, _, tail = name.rpartition("_")
        if head == kind and tail.isdigit():
            found.append(int(tail))
    return sorted(found)


def _convention(forward: Any) -> bool | None:
    """Whether a forward takes (layers, start, end), False for (layers), None for neither."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind in positional]
    if len(needed) != len(parameters) or len(needed) not in (1, 3):
        return None
    return len(needed) == 3


def _frame(module: nn.Module) -> IDASpec | str:
    """What the structure alone tells; merge, result and mutation are still open."""
    lists = all(isinstance(module._modules.get(name), nn.ModuleList) for name in _LISTS)
    ranged = _convention(type(module).forward)
    if ranged is None:
        return "forward takes neither (layers) nor (layers, start, end)"
    if lists:
        projs, ups, nodes = (len(cast(nn.ModuleList, module._modules[name])) for name in _LISTS)
        if nodes < 1 or projs != ups or projs - nodes not in (0, 1):
            return f"has {projs} projs, {ups} ups and {nodes} nodes"
        return IDASpec(True, nodes + 1, projs > nodes, "", ranged, "", False, "")
    nodes_, projs_, ups_ = (_numbered(module, kind) for kind in ("node", "proj", "up"))
    if not nodes_ or nodes_ != list(range(1, len(nodes_) + 1)):
        return f"nodes are numbered {nodes_}, expected 1 and on"
    first = 0 in projs_
    if projs_ != ups_ or projs_ != list(range(0 if first else 1, len(nodes_) + 1)):
        return f"projections are numbered {projs_} and up-convolutions {ups_}, nodes {nodes_}"
    return IDASpec(False, len(nodes_) + 1, first, "", ranged, "", False, "")


def _node(module: nn.Module, spec: IDASpec) -> tuple[int, int] | str:
    """Channels that the first node takes and gives, or why they are not known."""
    node = cast(nn.Module, child(module, spec, "node", 1))
    return channels_of(node) or f"node_1: {class_name(node)} cannot be run on a small map"


def _sizes(module: nn.Module, spec: IDASpec) -> list[tuple[int, int]] | str:
    """Channels and side of small layers that fit the ladder, or why there are none."""
    node = _node(module, spec)
    if isinstance(node, str):
        return node
    _, width = node
    channels, factors = [], []
    for i in range(spec.layers):
        proj, up = child(module, spec, "proj", i), child(module, spec, "up", i)
        given = i > 0 or spec.first
        c = width
        if given and proj is not None and stock.kind(proj) != "identity":
            found = channels_of(proj)
            if found is None:
                return f"proj_{i}: {class_name(proj)} cannot be run on a small map"
            c = found[0]
        factor = up_factor(up) if given else 1
        if factor is None:
            return f"up_{i}: not a depthwise transposed convolution of stride f, kernel 2f and padding f // 2"
        channels.append(c)
        factors.append(factor)
    for side in range(4, 200):
        low = [
            side if f == 1 else next((h for h in range(1, side) if checks.upsampled(h, f) == side), 0) for f in factors
        ]
        if all(low):
            return list(zip(channels, low, strict=True))
    return f"up-convolutions by {factors} fit no size"


class _Run:
    """One call of a ladder on layers of its own: what came back, what the list holds then, and the gradients."""

    def __init__(self, module: nn.Module, layers: Sequence[Tensor], call: Any, gradients: bool) -> None:
        leaves = [x.clone().requires_grad_(gradients) for x in layers]
        given = list(leaves)
        self.result = call(module, given)
        self.list = given
        self.same = self.result is given
        self.mutated = any(a is not b for a, b in zip(leaves, given, strict=True))
        tensors = [*self.flat(self.result), *given]
        self.tensors = {f"output {i}": t.detach() for i, t in enumerate(tensors)}
        if gradients:
            names, parameters = zip(*module.named_parameters(), strict=True)
            loss = torch.stack([(t * (i + 1)).square().mean() for i, t in enumerate(tensors)]).sum()
            grads = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
            wanted = [*(f"layer {i}" for i in range(len(layers))), *names]
            for name, grad in zip(wanted, grads, strict=True):
                self.tensors[f"gradients of {name}"] = torch.zeros(0) if grad is None else grad
        self.tensors |= {f"values of {name} after the call": b.detach() for name, b in module.named_buffers()}

    @staticmethod
    def flat(result: Any) -> list[Tensor]:
        """The tensors of a result: (x, [y, ...]), a list, or nothing."""
        if isinstance(result, (list, tuple)):
            return [t for item in result for t in _Run.flat(item)]
        return [] if result is None else [result]

    def kind(self) -> str | None:
        """How the result is named in :class:`IDASpec`, None for none of those."""
        if self.result is None:
            return "none"
        if isinstance(self.result, tuple) and len(self.result) == 2 and isinstance(self.result[1], list):
            return "pair"
        return "layers" if isinstance(self.result, list) else None


class IDAAdapter:
    """``IDAUp`` of Deep Layer Aggregation networks in the forms it has in detectors and segmenters.

    Children ``proj_i``, ``up_i``, ``node_i`` or ModuleLists ``projs``, ``ups``, ``nodes``; ``forward(layers)`` or
    ``forward(layers, start, end)``; nodes that concatenate or add. What it gives back and whether it writes into the
    caller's list is found out by running it on a copy with small layers, whatever ``verify`` says.
    """

    unit = "ladders"
    kind = "merge"
    op = "merge"
    node: type[FusedNode] = FusedIDA

    def resembles(self, module: nn.Module) -> bool:
        if all(name in module._modules for name in _LISTS):
            return True
        return bool(_numbered(module, "node")) and bool(_numbered(module, "up"))

    def match(self, module: nn.Module, backend: str) -> IDASpec | str:
        reason = class_reason(module)
        if reason is not None:
            return reason
        frame = _frame(module)
        if isinstance(frame, str):
            return frame
        layers = _sizes(module, frame)
        if isinstance(layers, str):
            return layers
        return self._probe(module, replace(frame, backend=backend), layers)

    def _probe(self, module: nn.Module, frame: IDASpec, sizes: list[tuple[int, int]]) -> IDASpec | str:
        """The specification whose loop gives what the original gives, in float64 on the reference."""
        taken, width = cast("tuple[int, int]", _node(module, frame))
        merges = ("add",) if taken == width else ("concat", "concat_reversed")
        if taken not in (width, 2 * width):
            return f"node_1: takes {taken} channels, expected {width} (added) or {2 * width} (concatenated)"
        try:
            with isolated(torch.device("cpu")), backends.use_backend("reference"):
                generator = torch.Generator().manual_seed(0)
                base = random_copy(module, torch.device("cpu"), torch.float64, generator)
                set_training(base, False)
                layers = _layers(frame, sizes, 1, torch.float64, generator)
                want = _Run(copy.deepcopy(base), layers, _original(frame), gradients=False)
                kind = want.kind()
                if kind is None:
                    return f"forward gives a {type(want.result).__name__}, expected (x, [y, ...]), a list or None"
                if kind == "layers" and want.same != want.mutated:
                    return "forward gives a list, and writes into the caller's another"
                for merge in merges:
                    spec = replace(frame, merge=merge, result=kind, mutates=want.mutated)
                    got = _Run(copy.deepcopy(base), layers, _fused(spec), gradients=False)
                    if difference(got.tensors, want.tensors, TOLERANCE[torch.float64]) is None:
                        return spec
        except Exception as error:  # whatever a foreign forward raises is a reason, not a failure of the swap
            return f"cannot be run on a copy: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return "forward gives something else than projecting, upsampling and merging layer by layer"

    def placement(self, module: nn.Module, spec: IDASpec) -> tuple[torch.device, torch.dtype]:
        parameter = next(module.parameters())
        return parameter.device, parameter.dtype

    def verify(self, module: nn.Module, spec: IDASpec) -> str | None:
        sizes = cast("list[tuple[int, int]]", _sizes(module, spec))
        device, dtype = self.placement(module, spec)
        generator = torch.Generator().manual_seed(0)

        def compare(where: torch.device, kind: torch.dtype, exact: bool) -> str | None:
            base = random_copy(module, where, kind if exact else None, generator)
            for training in (False, True):
                layers = [x.to(where) for x in _layers(spec, sizes, 2, kind, generator)]
                runs = []
                for call in (_original(spec), _fused(spec)):
                    probe = copy.deepcopy(base)
                    set_training(probe, training)
                    with torch.set_grad_enabled(exact or training):
                        runs.append(_Run(probe, layers, call, exact))
                found = difference(runs[1].tensors, runs[0].tensors, TOLERANCE[kind])
                if found is not None:
                    return f"{found} in {'training' if training else 'evaluation'} mode"
            return None

        try:
            with isolated(device):
                with backends.use_backend("reference"):
                    found = compare(torch.device("cpu"), torch.float64, exact=True)
                if found is None and device.type != "meta":
                    found = compare(device, dtype, exact=False)
        except Exception as error:  # as above
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return found

    def owned(self, module: nn.Module, spec: IDASpec) -> Iterable[nn.Module]:
        for _, unit in units(module, spec):
            found = fused_unit(unit)
            if found is not None and found.whole:
                yield from unit.modules()
            elif found is not None:
                # What convolves is called as it is, and may be swapped by itself.
                inside = {id(m) for m in found.conv.modules()}
                yield from (m for m in unit.modules() if id(m) not in inside)

    def remark(self, module: nn.Module, spec: IDASpec) -> str:
        """How many of its units are fused, where not all are, and why."""
        told, whole, count = [], 0, 0
        for name, unit in units(module, spec):
            count += 1
            found = fused_unit(unit)
            if found is not None and found.whole:
                whole += 1
                continue
            reason = unit_reason(unit, found)
            told.append((name, reason))
        if not told:
            return ""
        named: dict[str, list[str]] = {}
        for name, reason in told:
            named.setdefault(reason, []).append(name)
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in named.items())
        return f"{whole} of {count} units fused whole; {why}"


def _layers(
    spec: IDASpec, sizes: list[tuple[int, int]], batch: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    """Random layers; for a ladder that takes a range one more before them, which is none of its business."""
    outside = sizes[:1] if spec.ranged else []
    return [torch.rand((batch, c, s, s), generator=generator, dtype=dtype) * 2 - 1 for c, s in [*outside, *sizes]]


def _original(spec: IDASpec) -> Any:
    def call(module: nn.Module, layers: list[Tensor]) -> Any:
        return module.forward(layers, 1, len(layers)) if spec.ranged else module.forward(layers)

    return call


def _fused(spec: IDASpec) -> Any:
    def call(module: nn.Module, layers: list[Tensor]) -> Any:
        # What the structure says is compared on the reference, whichever backend the ladder is forced to.
        run = run_ida if backends.selected() == "reference" else run_forced
        return run(module, spec, layers, int(spec.ranged), len(layers))

    return call
