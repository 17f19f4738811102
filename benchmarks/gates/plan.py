"""What is predicted: nodes and passes of the networks at the sizes that a GPU is measured at, drawn on meta tensors.

A pass is a list of launches, and of what the host functions give to the library, in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gates.passes import FUSED_BYTES, Unit, work_of
from benchmarks.gpu.draw import as_cudnn
from dla_fast.bench import Case, ida_cases, network_cases
from dla_fast.kernels import config, launch, library

# Images of the maps whose passes are predicted alone: what block "bandwidth" of a run on a GPU measures.
_MANY = 2048
_aten = torch.ops.aten


@dataclass(frozen=True)
class LibraryCall:
    """What the library is asked for.

    Attributes:
        name: for people.
        bytes: of its tensors.
        flops: operations.
        channels: a 3 x 3 convolution's outputs; 0 for anything else.
    """

    name: str
    bytes: float
    flops: float
    channels: int = 0


Step = launch.Launch | LibraryCall


@dataclass(frozen=True)
class Work:
    """A pass of an op that is predicted.

    Attributes:
        unit: the op at its size.
        mode: of :func:`benchmarks.gates.passes.work_of`.
        kind: of its line, see :mod:`benchmarks.gates.lines`: ``"forward"``, ``"backward"``, ``"inference"``,
            ``"merge"``, ``"maps"`` for passes whose kernels alone have a line.
    """

    unit: Unit
    mode: str
    kind: str

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.unit.case.name} {self.unit.label} {self.unit.layout} {self.kind}"


def _bytes(*tensors: Any) -> float:
    return float(sum(t.numel() * t.itemsize for t in tensors if isinstance(t, Tensor)))


class _Noting(TorchDispatchMode):
    """Puts what ATen does to maps among the launches."""

    def __init__(self, steps: list[Any]) -> None:
        super().__init__()
        self.steps = steps

    def note(self, name: str, bytes_: float, flops: float = 0.0, channels: int = 0) -> None:
        self.steps.append(LibraryCall(name, bytes_, flops, channels))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (_aten.mm.default, _aten.mm.out):
            a, b = args[:2]
            self.note("product", _bytes(a, b, result), 2.0 * a.shape[0] * a.shape[1] * b.shape[1])
        elif func is _aten.convolution.default:
            x, weight = args[:2]
            result = as_cudnn(x, weight, result)
            channels = weight.shape[0] if weight.shape[2] > 1 else 0
            self.note("convolution", _bytes(x, weight, result), 2.0 * result.numel() * weight[0].numel(), channels)
        elif func is _aten.convolution_backward.default:
            dy, x, weight, *_, wanted = args
            result = as_cudnn(x, weight, result)
            for name, made, read, asked in zip(("dx", "dW"), result, (weight, x), wanted, strict=False):
                if asked:
                    flops = 2.0 * dy.numel() * weight[0].numel()
                    self.note(f"convolution's {name}", _bytes(dy, read, made), flops)
        elif func is _aten.cat.default:
            self.note("cat", 2 * _bytes(result))
        elif func in (_aten.add_.Tensor, _aten.copy_.default):
            self.note(func._schema.name.partition("::")[2], _bytes(args[0]) * 2 + _bytes(args[1]))
        return result


def _product_into_float(a: Tensor, b: Tensor) -> Tensor:
    """On meta as on a GPU: one product of halves."""
    return torch.mm(a, b).to(torch.float32)


@contextlib.contextmanager
def _as_gpu(arch: int) -> Iterator[None]:
    """Meta tensors stand for a GPU's."""
    device, wide = library.DEVICE, getattr(library, "_wide_product", None)
    try:
        library.DEVICE = "meta"
        if wide is not None:
            library._wide_product = _product_into_float
        with config.assume(arch):
            yield
    finally:
        library.DEVICE = device
        if wide is not None:
            library._wide_product = wide


def steps_of(call: Callable[[], object], arch: int = 90) -> list[Step]:
    """The launches of host functions on meta tensors, and what they ask of the library, in order."""
    with _as_gpu(arch), launch.record() as launches, _Noting(launches):
        call()
    return list(launches)


def steps(work: Work, arch: int = 90) -> list[Step]:
    """The launches of a pass, and what it asks of the library, in order."""
    return steps_of(work_of(work.unit, work.mode, work.unit.sizes, "meta"), arch)


def floor_of(work: Work) -> tuple[float, float]:
    """(bytes, operations) that a pass cannot do without, whichever kernels do it (CONTRIBUTING, the traffic gate)."""
    unit, case = work.unit, work.unit.case
    n, k = case.out_channels * unit.pixels, sum(case.in_channels) * unit.pixels
    low = case.in_channels[-1] * unit.pixels // case.factor**2
    again = n if case.residual else 0
    flops = 2.0 * k * case.out_channels * case.kernel**2 if case.op in ("aggregate", "merge") else 0.0
    if case.op in ("upsample", "upsample_add"):
        skip = n if case.op == "upsample_add" else 0
        values = 2 * low + n if work.mode == "backward" else low + n + skip
    elif case.op == "batch_norm_act":
        values = 5 * n + 3 * again if work.mode == "backward" else 3 * n + again
    elif work.mode == "inference":
        values = k + n
    elif work.mode == "forward":
        values = k + 3 * n + again
    else:
        together = case.out_channels * sum(case.in_channels) * 4 <= FUSED_BYTES
        values = 2 * n + again + (2 * n if together else 4 * n + again) + 2 * k
        flops *= 2
    return float(values * unit.dtype.itemsize), flops


def _unit(case: Case, batch: int, layout: str) -> Unit:
    return Unit(case, batch, torch.bfloat16, layout)


def works() -> list[Work]:
    """Everything that is predicted, alike ones once."""
    found: list[Work] = []
    roots: dict[Any, Case] = {}
    for case in network_cases("dla34", 224):
        roots.setdefault((case.in_channels, case.out_channels, case.height), case)
    for layout in ("channels_last", "contiguous"):
        for case in roots.values():
            if layout == "channels_last" or case.height <= 14:
                found += [Work(_unit(case, 256, layout), m, m) for m in ("inference", "forward", "backward")]
        for op in ("batch_norm_act", "upsample", "upsample_add"):
            modes = ("forward",) if op == "upsample_add" else ("forward", "backward")
            case = Case("maps", (64,), 64, 32, 32, op=op, factor=1 if op == "batch_norm_act" else 2)
            found += [Work(_unit(case, _MANY, layout), mode, "maps") for mode in modes]
    merges: dict[Any, Case] = {}
    for case in ida_cases((64, 128, 256, 512), name="dla34up"):
        if case.op == "merge" and case.kernel == 3:
            merges.setdefault((case.in_channels, case.out_channels, case.height, case.factor), case)
    found += [Work(_unit(case, 16, "channels_last"), "inference", "merge") for case in merges.values()]
    return found
