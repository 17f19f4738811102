"""``--rehearse``: what of the run needs no GPU, and how long the run is expected to take where there is one.

Every specialisation that the run launches is compiled with its launcher, and found again by a second process: then none
is compiled while something is timed. Every block's Python is run on the CPU's kernels, at the smallest size.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.gpu import draw, report, warm
from benchmarks.gpu import run as running
from benchmarks.gpu.blocks import BLOCKS, PREPARING, Block
from benchmarks.gpu.case import Setting
from benchmarks.gpu.process import ROOT

CORES = 16
# The extension's build for one architecture: seconds of a core in all, and of its longest file (nvcc 13.0 and gcc 12 on
# an AMD EPYC, 2026-11; ``.ninja_log`` of a build has them).
BUILD_CORE_SECONDS, BUILD_LONGEST = 272.0, 48.0
# A process starts, imports torch and makes its context.
START = 8.0
# Blocks whose end the run is judged by, and when they have to be over.
FIRST, FIRST_SECONDS = ("roots", "checks", "nodes", "networks"), 300.0


@dataclass(frozen=True)
class Compiled:
    """What a block's kernels came to."""

    block: str
    kernels: int
    new: int
    seconds: float
    drawing: float
    failures: list[str]


def compile_all(names: Iterable[str], args: argparse.Namespace, cache: Path) -> tuple[list[Compiled], list[draw.Job]]:
    """Draw and compile the launches of blocks; what each took, and all jobs."""
    os.environ.update(warm.cache_in(cache))
    pool = warm.Pool(args.arch, args.jobs)
    found, every = [], dict[Any, draw.Job]()
    try:
        for name in names:
            failures: list[str] = []
            begun, jobs = time.perf_counter(), dict[Any, draw.Job]()
            for label, drawn, error in draw.drawn(BLOCKS[name].cases, args.arch, args.small):
                if error:
                    failures.append(f"{label}: {error}")
                jobs.update({job.key: job for job in drawn})
            drawing = time.perf_counter() - begun
            new = [job for key, job in jobs.items() if key not in every]
            every.update(jobs)
            seconds = 0.0
            with tqdm(total=len(new), desc=name, unit="kernel", disable=not sys.stderr.isatty(), leave=False) as bar:
                for future in pool.submit(new, lambda made: None):
                    made = future.result()
                    seconds += made.seconds + made.stub_seconds
                    if made.error:
                        failures.append(f"{made.name}: {made.error}")
                    bar.update()
            found.append(Compiled(name, len(jobs), len(new), seconds, drawing, failures))
            print(
                f"{name}: {len(jobs)} kernels, {len(new)} of them new, {seconds:.0f} s of a core to compile, "
                f"{drawing:.0f} s to draw, {len(failures)} failures",
                flush=True,
            )
    finally:
        pool.close()
    return found, list(every.values())


REPLAY = """
import pickle, sys
from benchmarks.gpu import warm
jobs, arch, library = pickle.load(open(sys.argv[1], "rb"))
warm.start(arch, library)
made = [warm.make(job) for job in jobs]
print(sum(m.found for m in made))
print(*[m.name for m in made if not m.found][:20], sep="\\n")
"""


def replayed(jobs: list[draw.Job], arch: int, cache: Path) -> tuple[int, list[str]]:
    """How many of the jobs a new process finds in the cache, and the names of some that it does not."""
    path = cache / "jobs.pickle"
    path.write_bytes(pickle.dumps((jobs, arch, warm.has_library())))
    done = subprocess.run(
        [sys.executable, "-c", REPLAY, str(path)],
        cwd=ROOT, env={**os.environ, **warm.cache_in(cache)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return 0, [done.stderr.strip()[-500:]]
    lines = done.stdout.splitlines()
    return int(lines[0]), [line for line in lines[1:] if line]


@dataclass(frozen=True)
class Expected:
    """A line of the timetable: what is done, when it begins and how long it takes, in seconds."""

    what: str
    begins: float
    seconds: float

    @property
    def ends(self) -> float:
        return self.begins + self.seconds


def _processes(block: Block, setting: Setting) -> float:
    """Seconds of a block's cases, dealt out to its processes."""
    loads = [0.0] * block.processes
    for index, case in enumerate(block.cases(setting)):
        loads[index % block.processes] += case.seconds
    return START + max(loads)


def _preparing(setting: Setting) -> float:
    """Seconds of compiling the peers of the timed blocks, dealt out, the longest first."""
    cases = [c for name in ("nodes", "networks") for c in BLOCKS[name].cases(setting) if c.prepare is not None]
    loads = [0.0] * PREPARING
    for index, case in enumerate(sorted(cases, key=lambda case: -case.seconds)):
        # Compiled anew a peer takes twice to three times what it does from the cache.
        loads[index % PREPARING] += 2.5 * case.seconds
    return START + max(loads)


def timetable(compiled: list[Compiled], cores: int, small: bool = False) -> list[Expected]:
    """When what is expected to happen on a machine of so many cores with an H100.

    Compiling is what was measured here, spread over the cores; the cases' seconds are estimates that stand in the code
    and have not been measured on a GPU.
    """
    setting = Setting(draw.META, small)
    by_block = {c.block: c for c in compiled}
    first = [name for name in BLOCKS if name in by_block and not BLOCKS[name].last]
    work = sum(by_block[name].seconds for name in first)
    rows, now = [], 0.0
    build = max(BUILD_LONGEST, (BUILD_CORE_SECONDS + work) / cores)
    rows.append(Expected("build of the extension, beside the compiling", 0.0, build))
    drawing = compiling = 0.0
    for name in first:
        drawing, compiling = drawing + by_block[name].drawing, compiling + by_block[name].seconds
        # Drawn one after another and compiled meanwhile; the build has half of the cores.
        seconds = START + max(drawing, 2 * compiling / cores)
        rows.append(Expected(f"kernels of {name} compiled", 0.0, seconds))
    at = {row.what: row.ends for row in rows}
    for name, block in BLOCKS.items():
        if name not in by_block:
            continue
        if name == "roots":
            now = max(now, at[f"kernels of {name} compiled"])
        elif block.last:
            now += START + by_block[name].seconds / cores
        else:
            now = max(now, build, at[f"kernels of {name} compiled"])
        if block.timed and not block.last:
            now = max(now, *(at[f"kernels of {n} compiled"] for n in first))
        seconds = _processes(block, setting)
        if name == "checks":
            seconds = max(seconds, _preparing(setting))
        seconds = min(seconds, block.seconds) if block.last else seconds
        rows.append(Expected(block.title, now, seconds))
        now += seconds
    return rows


def _rehearsed_on_cpu(args: argparse.Namespace, out: Path) -> tuple[bool, str]:
    """Every block on the CPU's kernels, the smallest sizes: as a run, in its own processes."""
    collected = report.Collected(out / "gpu.json", "cpu")
    plan = running.Plan(
        "cpu", True, 12.0, [*BLOCKS], out / "processes", out / "cache", args.grace, 4 * args.patience, collected
    )
    plan.out.mkdir(parents=True)
    running.run(plan)
    data = collected.save(complete=True)
    wrong = [*report.failures(data), *data["left_out"]]
    good = sum(c["ok"] for c in data["checks"])
    told = f"on the CPU: {good} of {len(data['checks'])} checks hold, {len(data['records'])} records, "
    return not wrong, "\n".join([f"{told}{len(data['tables'])} tables, {data['seconds']:.0f} s", *wrong])


def main(args: argparse.Namespace) -> int:
    """Rehearse: 0 where everything compiles, is found again, runs, and fits the first five minutes."""
    names = [name for name in args.blocks if name in BLOCKS]
    with tempfile.TemporaryDirectory(prefix="dla_fast-rehearsal-") as folder:
        # New by default: what lies in a cache says nothing of what a run would find.
        cache = args.cache or Path(folder) / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        compiled, jobs = compile_all(names, args, cache)
        failures = [f"{c.block}: {failure}" for c in compiled for failure in c.failures]
        again, missed = replayed(jobs, args.arch, cache)
        print(f"found again by a new process: {again} of {len(jobs)} kernels, launchers included")
        failures += [f"not found again: {name}" for name in missed]
        fine, told = _rehearsed_on_cpu(args, Path(folder) / "cpu")
        print(told)
        failures += [] if fine else ["a block failed on the CPU"]
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / "cpu" / "gpu.json", args.out / "rehearsal.json")
    rows = timetable(compiled, CORES, args.small)
    print(f"\non {CORES} cores and an H100, expected (compiling as measured here; cases by estimate):")
    for row in rows:
        print(f"  {row.begins:5.0f} s to {row.ends:5.0f} s  {row.what}")
    titles = [BLOCKS[name].title for name in FIRST]
    predicted = max((row.ends for row in rows if row.what in titles), default=0.0)
    if predicted > FIRST_SECONDS:
        failures.append(f"{', '.join(FIRST)} are to be over in {FIRST_SECONDS:.0f} s")
    for failure in failures:
        print(f"FAILED {failure}"[:400])
    print(f"rehearsed: {len(jobs)} specialisations, {len(failures)} failures, predicted {predicted:.0f} s")
    return 1 if failures else 0
