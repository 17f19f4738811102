"""``python -m benchmarks.gates.aot``: every specialisation that ships, compiled ahead for GPUs that are not here.

Prints registers, shared memory, spills and occupancy, and exits 1 on a kernel that does not compile, on a spill, on
shared memory over the target's limit, on a half-precision product without a matrix instruction, and on sm_90 on one
without wgmma where its tile allows it. For sm_90 it then predicts the time of every node and pass on an H200
(:mod:`benchmarks.gates.predict`), and exits 1 where one's share of its floor is under its line.

Results are kept between runs under benchmarks/out, by the content they follow from: the kernel's source with all it
calls, the specialisation, Triton's version, the target; for a prediction the launch's sizes too.
"""

from __future__ import annotations

import os

# Triton reads it when it is imported: the interpreter cannot compile.
os.environ["TRITON_INTERPRET"] = "0"

import argparse
import hashlib
import importlib
import json
import pkgutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from benchmarks.gates import compiled, predict
from benchmarks.gates.compiled import TARGETS, Result, compile_one, source
from benchmarks.gates.model import H200
from benchmarks.gates.prediction import Prediction, aligned

CACHE = Path(__file__).resolve().parents[1] / "out" / "aot"


def shipping_modules() -> list[str]:
    """The modules of the package's kernels that list what ships."""
    kernels = importlib.import_module("dla_fast.kernels")
    names = [f"{kernels.__name__}.{m.name}" for m in pkgutil.iter_modules(kernels.__path__)]
    return [name for name in names if hasattr(importlib.import_module(name), "specialisations")]


def shipped(modules: Sequence[str], target: str) -> list[Any]:
    """The specialisations of modules for a target, in order; without float64 on AMD's."""
    config = importlib.import_module("dla_fast.kernels.config")
    with config.assume(TARGETS[target].number):
        drawn = [s for name in modules for s in importlib.import_module(name).specialisations()]
    return [s for s in drawn if TARGETS[target].backend == "cuda" or s.dtype != "fp64"]


def key(s: Any, target: str) -> str:
    """What a result follows from, as a hash; the code that reads the binary is part of it."""
    parts = (
        source(s).hash(),
        s.options,
        s.name,
        triton.__version__,
        target,
        Path(compiled.__file__).read_text(encoding="utf-8"),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load(path: Path) -> Result | None:
    """A kept result; None where there is none that can be read."""
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def save(result: Result, path: Path) -> None:
    """Keep a result, at one stroke."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(result.to_dict()), encoding="utf-8")
    beside.replace(path)


_specialisations: dict[str, list[Any]] = {}


def _start(modules: Sequence[str], targets: Sequence[str]) -> None:
    _specialisations.update({target: shipped(modules, target) for target in targets})


def _compile(index: int, target: str, path: str) -> Result:
    result = compile_one(_specialisations[target][index], TARGETS[target])
    if not result.error:
        save(result, Path(path))
    return result


def table(results: Sequence[Result], every: bool) -> str:
    """Registers, shared memory, spills, occupancy: a line for each kernel, dtype and target, or for everything."""
    lines = [["kernel", "dtype", "target", "n", "registers", "shared", "spilled", "occupancy", "matrix"]]
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        groups.setdefault((r.name if every else r.kernel, r.dtype, r.target), []).append(r)
    for names, group in sorted(groups.items()):
        made = [r for r in group if not r.error]
        spans = []
        for values in ([r.registers for r in made], [r.shared for r in made], [r.spilled for r in made]):
            low, high = min(values, default=0), max(values, default=0)
            spans.append(str(low) if low == high else f"{low}..{high}")
        shares = [r.occupancy for r in made] or [0.0]
        spans.append(f"{min(shares):.0%}" if min(shares) == max(shares) else f"{min(shares):.0%}..{max(shares):.0%}")
        matrix = sorted({kind.split(".")[0] for r in made for kind in r.matrix})
        lines.append([*names, str(len(group)), *spans, "+".join(matrix) or "-"])
    return aligned(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and judge: 0 when everything may ship."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates.aot", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="default: all of dla_fast.kernels")
    parser.add_argument("--only", default="", metavar="TEXT", help="specialisations whose name holds this")
    parser.add_argument("--every", action="store_true", help="a line for every specialisation")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument(
        "--predict",
        metavar="TEXT",
        help="predict the passes whose name or shapes hold this (default: all; none with --modules or --only)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results and predictions there")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)

    start = time.perf_counter()
    modules = args.modules or shipping_modules()
    results: dict[tuple[int, str], Result] = {}
    missing = []
    for target in args.targets:
        for index, s in enumerate(shipped(modules, target)):
            if args.only not in s.name:
                continue
            path = args.cache / f"{key(s, target)}.json"
            kept = load(path)
            if kept is None:
                missing.append((index, target, str(path)))
            else:
                results[index, target] = kept
    if not results and not missing:
        print("aot: nothing was chosen", file=sys.stderr)
        return 2
    fresh = len(missing)
    with tempfile.TemporaryDirectory() as triton_cache:
        os.environ["TRITON_CACHE_DIR"] = triton_cache
        pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), _start, (modules, args.targets))
        with pool, tqdm(total=fresh, unit="kernel", disable=not sys.stderr.isatty(), leave=False) as progress:
            jobs = {pool.submit(_compile, *one): one[:2] for one in missing}
            for done in as_completed(jobs):
                results[jobs[done]] = done.result()
                progress.update()
    ordered = [results[at] for at in sorted(results)]
    print(table(ordered, args.every))
    faulty = [r for r in ordered if r.faults()]
    for r in faulty:
        print(f"aot: {r.target} {r.name}: {'; '.join(r.faults())}")
    wanted = args.predict if args.predict is not None else None if args.modules or args.only else ""
    predicted: list[Prediction] = []
    errors: list[str] = []
    if wanted is not None and "sm_90" in args.targets:
        found, errors = predict.every(H200, args.cache / "features", wanted, args.jobs)
        predicted = [p for *_, made in found for p in made]
        if predicted:
            print(f"\non an {H200.name}, by the model:\n{predict.table(predicted)}\n{predict.verdict(predicted, H200)}")
        for error in errors:
            print(f"aot: no prediction: {error}")
    if args.json is not None:
        written = {"kernels": [r.to_dict() for r in ordered], "predictions": [p.to_dict() for p in predicted]}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(
        f"aot: {len(ordered) - len(faulty)} of {len(ordered)} kernels may ship (Triton {triton.__version__}; "
        f"{fresh} compiled now, {len(ordered) - fresh} kept from before; {time.perf_counter() - start:.0f} s)"
    )
    return 1 if faulty or errors or any(p.under for p in predicted) else 0


if __name__ == "__main__":
    sys.exit(main())
