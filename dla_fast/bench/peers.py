"""Who is compared: dla_fast and every way there is to run the same op without it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dla_fast import backend, functional, reference
from dla_fast.bench import alone, eager, exported
from dla_fast.bench.cases import Case
from dla_fast.proof import parity

FUSED = "dla_fast"
# This package's other ways to serve a network: the stock network after ``swap_``, that after ``freeze_`` too, and its
# own network with ``memory="low"``.
SWAPPED = f"{FUSED}+swapped"
FROZEN = f"{FUSED}+frozen"
LOW = f"{FUSED}+low"
VARIANTS = (SWAPPED, FROZEN, LOW)
# What may be asked for beside dla_fast and its backends, which are always there.
PEERS = (
    "eager",
    "eager_other_layout",
    "compile",
    "compile_reduce_overhead",
    "compile_max_autotune",
    "compile_frozen",
    "reference",
    "library",
    *exported.MODULES,
)
# How a compiled peer is compiled: ``mode`` of torch.compile.
_COMPILE_MODES = {
    "compile_reduce_overhead": "reduce-overhead",
    "compile_max_autotune": "max-autotune-no-cudagraphs",
}
# A compiled peer that replays CUDA graphs of its own, and so is in none.
SELF_GRAPHED = ("compile_reduce_overhead",)
# A convolution of the library alone is no way to run the op that anybody has: it is shown, and never called a peer that
# was beaten or that won. See :mod:`dla_fast.bench.alone`.
YARDSTICKS = ("library",)
# The ops with a convolution.
CONVOLUTIONS = ("aggregate", "merge", "conv_norm_act")
OTHER_LAYOUT = {"channels_last": "contiguous", "contiguous": "channels_last"}


@dataclass
class Runner:
    """One implementation of one case, ready to be called.

    Attributes:
        call: one pass; gives the tensors of :attr:`names`.
        names: of what the pass gives: ``y``, and in training a ``d`` and a tensor's name for each gradient.
        copies: the same pass over tensors of its own, for each copy of the inputs; ``call`` is the first.
        backend: the backend that serves it, where dla_fast does.
        layout: of the tensors it reads.
        checked: it computes the op, so that it has to agree.
    """

    call: Callable[[], Sequence[Tensor]]
    names: list[str]
    copies: list[Callable[[], Sequence[Tensor]]]
    layout: str
    backend: str | None = None
    checked: bool = True


def implementations(
    op: str, device: str, dtype: torch.dtype, peers: Sequence[str], mode: str, variants: Sequence[str] = ()
) -> list[str]:
    """The names of what is timed for an op: dla_fast, its other backends that can run, and the peers asked for.

    Of the variants there is the frozen one, of an op with a convolution that the CPU's kernels serve in inference.
    """
    served = backend.resolve(op, device, dtype)
    others = [
        f"{FUSED}:{name}"
        for name in backend.BACKENDS
        if name not in ("reference", served) and backend.can_run(name, op, device, dtype) is None
    ]
    if FROZEN in variants and served == "cpu" and mode == "inference" and op in CONVOLUTIONS:
        others.append(FROZEN)
    wanted = [peer for peer in PEERS if peer in peers]
    if mode != "inference":
        wanted = [peer for peer in wanted if peer != "compile_frozen"]
    if op not in CONVOLUTIONS or (mode != "inference" and (op, mode) != ("conv_norm_act", "training")):
        wanted = [peer for peer in wanted if peer != "library"]
    wanted = [peer for peer in wanted if peer not in exported.MODULES]
    if device == "cpu" and served == "reference" and "reference" in wanted:
        # dla_fast is the reference then.
        wanted.remove("reference")
    return [FUSED, *others, *wanted]


def network_implementations(
    device: str, dtype: torch.dtype, peers: Sequence[str], mode: str, variants: Sequence[str] = ()
) -> list[str]:
    """The names of what is timed for a whole network: dla_fast, the variants of it that there are, and the peers.

    Args:
        device: where.
        dtype: of the network.
        peers: of :data:`PEERS`; those that do not exist for this are left out.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        variants: of :data:`VARIANTS`; frozen there is in inference alone, and low on memory in training.
    """
    mine: list[str] = []
    others: list[str] = []
    for impl in implementations("aggregate", device, dtype, peers, mode):
        if impl not in YARDSTICKS:
            (mine if impl.startswith(FUSED) else others).append(impl)
    unlike = LOW if mode == "inference" else FROZEN
    mine += [impl for impl in VARIANTS if impl in variants and impl != unlike]
    outside = [impl for impl in exported.MODULES if impl in peers and exported.runs(impl, device, dtype, mode)]
    return [*mine, *others, *outside]


def backend_of(impl: str) -> str:
    """The backend that has to be in force for an implementation: a forced one, or ``auto``."""
    if impl == "reference":
        return "reference"
    return impl.partition(":")[2] or backend.selected()


@contextlib.contextmanager
def compiling(impl: str) -> Iterator[dict[str, Any]]:
    """The inductor settings of a compiled peer in force, and the options for :func:`torch.compile`."""
    if impl == "compile_frozen":
        import torch._inductor.config as config

        with config.patch(freezing=True):
            yield {}
    else:
        yield {"mode": _COMPILE_MODES[impl]} if impl in _COMPILE_MODES else {}


def make_runner(
    case: Case, mode: str, impl: str, problem: parity.Problem, dy: Tensor | None, device: torch.device, copies: int = 1
) -> Runner:
    """An implementation of a case, compiled where it is to be compiled but not yet called.

    Args:
        case: what to compute.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        impl: one of :func:`implementations`.
        problem: the case's tensors, as float64.
        dy: gradient of the output, for ``training``.
        device: where to run.
        copies: how many copies of the inputs to go through in turn, so that none is found in the cache.
    """
    layout = problem.spec.layout
    if impl == "eager_other_layout":
        layout = OTHER_LAYOUT[layout]
        problem = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, layout=layout))
    module: Any = functional if impl.startswith(FUSED) else reference if impl == "reference" else eager
    function: Callable[..., Tensor] = _function(case, module, problem, impl, device)
    differentiable = ["x", "weight"] if impl == "library" else problem.differentiable
    names = ["y", *(f"d {name}" for name in differentiable)] if mode == "training" else ["y"]
    calls = []
    for _ in range(copies):
        tensors = problem.materialise(None, device)
        if impl == "library":
            tensors = alone.prepared(case, tensors, mode)
        grad = (
            None if dy is None else dy.to(dtype=problem.spec.dtype, memory_format=parity.LAYOUTS[layout], device=device)
        )
        calls.append(_pass(function, tensors, mode, grad, differentiable, backend_of(impl)))
    served = None
    if impl.startswith(FUSED):
        with backend.use_backend(backend_of(impl)):
            served = backend.resolve(case.op, device.type, problem.spec.dtype)
    return Runner(calls[0], names, calls, layout, served, impl not in YARDSTICKS or alone.is_whole(tensors))


def _function(
    case: Case, module: ModuleType, problem: parity.Problem, impl: str, device: torch.device
) -> Callable[..., Tensor]:
    """The op as a function of a dictionary of tensors."""
    if impl == "library":
        return alone.library(case)
    if impl == FROZEN:
        return alone.frozen(case)

    def plain(tensors: dict[str, Tensor]) -> Tensor:
        return problem.call(module, tensors, None)

    if not impl.startswith("compile") or device.type == "meta":
        return plain
    compiled: list[Callable[..., Tensor]] = []

    def run(tensors: dict[str, Tensor]) -> Tensor:
        frozen = impl == "compile_frozen"
        given = {name: t for name, t in tensors.items() if not frozen or name in activations}
        if compiled:
            return compiled[0](given)
        with compiling(impl) as options:
            inner = _Frozen(plain, {name: t for name, t in tensors.items() if name not in given}) if frozen else plain
            function: Callable[..., Tensor] = torch.compile(inner, dynamic=False, **options)
            # The first call compiles.
            result = function(given)
        compiled.append(function)
        return result

    activations = {name for name in problem.tensors if name.startswith("x") or name in ("skip", "residual")}
    return run


class _Frozen(torch.nn.Module):
    """The op with its weights as constants: inductor freezes parameters of modules, not arguments."""

    def __init__(self, function: Callable[..., Tensor], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.names = list(weights)
        for name, t in weights.items():
            self.register_parameter(f"p_{name}", torch.nn.Parameter(t.detach(), requires_grad=False))

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.function({**tensors, **{name: getattr(self, f"p_{name}") for name in self.names}})


def _pass(
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    mode: str,
    dy: Tensor | None,
    differentiable: Sequence[str],
    forced: str,
) -> Callable[[], Sequence[Tensor]]:
    """One pass: without gradients, forward, or forward and backward."""
    if forced != backend.selected():
        # Only where it is needed: entering a context is a part of what the smallest calls take.
        inner = function

        def function(tensors: dict[str, Tensor]) -> Tensor:
            with backend.use_backend(forced):
                return inner(tensors)

    if mode == "inference":
        detached = {name: t.detach() for name, t in tensors.items()}

        def infer() -> Sequence[Tensor]:
            with torch.no_grad():
                return (function(detached),)

        return infer
    if mode == "forward":
        return lambda: (function(tensors),)
    wanted = [tensors[name] for name in differentiable]

    def train() -> Sequence[Tensor]:
        y = function(tensors)
        return (y, *torch.autograd.grad(y, wanted, dy))

    return train
