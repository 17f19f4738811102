"""How times and memory are measured, for the demo and the benchmarks alike."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

# With the threshold fixed, glibc gives every large block back when it is freed: the peak is that of the tensors. Left
# alone it raises the threshold as it goes, keeps freed blocks in its heap, and the peak varies by a tenth between runs.
NO_FRAGMENTATION = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median over the rounds, and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Quantile of sorted values, linear between neighbours."""
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise(samples_ms: Iterable[float]) -> Timing:
    """The timing that a list of samples amounts to."""
    ordered = sorted(samples_ms)
    return Timing(*(_quantile(ordered, q) for q in (0.5, 0.2, 0.8)))


def _repeats(fn: Callable[[], object], device: torch.device, min_sample_ms: float) -> int:
    """How many calls fill ``min_sample_ms``, judged by one call."""
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    elapsed_ms = (time.perf_counter() - start) * 1e3
    return max(1, min(1000, round(min_sample_ms / max(elapsed_ms, 1e-3))))


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, where it has one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    fns: Mapping[Key, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    min_sample_ms: float = 1.0,
    device: torch.device | str = "cpu",
    progress: Callable[[], object] | None = None,
    pause_s: float = 0.0,
) -> dict[Key, Timing]:
    """Time several functions in turn, so that a slow moment of the machine hits all of them.

    Every round calls each function, beginning one further along each time so that none always runs after the same
    other. A sample is as many calls as fill ``min_sample_ms``, divided by their number. On CUDA the samples are
    taken with events and the queue is drained once, at the end.

    Args:
        fns: what to time, by name; called without arguments, results dropped.
        rounds: samples of each function.
        warmup: untimed calls of each before the first round.
        min_sample_ms: least length of a sample.
        device: where the functions work.
        progress: called once per round, for a progress bar.
        pause_s: seconds to sleep before each sample. Threads of one runtime wait actively for a while after a call
            (OpenMP's for several milliseconds), and would take their cores from the next where that is another.

    Returns:
        A :class:`Timing` per name, in the order of ``fns``.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    device = torch.device(device)
    if device.type == "meta":
        # Nothing is computed there: each is called, and a millisecond stands for its time.
        for fn in fns.values():
            fn()
        return dict.fromkeys(fns, Timing(1.0, 1.0, 1.0))
    repeats = {}
    for name, fn in fns.items():
        for _ in range(warmup):
            fn()
        repeats[name] = _repeats(fn, device, min_sample_ms)
    names = list(fns)
    clock = _cuda_clock if device.type == "cuda" else _cpu_clock
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        readers: dict[Key, list[Callable[[], float]]] = {name: [] for name in names}
        for round_ in range(rounds):
            for i in range(len(names)):
                name = names[(round_ + i) % len(names)]
                if pause_s:
                    time.sleep(pause_s)
                readers[name].append(clock(fns[name], repeats[name]))
            if progress is not None:
                progress()
        synchronize(device)
        return {name: summarise(read() / repeats[name] for read in readers[name]) for name in names}
    finally:
        if collecting:
            gc.enable()


def _cpu_clock(fn: Callable[[], object], repeats: int) -> Callable[[], float]:
    start = time.perf_counter()
    for _ in range(repeats):
        fn()
    elapsed_ms = (time.perf_counter() - start) * 1e3
    return lambda: elapsed_ms


def _cuda_clock(fn: Callable[[], object], repeats: int) -> Callable[[], float]:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        fn()
    end.record()
    return lambda: float(start.elapsed_time(end))


def saved_bytes(forward: Callable[[], object], *, exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that a forward pass keeps for its backward.

    Counts each storage once, however many views of it are saved, and in full.

    Args:
        forward: runs the pass with gradients enabled.
        exclude: tensors that live anyway, such as the parameters, the buffers and the input.
    """
    known = {_storage_key(t) for t in exclude}
    # Holding the storages keeps their addresses from being handed out again while counting.
    kept: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        key = _storage_key(t)
        if key not in known:
            kept[key] = t.untyped_storage()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total


def _storage_key(t: Tensor) -> tuple[torch.device, int]:
    return t.device, t.untyped_storage().data_ptr()


def _proc_status(field: str) -> int | None:
    """A field of /proc/self/status that counts kilobytes, in bytes; None where there is none."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    # Not ru_maxrss on Linux, which carries it over from the process that started this one.
    peak = _proc_status("VmHWM")
    if peak is not None:
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def current_rss() -> int:
    """Resident size of this process now, in bytes; its peak so far where the system does not tell."""
    now = _proc_status("VmRSS")
    return peak_rss() if now is None else now


def reset_peak_rss() -> None:
    """Let :func:`peak_rss` count from here on, on systems that can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def in_fresh_process(
    module: str, arguments: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float = 600
) -> dict[str, Any]:
    """Run ``python -m module`` in a process of its own and read the JSON object it prints last.

    Args:
        module: what to run.
        arguments: its command line.
        env: variables to set for it, beside those of this process.
        timeout_s: the longest it may take.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    # The same dla_fast as here, wherever this process has it from.
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).resolve().parents[2])]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"{module} failed with exit status {done.returncode}: {' / '.join(said[-3:])}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
