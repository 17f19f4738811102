"""``python -m benchmarks.gates.predict``: the time of every node and pass on a GPU that is not here, beside its floor.

Nothing is measured: kernels are compiled, their machine code is followed with the launch's real arguments, and the
model of :mod:`benchmarks.gates.model` makes a time of it. ``--loops`` shows every launch; ``--beside gpu.json`` puts
a run on a GPU beside the predictions. Exits 1 where a share is under its line (:mod:`benchmarks.gates.lines`).
"""

from __future__ import annotations

import os

# Triton reads it when it is imported: the interpreter cannot compile.
os.environ["TRITON_INTERPRET"] = "0"

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from benchmarks.gates import beside, plan
from benchmarks.gates.launches import features
from benchmarks.gates.lines import line_of
from benchmarks.gates.model import MACHINES, Machine, library_time, predict
from benchmarks.gates.prediction import Predicted, Prediction, aligned

CACHE = Path(__file__).resolve().parents[1] / "out" / "aot" / "features"
# Kernels whose share is asked for by themselves: kernel -> pass. What else a pass launches is told apart by its name.
PASSES = {
    "tail_kernel": "tail",
    "apply_kernel": "apply",
    "reduce_kernel": "reduce",
    "moments_kernel": "moments",
    "upsample_kernel": "upsample",
    "backward_kernel": "upsample_backward",
}


def timed(work: plan.Work, machine: Machine, cache: Path | None) -> list[Predicted]:
    """Every step of a pass with its predicted time."""
    found = []
    for step in plan.steps(work):
        if isinstance(step, plan.LibraryCall):
            found.append(
                Predicted(f"[{step.name}]", None, library_time(step.bytes, step.flops, machine, step.channels))
            )
        else:
            f = features(step, work.unit.dtype, machine.memory, cache)
            found.append(Predicted(f.kernel, f, predict(f, machine)))
    return found


def predictions(work: plan.Work, steps: Sequence[Predicted], machine: Machine) -> list[Prediction]:
    """The prediction of a pass, and of each of its kernels that has a floor."""
    unit, case = work.unit, work.unit.case

    def made(what: str, some: Sequence[Predicted], floor: float) -> Prediction:
        seconds = sum(s.time.total for s in some)
        longest = max(some, key=lambda s: s.time.total)
        line = line_of(what, unit.layout, case.height)
        return Prediction(
            op=unit.label,
            kernels=[s.name for s in some],
            what=what,
            layout=unit.layout,
            dtype=str(unit.dtype).removeprefix("torch."),
            batch=unit.batch,
            height=case.height,
            share=round(floor / seconds, 4),
            us=round(1e6 * seconds, 2),
            floor_us=round(1e6 * floor, 2),
            bound=longest.time.bound if len(some) == 1 else f"{longest.name}: {longest.time.bound}",
            library=any(s.features is None for s in some),
            goal=line.goal if line else None,
            line=line.line if line else None,
        )

    found = []
    if work.kind != "maps":
        bytes_, flops = plan.floor_of(work)
        floor = max(bytes_ / machine.copy, flops / machine.matrix)
        if work.kind == "merge":
            floor = library_time(bytes_, flops, machine, case.out_channels).total
        found.append(made(work.kind, steps, floor))
    if work.kind != "merge":
        floors = unit.floors([s.name for s in steps])
        for step in steps:
            if step.name in floors and len(steps) > 1 or work.kind == "maps" and step.name in floors:
                what = PASSES.get(step.name, f"{work.mode}: {step.name}")
                if case.op == "upsample_add":
                    what = "upsample_add"
                found.append(made(what, [step], floors[step.name] * unit.dtype.itemsize / machine.copy))
    return found


_works: list[plan.Work] = []


def _start() -> None:
    _works.extend(plan.works())


def _attempt(work: plan.Work, machine: Machine, cache: Path | None) -> tuple[list[Predicted], str]:
    """Steps, or an error in words: one pass must not hide the others."""
    try:
        return timed(work, machine, cache), ""
    except Exception as error:
        return [], f"{work.label}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _work(at: int, machine: Machine, cache: Path | None) -> tuple[list[Predicted], str]:
    return _attempt(_works[at], machine, cache)


def every(
    machine: Machine, cache: Path | None = CACHE, only: str = "", jobs: int = 2
) -> tuple[list[tuple[plan.Work, list[Predicted], list[Prediction]]], list[str]]:
    """Everything that is predicted, compiled and followed where no features are kept of it; and what cannot be."""
    works = plan.works()
    chosen = [i for i, w in enumerate(works) if only in w.label]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        if jobs > 1 and len(chosen) > 1:
            with ProcessPoolExecutor(jobs, get_context("spawn"), _start) as pool:
                n = len(chosen)
                made = list(pool.map(_work, chosen, [machine] * n, [cache] * n))
        else:
            made = [_attempt(works[i], machine, cache) for i in chosen]
    found = [
        (works[i], steps, predictions(works[i], steps, machine))
        for i, (steps, error) in zip(chosen, made, strict=True)
        if not error
    ]
    return found, [error for _, error in made if error]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def table(found: Iterable[Prediction]) -> str:
    """A line for each prediction."""
    lines = [["op", "pass", "layout", "batch", "us", "floor us", "share", "goal", "line", "bound by", ""]]
    for p in found:
        figures = [f"{p.us:.1f}", f"{p.floor_us:.1f}", _share(p.share), _share(p.goal), _share(p.line)]
        verdict = "UNDER" if p.under else "library" if p.library else ""
        lines.append([p.op, p.what, p.layout, str(p.batch), *figures, p.bound, verdict])
    return aligned(lines)


def verdict(found: Sequence[Prediction], machine: Machine) -> str:
    """How many hold their lines and reach their goals, and which do not hold theirs."""
    judged = [p for p in found if p.line is not None]
    under = [p for p in judged if p.under]
    reached = sum(p.share >= (p.goal or 0.0) for p in judged)
    named = "".join(f"\nunder its line of {p.line:.0%}: {p.op} {p.what} {p.layout}, {p.share:.1%}" for p in under)
    return (
        f"predict: {len(judged) - len(under)} of {len(judged)} shares hold their line, {reached} reach their goal, "
        f"on an {machine.name} by the model{named}"
    )


def launches_table(found: Iterable[tuple[plan.Work, list[Predicted], list[Prediction]]]) -> str:
    """A line for each launch: what of it decides its time; the loops of its machine code below."""
    lines = []
    for work, steps, made in found:
        lines.append(f"{work.label}: " + "; ".join(f"{p.what} {p.us:.1f} us, {p.share:.0%}" for p in made))
        for step in steps:
            parts = {"latency": step.time.latency, **step.time.parts}
            times = " ".join(f"{k} {1e6 * v:.1f}" for k, v in sorted(parts.items(), key=lambda x: -x[1]) if v > 1e-7)
            lines.append(f"  {step.name}: {1e6 * step.time.total:.1f} us = {times}")
            f = step.features
            if f is not None:
                lines.append(
                    f"    {f.programs} programs of {f.warps} warps, {f.resident} a processor: {f.registers} registers, "
                    f"{f.shared} bytes shared; {f.issued} instructions in {f.cycles:.0f} cycles; 128-bit {f.wide:.0%}; "
                    f"{f.bytes / 1e6:.1f} MB, {f.asked / 1e6:.1f} MB of the cache"
                )
                lines += [
                    f"      loop of {int(trips) + 1} trips: {n:.0f} instructions a trip, {wide:.0f} of {moves:.0f} "
                    "accesses 128-bit"
                    for trips, n, wide, moves in f.loops
                ]
                lines.append("      " + " ".join(f"{k} {v}" for k, v in sorted(f.counts.items())))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict, print, and judge: 0 when every share holds its line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates.predict", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this in its name, shapes, layout or pass")
    parser.add_argument("--loops", action="store_true", help="every launch, with its loops")
    parser.add_argument("--machine", default="H200", choices=list(MACHINES))
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--beside", type=Path, metavar="FILE", help="put a run of benchmarks.gpu beside the predictions"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="write that run's times with the launches' features there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions there")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)

    start = time.perf_counter()
    found, errors = every(MACHINES[args.machine], args.cache, args.only, args.jobs)
    if not found and not errors:
        print("predict: nothing was chosen", file=sys.stderr)
        return 2
    if args.loops:
        print(launches_table(found), end="\n\n")
    flat = [p for *_, made in found for p in made]
    if args.beside is not None:
        run = json.loads(args.beside.read_text(encoding="utf-8"))
        print(beside.table(found, run), end="\n\n")
        if args.keep is not None:
            text = json.dumps(beside.kept(found, run, MACHINES[args.machine]))
            args.keep.write_text(text + "\n", encoding="utf-8")
    if flat:
        print(table(flat))
    for error in errors:
        print(f"predict: {error}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([p.to_dict() for p in flat], indent=1) + "\n", encoding="utf-8")
    print(f"{verdict(flat, MACHINES[args.machine])} ({time.perf_counter() - start:.0f} s)")
    return 1 if errors or any(p.under for p in flat) else 0


if __name__ == "__main__":
    sys.exit(main())
