"""Whole networks: every model by name, with the outputs and the images it happens to have."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dla_fast import backend, models
from dla_fast._timm import import_timm
from dla_fast.commands.bench import peers, timing
from dla_fast.commands.bench.cases import LAYOUTS, Rates, image_size
from dla_fast.commands.bench.timing import Disagreement, Outcome, Settings, complete, one_line

# Gradients of a network in working precision: where a ReLU's input lies within rounding of zero, two right networks
# send them different ways, so they are compared as a whole, and once more in float64 on small images.
GRADIENT_TOLERANCE = 0.2
FLOAT64_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Network:
    """A network, its images' size in pixels, and how many of them there are."""

    name: str
    size: int
    batch: int

    @staticmethod
    def of(name: str, size: int | None, batch: int | None) -> Network:
        """With the defaults of its kind: 8 images of 224, and for dense prediction 2 of 512."""
        return Network(name, image_size(name, size), batch or (2 if name.endswith("up") else 8))


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in whatever a network gives."""
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [t for value in values for t in tensors_of(value)]


def make(name: str, impl: str, state: dict[str, Tensor] | None = None) -> tuple[nn.Module, str]:
    """A network as an implementation runs it, and where it comes from.

    Eager is timm's network where timm has it: the one that people run. Else it is this package's on the PyTorch
    reference, op by op.

    Args:
        name: one of :func:`dla_fast.models.list_models`.
        impl: ``dla_fast``, ``dla_fast:<backend>`` or a peer.
        state: parameters and buffers to load.
    """
    if not impl.startswith(peers.FUSED) and impl != "reference":
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timm = import_timm()
            if timm.is_model(name):
                network: nn.Module = timm.create_model(name)
                if state is not None:
                    network.load_state_dict(state)
                return network, "timm"
    network = models.create_model(name)
    if state is not None:
        network.load_state_dict(state)
    return network, "dla_fast"


def backend_for(impl: str) -> str:
    """The backend that has to be in force for an implementation of a whole network."""
    return peers.backend_of(impl) if impl.startswith(peers.FUSED) else "reference"


class _Convolutions(TorchDispatchMode):
    """Adds up what a network's convolutions have to move and to compute, each with the norm after it."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training
        self.values = self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, weight, transposed = args[0], args[1], args[6]
            product = 2.0 * weight[0].numel() * (x if transposed else result).numel()
            if not transposed:
                self.add(x.numel(), result.numel(), weight, product)
            else:
                self.values += (3 if self.training else 1) * (x.numel() + result.numel() + weight.numel())
                self.flops += (3 if self.training else 1) * product
        return result

    def add(self, read: int, written: int, weight: Tensor, product: float) -> None:
        """A convolution-norm-activation unit, counted as in :meth:`dla_fast.commands.bench.cases.Case.work`."""
        tail = 6 if weight.shape[-1] == 1 else 8
        self.values += (3 * read + (1 + tail) * written if self.training else read + written) + weight.numel()
        self.flops += product * (3 if self.training else 1)


def work(network: Network, training: bool) -> tuple[float, float]:
    """Values to move and flops to do in one pass over a batch, from the network's convolutions alone."""
    model = models.create_model(network.name, device="meta").train(training)
    counter = _Convolutions(training)
    with torch.no_grad(), backend.use_backend("reference"), counter:
        model(torch.empty(network.batch, 3, network.size, network.size, device="meta"))
    return counter.values, counter.flops


def step(
    model: Callable[..., Any], images: Tensor, mode: str, parameters: Sequence[Tensor], forced: str
) -> Callable[[], list[Tensor]]:
    """One pass of a network: outputs, and in training the gradients of ``parameters``."""

    def run() -> list[Tensor]:
        with backend.use_backend(forced):
            if mode == "inference":
                with torch.no_grad():
                    return tensors_of(model(images))
            outputs = tensors_of(model(images))
        if mode == "forward":
            return outputs
        # A loss that every output takes part in, whatever its shape.
        loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        return [*outputs, *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)]

    return run


def _compare(
    label: str, impl: str, mine: list[Tensor], theirs: list[Tensor], outputs: int, bounds: tuple[float, float]
) -> None:
    for i in range(outputs):
        error = timing.difference(mine[i], theirs[i])
        if not error <= bounds[0]:
            raise Disagreement(impl, f"{label}: dla_fast and {impl} differ in output {i} by {error:.1e} of the largest")
    if len(mine) > outputs:
        error = _norm_difference(mine[outputs:], theirs[outputs:])
        if not error <= bounds[1]:
            raise Disagreement(impl, f"{label}: dla_fast and {impl} differ in the gradient by {error:.1e} of its norm")


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that are trained, by name, since two sources may list them in different orders."""
    return [p for _, p in sorted(model.named_parameters()) if p.requires_grad]


def check_float64(name: str, mode: str, state: dict[str, Tensor], label: str, device: torch.device) -> None:
    """Compare outputs, and in training gradients, with eager PyTorch in float64, on two small images.

    Raises:
        Disagreement: they differ by more than float64's rounding.
    """
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, device=device)
    results = {}
    for impl in (peers.FUSED, "eager"):
        model = make(name, impl, state)[0].to(device, torch.float64).train(mode != "inference")
        parameters = trained(model)
        results[impl] = step(model, images, mode, parameters, backend_for(impl))()
        count = len(results[impl]) - (len(parameters) if mode == "training" else 0)
    bounds = (FLOAT64_TOLERANCE, FLOAT64_TOLERANCE)
    _compare(f"{label} in float64", "eager", results[peers.FUSED], results["eager"], count, bounds)


@functools.lru_cache(maxsize=4)
def initial_state(name: str, statistics: bool = True) -> dict[str, Tensor]:
    """Parameters of a network, and statistics with which its values stay of ordinary size; the same in every call."""
    torch.manual_seed(0)
    model = models.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    if not statistics:
        return model.state_dict()
    # Statistics that fit: with fresh ones the values of an evaluation grow through the layers without bound.
    size = 64
    with torch.no_grad(), backend.use_backend("reference"):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.randn(4, 3, size, size))
    return model.state_dict()


def _norm_difference(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The difference of two lists of tensors as one vector, over the second's norm."""
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (mine, theirs))
    return ((a - b).norm() / b.norm()).item()


def _bounds(
    network: Network, mode: str, state: dict[str, Tensor], settings: Settings, gradients: int
) -> tuple[float, float]:
    """How far outputs, and the gradient as a whole, may lie apart.

    In half precision no fixed bound says anything: rounding grows through the layers, and kinks send gradients
    elsewhere. There an implementation may err against float32 twice as much as eager does, and so two of them may lie
    three times that error apart.
    """
    dtype = settings.torch_dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return 10 * timing.tolerance(dtype, settings.device), GRADIENT_TOLERANCE
    # The same values in float32: those that half precision has rounded already.
    rounded = {name: t.to(dtype).float() if t.is_floating_point() else t for name, t in state.items()}
    exact = implementation(network, mode, "eager", rounded, replace(settings, dtype="float32"), dtype)[0]()
    eager = implementation(network, mode, "eager", state, settings)[0]()
    count = len(exact) - gradients
    outputs = max(timing.difference(a, b) for a, b in zip(eager[:count], exact[:count], strict=True))
    gradient = _norm_difference(eager[count:], exact[count:]) if gradients else 0.0
    return 3 * outputs + timing.TOLERANCES[dtype] / 10, 3 * gradient


def prove(
    network: Network,
    mode: str,
    settings: Settings,
    skipped: list[dict[str, str]],
    float64: bool = True,
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The implementations of a network, once they have been found to agree.

    Args:
        network: which, with its images.
        mode: one of :data:`dla_fast.commands.bench.cases.MODES`.
        settings: where, and with whom.
        skipped: takes the peers that cannot run, with the reason.
        float64: also compare with eager in float64 (:func:`check_float64`).

    Returns:
        One pass by implementation, and where each network comes from.

    Raises:
        Disagreement: a peer and dla_fast differ, or there is no peer to compare with.
    """
    dtype, device = settings.torch_dtype, settings.device
    label = f"{network.name} ({mode}, batch {network.batch})"
    torch._dynamo.reset()
    state = initial_state(network.name, device.type != "meta")
    runs: dict[str, Callable[[], Any]] = {}
    sources: dict[str, str] = {}
    wanted = [
        impl
        for impl in peers.implementations("aggregate", device.type, dtype, settings.peers, mode)
        if impl not in peers.YARDSTICKS
    ]
    gradients = len(trained(models.create_model(network.name, device="meta"))) if mode == "training" else 0
    bounds = _bounds(network, mode, state, settings, gradients)
    mine: list[Tensor] = []
    agreed = 0
    if float64:
        check_float64(network.name, mode, state, label, device)
    # Eager is asked even where it is not timed: without a peer that agrees there is no figure.
    for impl in [*wanted, *({"eager"} - set(wanted))]:
        try:
            call, source = implementation(network, mode, impl, state, settings)
            tensors = [t.detach().clone() for t in call()]
        except Exception as error:
            if impl.startswith(peers.FUSED):
                raise Disagreement(impl, f"{label}: {impl} raised {one_line(error)}") from error
            skipped.append({"case": network.name, "mode": mode, "impl": impl, "reason": one_line(error)})
            continue
        if impl == peers.FUSED:
            mine = tensors
        else:
            _compare(label, impl, mine, tensors, len(mine) - gradients, bounds)
            agreed += 1
        if impl in wanted:
            runs[impl], sources[impl] = call, source
    if not agreed:
        raise Disagreement(peers.FUSED, f"{label}: no peer could run, so nothing proves dla_fast right")
    return runs, sources


def time_network(
    network: Network,
    mode: str,
    settings: Settings,
    rates: Rates,
    float64: bool = True,
) -> Outcome:
    """Prove that the implementations of a network agree, then time them.

    On a GPU each is timed as a CUDA graph, which leaves the host's part out, and once more call by call
    (``plain_ms``); what cannot be captured, or makes graphs of its own, has its calls' time for both.

    Args:
        network: which, with its images.
        mode: one of :data:`dla_fast.commands.bench.cases.MODES`.
        settings: how to time.
        rates: the machine's, for the floor.
        float64: see :func:`prove`.
    """
    dtype, device = settings.torch_dtype, settings.device
    values, flops = work(network, training=mode == "training")
    common: dict[str, Any] = {
        "suite": "models",
        "case": network.name,
        "op": "model",
        "mode": mode,
        "device": device.type,
        "dtype": settings.dtype,
        "layout": settings.layout,
        "batch": network.batch,
        "shape": f"3 @ {network.size}x{network.size}",
        "side": network.size,
        "threads": torch.get_num_threads(),
        "floor_ms": rates.floor_ms(values * dtype.itemsize, flops),
        "bytes": values * dtype.itemsize,
        "flops": flops,
    }
    skipped: list[dict[str, str]] = []
    try:
        served = backend.resolve("aggregate", device.type, dtype)
        runs, sources = prove(network, mode, settings, skipped, float64)
    except (Disagreement, RuntimeError) as error:
        if isinstance(error, Disagreement):
            failed = {"impl": error.impl, "error": str(error)}
        else:
            failed = {"impl": peers.FUSED, "error": f"{network.name} ({mode}): {one_line(error)}"}
        return Outcome([complete({**common, **failed})], skipped)
    figures = timing.time_runners(runs, settings, graphs=False)
    graphed = _graphs(runs, device) if device.type == "cuda" else {}
    if graphed:
        # What has no graph takes part as it is, so that all are timed in turn.
        again = timing.time_runners({**runs, **graphed}, settings, graphs=True)
        for impl, figure in figures.items():
            figure |= {"plain_ms": figure["median_ms"]} | (again[impl] if impl in graphed else {})
    records = []
    for impl, figure in figures.items():
        record = {**common, "impl": impl, "network": sources[impl], **figure}
        record["layout"] = _layout(impl, settings)
        if impl.startswith(peers.FUSED):
            record["backend"] = impl.partition(":")[2] or served
        if device.type == "cuda":
            record["host_ms"] = timing.host_ms(runs[impl], device, calls=5)
            record["peak_bytes"] = timing.peak(runs[impl], device)
        records.append(complete(record))
    return Outcome(records, skipped)


def _graphs(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, Callable[[], object]]:
    """The implementations as CUDA graphs, where they can be captured; one memory for all, since they take turns."""
    torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    made = {i: timing.graph_of([call], device, pool) for i, call in runs.items() if i not in peers.SELF_GRAPHED}
    return {impl: graph for impl, graph in made.items() if graph is not None}


def _layout(impl: str, settings: Settings) -> str:
    return peers.OTHER_LAYOUT[settings.layout] if impl == "eager_other_layout" else settings.layout


def implementation(
    network: Network,
    mode: str,
    impl: str,
    state: dict[str, Tensor],
    settings: Settings,
    rounded: torch.dtype | None = None,
) -> tuple[Callable[[], Any], str]:
    """One pass of an implementation of a network, and where the network is from; the images rounded to a dtype."""
    layout = LAYOUTS[_layout(impl, settings)]
    torch.manual_seed(1)
    # On a CPU the values are those of any device, on another they need not travel.
    images = torch.randn(network.batch, 3, network.size, network.size, device=settings.device)
    images = images.to(rounded or settings.torch_dtype)
    images = images.to(device=settings.device, dtype=settings.torch_dtype, memory_format=layout)
    model, source = make(network.name, impl, state)
    # The overloads of Module.to leave out a call with all three.
    model = model.to(device=settings.device, dtype=settings.torch_dtype).to(memory_format=layout)  # type: ignore[call-overload]
    model = model.train(mode != "inference")
    parameters = trained(model)
    forced = backend_for(impl)
    if not impl.startswith("compile") or settings.device.type == "meta":
        return step(model, images, mode, parameters, forced), source
    with peers.compiling(impl) as options:
        compiled = torch.compile(model, dynamic=False, **options)
        call = step(compiled, images, mode, parameters, forced)
        call()
    return call, source


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with this many CPU threads, or with as many as there are."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
