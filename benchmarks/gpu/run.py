"""The run: it builds, compiles, checks and times in the order of the timetable, and keeps what was found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.gpu import warm
from benchmarks.gpu.blocks import BLOCKS, PREPARING, Block
from benchmarks.gpu.process import Child, Line, Worker
from benchmarks.gpu.report import Collected

# What runs in a process of the run.
CHILD = "benchmarks.gpu"
BUILD = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
# The build may take so long before the run goes on without it; so may the compiling, before a block does.
BUILD_SECONDS, WARM_SECONDS = 150.0, 120.0
# Seconds past a block's end that the case at hand may take.
GRACE = 20.0
# Threads of the compilers of one process, since many compile at once.
_FEW = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}


@dataclass
class Plan:
    """What a run is asked to do.

    Attributes:
        device: ``cuda``, or ``cpu`` to test the program.
        small: the smallest shapes alone.
        minutes: for everything.
        blocks: names, ``build`` among them.
        out: folder of the processes' files and logs.
        cache: folder of what is compiled.
        grace: see :data:`GRACE`.
        patience: scales the time after which a case is given up.
        collected: where everything goes.
        bar: progress.
        say: prints a line above the bar.
    """

    device: str
    small: bool
    minutes: float
    blocks: Sequence[str]
    out: Path
    cache: Path
    grace: float
    patience: float
    collected: Collected
    say: Callable[[str], object] = print
    bar: Any = None
    warmed: set[str] = field(default_factory=set)

    @property
    def end(self) -> float:
        """When everything has to be over."""
        return self.collected.started + 60 * self.minutes

    def command(self, child: str, blocks: Sequence[str], *more: object) -> list[str]:
        """The command line of a process."""
        line = [sys.executable, "-m", CHILD, "--child", child, "--child-blocks", *blocks, "--device", self.device]
        line += ["--patience", str(self.patience), *map(str, more)]
        return line + ["--small"] * self.small

    def take(self, line: Line) -> None:
        """Keep a line, and tell what goes wrong."""
        self.collected.add(line)
        if "warmed" in line:
            self.warmed.add(line["warmed"])
        found = line.get("record", {})
        if ("check" in found and not found["ok"]) or found.get("error"):
            text = f"{found.get('check', found.get('case'))}: {found.get('detail', found.get('error'))}"
            self.say(f"gpu: {line['block']}: {' '.join(text.split())[:200]}")


def capability() -> tuple[int, int]:
    """The GPU's compute capability."""
    return torch.cuda.get_device_capability()


def build(plan: Plan) -> Child:
    """Start building the extension in place, for the GPU at hand, on all cores."""
    environment = {"MAX_JOBS": str(os.cpu_count() or 1)}
    if plan.device == "cuda" and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        major, minor = capability()
        # "a" brings the instructions that sm_90 alone has.
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"
    return Child("build", BUILD, plan.out, environment, tells=False)


def built(plan: Plan, child: Child) -> None:
    """Keep what became of the build: a failure is a record, and Triton's kernels need none."""
    ok = not child.running and child.process.returncode == 0
    why = "" if ok else f"{'out of time' if child.running else child.process.returncode}: {child.said(600)}"
    child.kill()
    if ok and plan.device == "cuda":
        # Without CUDA sources the build succeeds too, and says so.
        said = child.said(4000)
        ok, why = "built (CPU and CUDA" in said, "" if "built (CPU and CUDA" in said else said[-600:]
    found = {"check": "extension", "ok": ok, "detail": why, "seconds": time.time() - child.begun}
    plan.take({"record": found, "label": "extension", "block": "build"})


def _environment(plan: Plan) -> dict[str, str]:
    # On a CPU the program is tested, in several processes at once, whose threads would wait for each other.
    return warm.cache_in(plan.cache) | ({"OMP_NUM_THREADS": "1"} if plan.device == "cpu" else {})


def start_warming(plan: Plan, blocks: Sequence[Block]) -> Child:
    """Start compiling what blocks will launch, in their order."""
    major, minor = capability()
    arch, names = 10 * major + minor, [block.name for block in blocks]
    command = plan.command("warm", names, "--arch", arch, "--jobs", os.cpu_count() or 1)
    return Child(f"warm-{names[0]}", command, plan.out, _environment(plan))


@dataclass
class Crew:
    """The processes that run now, looked after in one loop."""

    plan: Plan
    background: dict[str, Child] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    seen: int = 0

    def tick(self) -> None:
        """Read what the processes told, start lost ones again, and save what is new."""
        for name, child in self.background.items():
            for line in child.read() if child.lines.exists() else ():
                self.plan.take(line | {"block": name})
        self.workers = [worker for worker in self.workers if worker.tick()]
        if len(self.plan.collected.lines) > self.seen:
            self.seen = len(self.plan.collected.lines)
            self.plan.collected.save()

    def wait(self, until: float, over: Callable[[], bool]) -> bool:
        """Look after everything until ``over``, or time is up; whether it was over."""
        while not over():
            if time.time() > until:
                return False
            self.tick()
            time.sleep(0.1)
        self.tick()
        return True

    def kill(self) -> None:
        """End everything at once."""
        for worker in self.workers:
            worker.kill()
        for child in self.background.values():
            child.kill()
        self.workers.clear()


def _work(plan: Plan, crew: Crew, block: Block, seconds: float) -> None:
    """Run a block to its end or its time, in as many processes as it may have, and note what it took."""
    begun = time.time()
    until = begun + seconds
    done = plan.out / f"{block.name}.done"
    done.write_text(json.dumps((plan.collected.before or {}).get("done", {}).get(block.name, [])), encoding="utf-8")
    environment = _environment(plan) | ({} if block.timed else _FEW)

    def start(name: str, child: str, blocks: Sequence[str], part: int, parts: int) -> Worker:
        command = plan.command(child, blocks, "--part", part, parts, "--done", done)
        return Worker(name, block.name, command, plan.out, environment, until, plan.grace, plan.take)

    for part in range(block.processes):
        crew.workers.append(start(f"{block.name}-{part}", "cases", [block.name], part, block.processes))
    if block.name == "checks" and plan.device == "cuda":
        later = [name for name in ("nodes", "networks") if name in plan.blocks]
        for part in range(PREPARING if later else 0):
            crew.workers.append(start(f"peers-{part}", "prepare", later, part, PREPARING))
    crew.wait(until + 3 * plan.grace + 30, lambda: not crew.workers)
    plan.collected.timetable.append(
        {"block": block.name, "at": begun - plan.collected.started, "seconds": time.time() - begun, "given": seconds}
    )


def run(plan: Plan) -> None:
    """Do everything; an interruption ends all processes and is raised on."""
    crew = Crew(plan)
    blocks = [BLOCKS[name] for name in plan.blocks if name in BLOCKS]
    try:
        if "build" in plan.blocks:
            crew.background["build"] = build(plan)
        first = [block for block in blocks if not block.last]
        if plan.device == "cuda" and first:
            crew.background["warm"] = start_warming(plan, first)
        for position, block in enumerate(blocks):
            if plan.bar is not None:
                plan.bar.set_postfix_str(block.title)
            _ready(plan, crew, block)
            left = max(0.0, plan.end - time.time() - plan.grace)
            _work(plan, crew, block, left * block.seconds / sum(b.seconds for b in blocks[position:]))
            plan.collected.save()
            if plan.bar is not None:
                plan.bar.update()
        if "build" in crew.background:
            _finish_build(plan, crew)
    finally:
        crew.kill()
        crew.tick()


def _finish_build(plan: Plan, crew: Crew) -> None:
    child = crew.background["build"]
    crew.wait(min(plan.end, child.begun + BUILD_SECONDS), lambda: not child.running)
    del crew.background["build"]
    built(plan, child)


def _ready(plan: Plan, crew: Crew, block: Block) -> None:
    """Wait for what a block needs: its kernels compiled; the extension, but for the first; silence, if it is timed."""
    if block.name != "roots" and "build" in crew.background:
        _finish_build(plan, crew)
    if block.last and plan.device == "cuda":
        # Its kernels are many, and what comes before does not wait for them.
        crew.background["warm"] = start_warming(plan, [block])
    child = crew.background.get("warm")
    if child is None:
        return
    until = min(plan.end, child.begun + WARM_SECONDS)
    crew.wait(until, lambda: not child.running or (block.name in plan.warmed and not block.timed))
    if block.timed:
        # Compilers beside a measurement would be measured.
        if child.running:
            plan.take({"left_out": "what was not compiled by then", "block": "warm"})
            child.kill()
        elif child.process.returncode != 0:
            found = {"check": "compiling beforehand", "ok": False, "detail": child.said()}
            plan.take({"record": found, "label": "compiling beforehand", "block": "warm"})
        crew.tick()
        del crew.background["warm"]


@contextlib.contextmanager
def terminated_is_interrupted() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, with everything kept."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(blocks: int) -> Any:
    """A bar of blocks, where somebody looks."""
    return tqdm(total=blocks, unit="block", disable=not sys.stderr.isatty())
