"""How fast are the nodes? dla34's roots against their peers, and where the time of a training pass goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu.case import Case, Found, Setting
from benchmarks.gpu.checks import dla34_roots, name_of
from dla_fast.bench import cases, timing
from dla_fast.bench.cases import Rates

MODES = ("inference", "training")
_rates: dict[torch.dtype, Rates] = {}


def rates(dtype: torch.dtype, setting: Setting) -> Rates:
    """What the machine does at best, measured once in a process."""
    if dtype not in _rates:
        _rates[dtype] = cases.measure_rates(dtype, setting.device)
    return _rates[dtype]


def _settings(setting: Setting, dtype: torch.dtype, peers: Sequence[str], seconds: float) -> timing.Settings:
    rounds, seconds = (3, 0.05) if setting.small else (15, seconds)
    return timing.Settings(setting.device, dtype=name_of(dtype), peers=tuple(peers), rounds=rounds, seconds=seconds)


def timed(
    case: cases.Case, mode: str, batch: int, dtype: torch.dtype, peers: Sequence[str], setting: Setting,
    suite: str = "gpu", seconds: float = 0.4,
) -> Found:  # fmt: skip
    """An op beside its peers, as records."""
    settings = _settings(setting, dtype, peers, seconds)
    outcome = timing.time_case(case, mode, batch, settings, rates(dtype, setting), suite=suite)
    return [*outcome.records, *({"skipped": s["impl"], **s} for s in outcome.skipped)]


def prepared(case: cases.Case, mode: str, batch: int, dtype: torch.dtype, peer: str, setting: Setting) -> None:
    """Compile a peer of a case and call it once."""
    timing.call_once(case, mode, batch, _settings(setting, dtype, (peer,), 0.1), peer)


def timed_cases(
    work: Iterable[tuple[cases.Case, str, int, torch.dtype]], peers: Sequence[str], setting: Setting, **more: Any
) -> Iterator[Case]:
    """Ops to time, with the compiled peers to be made beforehand."""
    compiled = [peer for peer in peers if peer.startswith("compile")]
    for case, mode, batch, dtype in work:
        label = f"{case.name} {mode} batch {batch} {name_of(dtype)}"

        def run(a: Any = (case, mode, batch, dtype, peers, setting)) -> Found:
            return timed(*a, **more)

        def prepare(a: Any = (case, mode, batch, dtype)) -> None:
            for peer in compiled:
                prepared(*a, peer, setting)

        yield Case(label, run, 1.3 + 1.5 * len(compiled), prepare if compiled else None)


def kernels_of(call: Callable[[], object], setting: Setting, repeats: int = 5) -> list[dict[str, Any]]:
    """The kernels of a call by name, the longest first: how many there are, and their microseconds in a call."""
    from torch.profiler import ProfilerActivity, profile

    if setting.is_drawn:
        call()
        return []
    activity = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    kind = torch.autograd.DeviceType.CUDA if setting.on_gpu else torch.autograd.DeviceType.CPU
    for _ in range(3):
        call()
    with profile(activities=[activity], acc_events=True) as profiled:
        for _ in range(repeats):
            call()
        if setting.on_gpu:
            torch.cuda.synchronize(setting.device)
    found: dict[str, list[float]] = {}
    for event in profiled.events():
        if event.device_type == kind:
            us = event.time_range.elapsed_us() if setting.on_gpu else event.self_cpu_time_total
            found.setdefault(event.name, []).append(us)
    rows = [{"kernel": k, "calls": len(v) / repeats, "us": sum(v) / repeats} for k, v in found.items()]
    return sorted(rows, key=lambda row: -row["us"])


def _node_table(case: cases.Case, batch: int, label: str, setting: Setting) -> Found:
    """The kernels of a training node, with the bytes that each has to move and its share of the floor."""
    from benchmarks.gates.passes import Unit

    settings = _settings(setting, setting.dtype, (), 0.1)
    runner = timing.runner_of(case, "training", batch, settings, "dla_fast")
    rows = kernels_of(runner.call, setting)
    floors = Unit(case, batch, setting.dtype, "channels_last").floors([row["kernel"] for row in rows])
    speed = rates(setting.dtype, setting).bytes_per_s
    for row in rows:
        if row["kernel"] in floors:
            row["bytes"] = floors[row["kernel"]] * setting.dtype.itemsize
            row["of_floor"] = row["bytes"] / speed / (row["us"] / 1e6)
    return [{"table": label, "rows": rows, "bytes_per_s": speed}]


def nodes(setting: Setting) -> Iterator[Case]:
    """Block "nodes": dla34's roots at two batches, in both modes, and the kernels of three of them."""
    roots = dla34_roots(setting.small)
    batches = (2,) if setting.small else (256, 32)
    work = [(case, mode, batch, setting.dtype) for batch in batches for mode in MODES for case in roots]
    yield from timed_cases(work, ("eager", "compile") if setting.device.type != "cpu" else ("eager",), setting)
    for case in [roots[0], roots[len(roots) // 2], roots[-1]] if not setting.small else roots[:1]:
        label = f"kernels of a training node: {case.describe()}, batch {batches[0]}"
        yield Case(label, lambda a=(case, batches[0], label, setting): _node_table(*a), 2.0)
