"""What is left of the time: other roots and ops, the slower peers, tiles tried for the worst, the sanitizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import torch

from benchmarks.gpu import draw, warm
from benchmarks.gpu.case import Case, Found, Setting, measured
from benchmarks.gpu.checks import dla34_roots
from benchmarks.gpu.kernels import host_cost, latency, sanitizer
from benchmarks.gpu.nodes import MODES, timed, timed_cases
from dla_fast.bench import cases
from dla_fast.commands import tune
from dla_fast.kernels import config

# Roots whose tiles are tried: those furthest from the floor.
TUNED = 3


def _other_roots(small: bool) -> list[cases.Case]:
    alike: dict[Any, cases.Case] = {}
    for name in ("dla34",) if small else ("dla34", "dla60", "dla102", "dla169"):
        for case in cases.network_cases(name, 32 if small else 224):
            alike.setdefault((case.in_channels, case.out_channels, case.height, case.residual), case)
    known = {(c.in_channels, c.out_channels, c.height, c.residual) for c in dla34_roots(small)}
    return [case for key, case in alike.items() if key not in known][: 1 if small else None]


def _ops(small: bool) -> list[cases.Case]:
    work = [c for c in cases.ida_cases(size=64 if small else 512) if c.op != "aggregate"]
    work += [c for c in cases.op_cases() if c.residual or c.factor > 2]
    return [next(c for c in work if c.op == op) for op in ("merge", "upsample")] if small else work


def _tuned(setting: Setting) -> Found:
    """Tiles tried for the nodes that are furthest from the floor; the table is not written, the gains are told."""
    batch = 2 if setting.small else 256
    worst: list[tuple[float, cases.Case, str]] = []
    for case in dla34_roots(setting.small):
        for mode in MODES:
            records = timed(case, mode, batch, setting.dtype, ("eager",), setting, seconds=0.05)
            mine = next((r for r in records if r.get("impl") == "dla_fast" and r.get("median_ms")), None)
            if mine is not None:
                worst.append((mine["floor_ms"] / mine["median_ms"], case, mode))
    worst.sort(key=lambda found: found[0])
    found: Found = []
    for share, case, mode in worst[: 1 if setting.is_drawn else TUNED]:
        if setting.device.type != "cpu":
            _compile_candidates(case, mode, batch, setting)
        problem = tune.pass_of(case, mode, batch, setting.dtype, "channels_last", setting.device)
        for entry in tune.tune(problem, [], _no_clock if setting.is_drawn else tune.clock):
            gain = entry.heuristic_ms / entry.ms if entry.ms else 0.0
            label = f"tiles {case.name} {mode} batch {batch} {entry.key[1]}"
            found += measured(
                label, gain, "x the heuristic's pass", op="tune", tile=str(entry.best), tried=entry.tried,
                refused=entry.refused[:5], of_floor=share, entry=entry.to_dict(),
            )  # fmt: skip
    return found


def _no_clock(call: Callable[[], object], device: torch.device) -> float:
    call()
    return 1.0


def _compile_candidates(case: cases.Case, mode: str, batch: int, setting: Setting) -> None:
    """Compile all tiles that will be tried at once, rather than one after another between the timings."""

    def tried() -> None:
        tune.tune(tune.pass_of(case, mode, batch, setting.dtype, "channels_last", draw.META), [], _no_clock)

    arch = config.arch_of(setting.device)
    jobs = draw.jobs_of(tried, arch)
    if setting.on_gpu:
        pool = warm.Pool(arch, os.cpu_count() or 1)
        wait(pool.submit(jobs, lambda made: None))
        pool.close()


def rest(setting: Setting) -> Iterator[Case]:
    """Block "rest"."""
    yield from host_cost(setting)
    yield from latency(setting)
    batch = 1 if setting.small else 16
    eager = ("eager", "library")
    yield from timed_cases([(c, m, batch, setting.dtype) for c in _ops(setting.small) for m in MODES], eager, setting)
    roots, others = dla34_roots(setting.small), _other_roots(setting.small)
    if not setting.small:
        work = [(c, m, 32, setting.dtype) for c in others for m in MODES]
        work += [(c, m, 1, setting.dtype) for c in roots for m in MODES]
        dtypes = (torch.float16, torch.float32) if setting.device.type != "cpu" else ()
        work += [(c, m, 32, d) for d in dtypes for c in roots[:4] for m in MODES]
        yield from timed_cases(work, ("eager",), setting)
    if setting.device.type != "cpu":
        slow = [(c, m, 257 if setting.small else 256, setting.dtype) for c in roots[:3] for m in MODES]
        for case in timed_cases(slow, ("eager", "compile_max_autotune"), setting, suite="gpu max-autotune"):
            # Compiling such a peer takes half a minute; nothing waits for it.
            yield Case(case.label + " max-autotune", case.run, 30.0)
    yield from sanitizer(setting)
    # Last, since it takes what time there is: on an H200 more than all before it.
    if setting.device.type != "cpu":
        yield Case("tiles of the worst nodes", lambda: _tuned(setting), 60.0, launches=False)
