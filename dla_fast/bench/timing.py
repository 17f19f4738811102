"""One case in one mode: prove that everybody computes the same, then time them in turn.

On GPUs the inputs go round so that no pass finds them in the cache, a pass is replayed as a CUDA graph so that the
device is timed and not the host, and the host's part is measured apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_fast.bench import peers
from dla_fast.bench.cases import DTYPES, Case, Rates
from dla_fast.proof import measure, parity

# The largest difference between two peers, in units of the largest value of the tensor.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# What TensorFloat-32 keeps of float32's precision: PyTorch's convolutions on a GPU use it unless told not to.
TF32_TOLERANCE = 1e-2


class Disagreement(Exception):
    """A peer and dla_fast differ by more than rounding: such a case gives no figure."""

    def __init__(self, impl: str, message: str) -> None:
        super().__init__(message)
        self.impl = impl


@dataclass(frozen=True)
class Settings:
    """How to time.

    Attributes:
        device: where.
        dtype: name of the tensors' dtype.
        layout: channels_last or contiguous.
        rounds: samples of each peer.
        peers: whom to compare with, of :data:`dla_fast.bench.peers.PEERS`.
        variants: other ways of dla_fast to time, of :data:`dla_fast.bench.peers.VARIANTS`.
        seconds: time that one case may take; a long one gets fewer rounds, 3 at least.
        rotate: copies of the inputs to go through; by default as many as pass a GPU's cache, and one on a CPU.
    """

    device: torch.device
    dtype: str = "float32"
    layout: str = "channels_last"
    rounds: int = 15
    peers: tuple[str, ...] = ("eager",)
    seconds: float = 8.0
    rotate: int | None = None
    variants: tuple[str, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """How far two right results may lie apart, in units of the largest value."""
    if dtype == torch.float32 and device.type == "cuda":
        return TF32_TOLERANCE
    return TOLERANCES[dtype]


def difference(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors, in units of the largest value; NaN and infinity count as infinite."""
    if mine.shape != theirs.shape:
        return math.inf
    if mine.numel() == 0:
        return 0.0
    a, b = mine.double(), theirs.double()
    error, scale = (a - b).abs().max().item(), b.abs().max().item()
    return error / (scale or 1.0) if math.isfinite(error) and math.isfinite(scale) else math.inf


def check_agreement(label: str, results: dict[str, dict[str, Tensor]], bound: float) -> None:
    """Compare what every peer gives with what dla_fast gives.

    Args:
        label: the case, for the message.
        results: tensors by name, by peer; one of the peers is ``dla_fast``.
        bound: the largest difference allowed, in units of the largest value.

    Raises:
        Disagreement: with the peer, the tensor and the difference.
    """
    expected = results[peers.FUSED]
    for impl, tensors in results.items():
        for name, t in tensors.items():
            error = difference(expected[name], t)
            if not error <= bound:
                raise Disagreement(
                    impl,
                    f"{label}: {peers.FUSED} and {impl} differ in {name} by {error:.1e} of the largest value, "
                    f"{bound:.0e} is allowed",
                )


def copies_needed(bytes_: int, device: torch.device) -> int:
    """How many copies of ``bytes_`` of inputs fill a GPU's level-2 cache twice; 1 on a CPU, 64 at most."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, math.ceil(2 * cache / max(bytes_, 1)) + 1))


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that goes through ``calls``, one further along each time."""
    if len(calls) == 1:
        return calls[0]
    position = 0

    def call() -> object:
        nonlocal position
        position = (position + 1) % len(calls)
        return calls[position]()

    return call


def graph_of(
    calls: Sequence[Callable[[], object]], device: torch.device, pool: Any = None
) -> Callable[[], object] | None:
    """All of ``calls``, one after another, as one CUDA graph to replay; None where they cannot be captured.

    Args:
        calls: what to capture.
        device: where it runs.
        pool: memory to share with other graphs (:func:`torch.cuda.graph_pool_handle`), which must not be replayed at
            the same time, and whose results are lost when this one is.
    """
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            kept = [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def host_ms(call: Callable[[], object], device: torch.device, calls: int = 50) -> float:
    """Milliseconds that the host spends on one call, without waiting for the device: the median of single calls."""
    samples = []
    for _ in range(calls):
        measure.synchronize(device)
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    measure.synchronize(device)
    return measure.summarise(samples).median_ms


def rounds_that_fit(settings: Settings, once_ms: float) -> int:
    """Samples of each peer within the time of a case, when one pass of all of them takes ``once_ms``."""
    return max(3, min(settings.rounds, int(1e3 * settings.seconds / max(once_ms, 1e-6))))


def time_runners(
    runners: dict[str, Callable[[], object]],
    settings: Settings,
    *,
    copies: int = 1,
    graphs: bool = True,
    pause_s: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """Time functions in turn; each may go through ``copies`` passes a call, and sleeps ``pause_s`` before a sample.

    Returns:
        Per name ``median_ms``, ``p20_ms`` and ``p80_ms`` of one pass, ``timing`` (wall, events or graph) and
        ``rounds``.
    """
    device = settings.device
    measure.synchronize(device)
    start = time.perf_counter()
    for call in runners.values():
        call()
    measure.synchronize(device)
    once_ms = (time.perf_counter() - start) * 1e3
    # One call warms up, one sizes the samples, the rest is left for the rounds.
    rounds = rounds_that_fit(settings, max(once_ms, 5.0 * len(runners)))
    timings = measure.interleave(runners, rounds=rounds, warmup=1, min_sample_ms=5.0, device=device, pause_s=pause_s)
    kind = "wall" if device.type == "cpu" else "graph" if graphs else "events"
    return {
        name: {
            "median_ms": t.median_ms / copies,
            "p20_ms": t.p20_ms / copies,
            "p80_ms": t.p80_ms / copies,
            "timing": kind,
            "rounds": rounds,
        }
        for name, t in timings.items()
    }


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one pass has allocated at most, beside what was there; None on a CPU, which does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


@dataclass
class Outcome:
    """What came of a case: records with figures or with an error, and the peers that could not run."""

    records: list[dict[str, Any]]
    skipped: list[dict[str, str]]


def time_case(
    case: Case,
    mode: str,
    batch: int,
    settings: Settings,
    rates: Rates,
    *,
    suite: str = "nodes",
) -> Outcome:
    """Prove that the peers agree on a case, then time them.

    Args:
        case: what to compute.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        batch: images.
        settings: how to time.
        rates: the machine's, for the floor.
        suite: to be written into the records.
    """
    dtype, device = settings.torch_dtype, settings.device
    problem, dy = drawn(case, mode, batch, settings)
    values, flops = case.work(mode, batch)
    common: dict[str, Any] = {
        "suite": suite,
        "case": case.name,
        "op": case.op,
        "mode": mode,
        "device": device.type,
        "dtype": settings.dtype,
        "batch": batch,
        "shape": case.describe(),
        "side": case.height,
        "threads": torch.get_num_threads(),
        **({"axis": case.axis, "value": case.value} if case.axis else {}),
        "floor_ms": rates.floor_ms(values * dtype.itemsize, flops),
        "bytes": values * dtype.itemsize,
        "flops": flops,
    }
    torch._dynamo.reset()
    bytes_ = sum(t.numel() for t in problem.tensors.values()) * dtype.itemsize
    copies = settings.rotate or copies_needed(bytes_, device)
    runners: dict[str, peers.Runner] = {}
    results: dict[str, dict[str, Tensor]] = {}
    skipped: list[dict[str, str]] = []
    try:
        wanted = peers.implementations(case.op, device.type, dtype, settings.peers, mode, settings.variants)
    except RuntimeError as error:
        # A backend that was forced and cannot run the op.
        failed = {**common, "impl": peers.FUSED, "layout": settings.layout, "error": one_line(error)}
        return Outcome([complete(failed)], skipped)
    # Eager is asked even where it is not timed: without a peer that agrees there is no figure.
    for impl in [*wanted, *({"eager"} - set(wanted))]:
        try:
            runner = peers.make_runner(case, mode, impl, problem, dy, device, copies)
            tensors = [t.detach().clone() for t in runner.copies[0]()]
        except Exception as error:
            if impl.startswith(peers.FUSED):
                failed = {**common, "impl": impl, "layout": settings.layout, "error": one_line(error)}
                return Outcome([complete(failed)], skipped)
            skipped.append({"case": case.name, "mode": mode, "impl": impl, "reason": one_line(error)})
            continue
        if impl in wanted:
            runners[impl] = runner
        if runner.checked:
            results[impl] = dict(zip(runner.names, tensors, strict=True))
    label = f"{case.name} ({mode}, batch {batch})"
    try:
        if set(results) <= {peers.FUSED}:
            raise Disagreement(peers.FUSED, f"{label}: no peer could run, so nothing proves {peers.FUSED} right")
        check_agreement(label, results, tolerance(dtype, device))
    except Disagreement as error:
        failed = {**common, "impl": error.impl, "layout": settings.layout, "error": str(error)}
        return Outcome([complete(failed)], skipped)
    results.clear()
    timed, graphs = _prepare(runners, device)
    figures = time_runners(timed, settings, copies=copies if graphs else 1, graphs=graphs)
    records = []
    for impl, figure in figures.items():
        runner = runners[impl]
        record = {**common, "impl": impl, "backend": runner.backend, "layout": runner.layout, **figure}
        record["copies"] = copies
        if device.type == "cuda":
            record["host_ms"] = host_ms(runner.copies[0], device)
            record["peak_bytes"] = peak(runner.copies[0], device)
        records.append(complete(record))
    return Outcome(records, skipped)


def drawn(case: Case, mode: str, batch: int, settings: Settings) -> tuple[parity.Problem, Tensor | None]:
    """A case's tensors, and in training the gradient of its output; drawn where they are used unless that is a CPU."""
    device = settings.device
    spec = case.spec(batch, settings.torch_dtype, settings.layout, training=mode != "inference")
    problem = parity.PROBLEMS[case.op](spec, None if device.type == "cpu" else device)
    return problem, parity.safe_gradient(problem, device) if mode == "training" else None


def runner_of(case: Case, mode: str, batch: int, settings: Settings, impl: str) -> peers.Runner:
    """One implementation of a case, on tensors of its own."""
    problem, dy = drawn(case, mode, batch, settings)
    return peers.make_runner(case, mode, impl, problem, dy, settings.device)


def _prepare(runners: dict[str, peers.Runner], device: torch.device) -> tuple[dict[str, Callable[[], object]], bool]:
    """What to time of each runner: on a GPU a graph of all copies if every peer has one, else a copy at a time."""
    if device.type == "cuda":
        graphs = {impl: graph_of(runner.copies, device) for impl, runner in runners.items()}
        made = {impl: graph for impl, graph in graphs.items() if graph is not None}
        if len(made) == len(runners):
            return made, True
    return {impl: in_turn(runner.copies) for impl, runner in runners.items()}, False


def complete(record: dict[str, Any]) -> dict[str, Any]:
    """A record with every field there is, None where nothing was measured."""
    fields = ("median_ms", "p20_ms", "p80_ms", "floor_ms", "peak_bytes", "saved_bytes")
    return {**record, **{name: record.get(name) for name in fields}}


def one_line(error: BaseException) -> str:
    """An error's type and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
