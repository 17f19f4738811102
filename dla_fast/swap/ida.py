"""What a swapped IDA ladder becomes: its own loop over the layers, with every step fused that can be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast import backend, functional
from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_observed
from dla_fast.nn.batch_norm_act import run_batch_norm_act
from dla_fast.nn.unit import run_unit
from dla_fast.swap.calls import PLAIN, norm_fits, undisturbed
from dla_fast.swap.nodes import FusedNode
from dla_fast.swap.units import Unit, unit_of

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class IDASpec:
    """What swapping found out about a ladder.

    Attributes:
        lists: children are ModuleLists ``projs``, ``ups`` and ``nodes``, else ``proj_i``, ``up_i`` and ``node_i``.
        layers: how many layers there are.
        first: the first layer is projected and upsampled too.
        merge: "concat" (what is aggregated so far comes first), "concat_reversed" or "add".
        ranged: forward takes (layers, start, end), else (layers).
        result: "pair" for (last, every node's output), "layers" for the list, "none".
        mutates: the caller's list is written.
        backend: the backend this ladder is forced to, or "auto" for whichever is in force.
    """

    lists: bool
    layers: int
    first: bool
    merge: str
    ranged: bool
    result: str
    mutates: bool
    backend: str


def child(module: nn.Module, spec: IDASpec, kind: str, i: int) -> nn.Module | None:
    """Child "proj", "up" or "node" of layer i, None where there is none."""
    if not spec.lists:
        return module._modules.get(f"{kind}_{i}")
    held = module._modules.get(f"{kind}s")
    at = i if spec.first and kind != "node" else i - 1
    return held[at] if isinstance(held, nn.ModuleList) and 0 <= at < len(held) else None


def units(module: nn.Module, spec: IDASpec) -> list[tuple[str, nn.Module]]:
    """Projections and nodes, by names as of children ``proj_i`` and ``node_i``."""
    found = [(f"{kind}_{i}", child(module, spec, kind, i)) for kind in ("proj", "node") for i in range(spec.layers)]
    return [(name, unit) for name, unit in found if unit is not None and stock.kind(unit) != "identity"]


def up_factor(up: nn.Module | None) -> int | None:
    """The factor of a depthwise transposed convolution as IDA has it, 1 for an identity, None for anything else."""
    kind = "" if up is None else stock.kind(up)
    if kind != "transposed":
        return 1 if kind == "identity" else None
    assert isinstance(up, nn.ConvTranspose2d)
    f = up.stride[0]
    fits = (
        f >= 2
        and up.stride == (f, f)
        and up.kernel_size == (2 * f, 2 * f)
        and up.padding == (f // 2, f // 2)
        and up.output_padding == (0, 0)
        and up.dilation == (1, 1)
        and up.groups == up.in_channels == up.out_channels
        and up.bias is None
    )
    return f if fits else None


def fused_unit(unit: nn.Module) -> Unit | None:
    """The parts of a projection or node that are fused: all three, or what is behind an unknown convolution."""
    found = unit_of(unit)
    return None if found is None or (not found.whole and found.act == "identity") else found


def run_child(unit: nn.Module, xs: list[Tensor], upsample: list[tuple[Tensor, int] | None] | None = None) -> Tensor:
    """A projection or node on its inputs: fused, or with the norm and activation alone fused, or as it is."""
    if stock.kind(unit) == "identity" and not is_observed(unit):
        return xs[0]
    found = fused_unit(unit)
    if found is not None and not norm_fits(found.bn, _computing_dtype(xs[0])):
        found = None
    if found is not None and found.whole:
        return run_unit(xs, found.conv, found.bn, act=found.act, upsample=upsample)
    if upsample is not None:
        xs = [x if up is None else functional.upsample(x, *up) for x, up in zip(xs, upsample, strict=True)]
    x = xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    return cast(Tensor, unit(x)) if found is None else run_batch_norm_act(found.conv(x), found.bn, act=found.act)


def _computing_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _step(module: nn.Module, spec: IDASpec, i: int, before: Tensor, layer: Tensor) -> Tensor:
    """Project layer i, bring it up, and merge it into what was before."""
    proj, up, node = (cast(nn.Module, child(module, spec, kind, i)) for kind in ("proj", "up", "node"))
    low = run_child(proj, [layer])
    factor = None if is_observed(up) else up_factor(up)
    if factor is None:
        low, factor = up(low), 1
    weight = cast(Tensor, up.weight) if factor > 1 else None
    if spec.merge == "add":
        both = low + before if weight is None else functional.upsample_add(low, before, weight, factor)
        return run_child(node, [both])
    xs, ups = [before, low], [None, None if weight is None else (weight, factor)]
    if spec.merge == "concat_reversed":
        xs, ups = xs[::-1], ups[::-1]
    return run_child(node, xs, None if weight is None else ups)


def run_ida(module: nn.Module, spec: IDASpec, layers: Any, start: int, end: int) -> Any:
    """The ladder over ``layers[start:end]``, with the original's treatment of the caller's list."""
    work = layers if spec.mutates else list(layers)
    if spec.first:
        x = run_child(cast(nn.Module, child(module, spec, "proj", 0)), [work[start]])
        up = cast(nn.Module, child(module, spec, "up", 0))
        factor = None if is_observed(up) else up_factor(up)
        if factor is None:
            x = up(x)
        elif factor > 1:
            x = functional.upsample(x, cast(Tensor, up.weight), factor)
        work[start] = x
    outputs = []
    for i in range(1, end - start):
        work[start + i] = _step(module, spec, i, work[start + i - 1], work[start + i])
        outputs.append(work[start + i])
    if spec.result == "pair":
        return outputs[-1], outputs
    return work if spec.result == "layers" else None


def _dtypes_agree(module: nn.Module, xs: Sequence[Tensor]) -> bool:
    """Whether eager, too, would compute in one dtype throughout: autocast's, or that of inputs and parameters."""
    dtype, device = xs[0].dtype, xs[0].device.type
    if any(type(x) not in PLAIN or x.dim() != 4 or x.is_meta for x in xs):
        return False
    if torch.is_autocast_enabled(device):
        # Whatever the layers are, convolutions cast them.
        return all(x.dtype in (torch.float32, *_HALF) for x in xs)
    if any(x.dtype != dtype for x in xs):
        return False
    for name, p in module.named_parameters():
        in_norm = p.dim() == 1 and dtype in _HALF and p.dtype == torch.float32
        if type(p) not in PLAIN or (p.dtype != dtype and not in_norm) or name.endswith("original"):
            return False
    return True


def _norms_differ(module: nn.Module) -> bool:
    """Whether each norm is called once: with one that several steps share the order of its batches would matter."""
    norms = _with_buffers(module, [])
    # By numbers (id) torch.compile would make a graph for every copy of a ladder.
    return all(norm is not other for i, norm in enumerate(norms) for other in norms[:i])


def _with_buffers(module: nn.Module, found: list[nn.Module]) -> list[nn.Module]:
    """Every module below one that has buffers, as often as it is there; named_modules takes three times as long."""
    for below in module._modules.values():
        if below is not None:
            if below._buffers:
                found.append(below)
            if below._modules:
                _with_buffers(below, found)
    return found


class FusedIDA(FusedNode):
    """An IDA ladder whose steps run through :mod:`dla_fast.functional`.

    Every call first checks that the children are there and the call is one that the loop answers as the original: a
    list of as many plain tensors of one dtype, no export or tracing in progress, no global module hooks. Of a step,
    what is not as expected (another norm, hooks on a child, an unknown convolution) runs as it is.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        spec = self._dla_fast_spec
        bounds = (args[1], args[2]) if spec.ranged and len(args) == 3 else None
        if not spec.ranged and len(args) == 1 and isinstance(args[0], (list, tuple)):
            bounds = (0, len(args[0]))
        if kwargs or bounds is None or not can_fuse(self, spec, args[0], *bounds):
            return super().forward(*args, **kwargs)
        return run_forced(self, spec, args[0], *bounds)

    def _dla_fast_units(self) -> Iterable[tuple[nn.Module | None, nn.Module | None]]:
        spec = self._dla_fast_spec
        found = [unit_of(unit) for _, unit in units(self, spec)]
        return [(unit.conv, unit.bn) for unit in found if unit is not None and unit.whole]


def can_fuse(module: nn.Module, spec: IDASpec, layers: Any, start: Any, end: Any) -> bool:
    """Whether the module still is what was swapped, and the call one that the fused loop answers as the original."""
    if (
        not isinstance(layers, list if spec.mutates else (list, tuple))
        or type(start) is not int
        or type(end) is not int
    ):
        return False
    count = end - start
    # A ranged ladder may be asked for fewer layers than it has.
    if start < 0 or end > len(layers) or count > spec.layers or count < (2 if spec.ranged else spec.layers):
        return False
    if not undisturbed():
        return False
    for i in range(1, count):
        if any(child(module, spec, kind, i) is None for kind in ("proj", "up", "node")):
            return False
    xs = layers[start:end]
    return all(isinstance(x, Tensor) for x in xs) and _dtypes_agree(module, xs) and _norms_differ(module)


def run_forced(module: nn.Module, spec: IDASpec, layers: Any, start: int, end: int) -> Any:
    """The fused loop on the backend the ladder is forced to, if any."""
    if spec.backend in ("auto", backend.selected()):
        return run_ida(module, spec, layers, start, end)
    with backend.use_backend(spec.backend):
        return run_ida(module, spec, layers, start, end)
