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
from dla_fast.swap.ida import FusedIDA, IDASpec, can_fuse, child, fused_unit, run_forced, run_ida, units, up_factor
from dla_fast.swap.nodes import FusedNode, class_reason
from dla_fast.swap.probe import Case, Shapes
from dla_fast.swap.reasons import class_name, unit_reason
from dla_fast.swap.units import channels_of
from dla_fast.swap.verify import TOLERANCE, compare, difference, isolated, random_copy, set_training

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


def _grids(module: nn.Module, spec: IDASpec) -> tuple[list[int], list[list[int]]] | str:
    """The channels of the layers, and sides of small ones that fit the ladder, or why there are none."""
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
    grids = []
    for side in range(2, 200):
        low = [
            side if f == 1 else next((h for h in range(1, side) if checks.upsampled(h, f) == side), 0) for f in factors
        ]
        if all(low):
            grids.append(low)
    return (channels, grids) if grids else f"up-convolutions by {factors} fit no size"


class _Run:
    """One call of a ladder on layers of its own: what came back, and what the list holds then."""

    def __init__(self, module: nn.Module, layers: Sequence[Tensor], call: Any) -> None:
        leaves = [x.clone() for x in layers]
        given = list(leaves)
        with torch.no_grad():
            self.result = call(module, given)
        self.same = self.result is given
        self.mutated = any(a is not b for a, b in zip(leaves, given, strict=True))
        self.tensors = {f"output {i}": t for i, t in enumerate([*self.flat(self.result), *given])}

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
        found = _grids(module, frame)
        if isinstance(found, str):
            return found
        return self._probe(module, replace(frame, backend=backend), *found)

    def _probe(self, module: nn.Module, frame: IDASpec, channels: list[int], grids: list[list[int]]) -> IDASpec | str:
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
                layers = [
                    torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * 2 - 1
                    for shape in _shapes(frame, channels, grids[1:] or grids)[0]
                    if shape is not None
                ]
                want = _Run(copy.deepcopy(base), layers, _original(frame))
                kind = want.kind()
                if kind is None:
                    return f"forward gives a {type(want.result).__name__}, expected (x, [y, ...]), a list or None"
                if kind == "layers" and want.same != want.mutated:
                    return "forward gives a list, and writes into the caller's another"
                for merge in merges:
                    spec = replace(frame, merge=merge, result=kind, mutates=want.mutated)
                    got = _Run(copy.deepcopy(base), layers, _fused(spec))
                    if difference(got.tensors, want.tensors, TOLERANCE[torch.float64]) is None:
                        return spec
        except Exception as error:  # whatever a foreign forward raises is a reason, not a failure of the swap
            return f"cannot be run on a copy: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return "forward gives something else than projecting, upsampling and merging layer by layer"

    def placement(self, module: nn.Module, spec: IDASpec) -> tuple[torch.device, torch.dtype]:
        parameter = next(module.parameters())
        return parameter.device, parameter.dtype

    def verify(self, module: nn.Module, spec: IDASpec) -> str | None:
        device, dtype = self.placement(module, spec)
        shapes = _shapes(spec, *cast("tuple[list[int], list[list[int]]]", _grids(module, spec)))
        cases = [Case(training, shapes[0]) for training in (False, True)]

        def fused(m: nn.Module, layers: Any, name: str) -> Any:
            return _fused(spec)(m, layers)

        def fits(m: nn.Module, layers: Any) -> bool:
            return can_fuse(m, spec, layers, int(spec.ranged), len(layers))

        weight = next(module.parameters())
        return compare(module, weight, cases, _original(spec), fused, spec.backend, shapes=shapes, fits=fits)

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


def _shapes(spec: IDASpec, channels: list[int], grids: list[list[int]]) -> list[Shapes]:
    """Layers that fit the ladder in several sizes, and fewer of them where it may be asked for fewer."""
    rows = [(2, grids[0], grids[0])]
    for n, h, w in ((1, 0, 1), (3, 1, 0), (1, 0, 0), (1, 2, 2), (1, 3, 1), (1, 0, 6), (1, 6, 0)):
        if max(h, w) < len(grids):
            rows.append((n, grids[h], grids[w]))
    made: list[Shapes] = []
    for n, high, wide in rows:
        layers = [(n, c, h, w) for c, h, w in zip(channels, high, wide, strict=True)]
        # A ladder that takes a range is given one more before them, which is none of its business.
        made.append([layers[0], *layers] if spec.ranged else layers)
    if spec.ranged:
        made += [made[0][: count + 1] for count in range(2, spec.layers)]
    return made
