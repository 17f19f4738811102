"""``python -m dla_fast tune``: measure tile configurations on this GPU, and write the table that its kernels read."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dla_fast import functional, models, use_backend
from dla_fast.bench import cases, files, timing
from dla_fast.bench.records import machine_facts, versions
from dla_fast.commands import CommandError
from dla_fast.commands.options import number, whole, writable
from dla_fast.kernels import config, table
from dla_fast.kernels.config import Key, TileConfig
from dla_fast.proof import measure, parity

# What is faster by less than this is not told from noise.
LEAST_GAIN = 0.03
Clock = Callable[[Callable[[], object], torch.device], float]


@dataclass(frozen=True)
class Problem:
    """One case in one mode, as a pass to run and the result it should have."""

    label: str
    call: Callable[[], list[Tensor]]
    device: torch.device


@dataclass
class Entry:
    """The best configuration of a problem's kernel beside the heuristic's.

    Attributes:
        key: of the table.
        best: the configuration.
        ms: of the pass it serves, in milliseconds.
        heuristic_ms: of the same pass as the heuristic has it.
        tried: configurations that ran and were right.
        refused: those that were wrong or did not run, with the reason.
    """

    key: Key
    best: TileConfig
    ms: float
    heuristic_ms: float
    tried: int = 0
    refused: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As the table's file has it."""
        _, kernel, dtype, m, k, n = self.key
        sizes = {"kernel": kernel, "dtype": dtype, "m": m, "k": k, "n": n}
        return sizes | {"config": asdict(self.best), "ms": self.ms, "heuristic_ms": self.heuristic_ms}


def candidates(kernel: str, first: TileConfig) -> list[TileConfig]:
    """The heuristic's configuration, then its neighbours: one thing varied at a time, and the tile's sides together."""
    around = [first]
    sides = [(m, n) for m in (0.5, 1, 2) for n in (0.5, 1, 2)]
    if kernel == "fused":
        # Its tile must hold every output channel.
        sides = [(m, 1) for m in (0.5, 1, 2)]
    for m, n in sides:
        block_m, block_n = int(first.block_m * m), int(first.block_n * n)
        if min(block_m, block_n) >= (16 if first.block_k else 1) and block_m * block_n <= 2**15:
            around += [replace(first, block_m=block_m, block_n=block_n, num_warps=w) for w in (4, 8)]
    if first.block_k:
        around += [replace(first, num_stages=stages) for stages in (2, 3, 4)]
        around += [replace(first, block_k=k) for k in (first.block_k // 2, first.block_k * 2) if 16 <= k <= 128]
    return list(dict.fromkeys(around))


@contextlib.contextmanager
def noting() -> Iterator[dict[Key, TileConfig]]:
    """Note every problem that a kernel asks a configuration for, and what it is given."""
    asked: dict[Key, TileConfig] = {}
    right = config.choose

    def choose(kernel: str, m: int, k: int, n: int, dtype: torch.dtype, arch: int, *rest: Any) -> TileConfig:
        given = right(kernel, m, k, n, dtype, arch, *rest)
        asked[table.key(arch, kernel, dtype, m, k, n)] = given
        return given

    choose.cache_clear = right.cache_clear  # type: ignore[attr-defined]
    try:
        config.choose = choose  # type: ignore[assignment]
        config.install({})
        yield asked
    finally:
        config.choose = right
        config.install({})


def pass_of(case: cases.Case, mode: str, batch: int, dtype: torch.dtype, layout: str, device: torch.device) -> Problem:
    """A case as a pass on Triton: inference, or forward and backward."""
    spec = case.spec(batch, dtype, layout, training=mode == "training")
    problem = parity.PROBLEMS[case.op](spec, None if device.type == "cpu" else device)
    tensors = problem.materialise(None, device)
    wanted = [tensors[name] for name in problem.differentiable]

    def call() -> list[Tensor]:
        with use_backend("triton"):
            if mode == "inference":
                with torch.no_grad():
                    return [problem.call(functional, tensors, None)]
            y = problem.call(functional, tensors, None)
            return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    return Problem(f"{case.name} {mode} batch {batch}", call, device)


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a pass on the device: the median of repeats of its CUDA graph, or of calls where it has none."""
    replay = timing.graph_of([call], device) if device.type == "cuda" else None
    timed = measure.interleave({"pass": replay or call}, rounds=7, warmup=2, min_sample_ms=2.0, device=device)
    return timed["pass"].median_ms


def tune(problem: Problem, known: Iterable[Key], time_pass: Clock = clock) -> list[Entry]:
    """Tune every kernel of a pass, one after the other.

    A candidate is timed only after its results were found equal to the heuristic's; what does not compile, does not
    fit or is wrong is refused with its reason.

    Args:
        problem: the pass.
        known: keys that were tuned already.
        time_pass: how a pass is timed, in milliseconds.
    """
    with noting() as asked:
        expected = [t.clone() for t in problem.call()]
    entries, done = [], set(known)
    for key, first in asked.items():
        if key in done:
            continue
        entry = Entry(key, first, 0.0, 0.0)
        for candidate in candidates(key[1], first):
            try:
                config.install({key: candidate})
                results = problem.call()
                errors = [timing.difference(t, e) for t, e in zip(results, expected, strict=True)]
                if not max(errors) <= timing.tolerance(expected[0].dtype, problem.device):
                    entry.refused.append(f"{candidate}: differs by {max(errors):.1e} of the largest value")
                    continue
                ms = time_pass(problem.call, problem.device)
            except Exception as error:
                entry.refused.append(f"{candidate}: {timing.one_line(error)}")
                continue
            finally:
                table.TABLE.pop(key, None)
                config.install({})
            entry.tried += 1
            if candidate == first:
                entry.ms = entry.heuristic_ms = ms
            elif ms < min(entry.ms, entry.heuristic_ms * (1 - LEAST_GAIN)):
                entry.best, entry.ms = candidate, ms
        if entry.tried:
            config.install({key: entry.best})
            entries.append(entry)
    return entries


def write(path: Path, entries: list[Entry], device: torch.device) -> None:
    """Write the table at one stroke, with the machine it was measured on."""
    data = {
        "machine": machine_facts(device, {}),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "entries": [e.to_dict() for e in entries],
    }
    files.write(path, json.dumps(data, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``tune``."""
    parser.add_argument("--models", nargs="+", default=["dla34", "dla60", "dla102"], choices=models.list_models())
    parser.add_argument("--batch", nargs="+", type=whole(), default=[1, 32, 256], metavar="N", help="images")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layout", default="channels_last", choices=list(cases.LAYOUTS))
    parser.add_argument("--minutes", type=number(above=0), default=20.0, help="start no new pass after this time")
    parser.add_argument("--out", type=writable, metavar="FILE", help="the table (default: where the kernels read it)")


def run(args: argparse.Namespace) -> int:
    """Tune on this GPU; what is done is in the table even when interrupted."""
    from tqdm import tqdm

    if not torch.cuda.is_available():
        raise CommandError("no CUDA device was found: tile configurations are measured on the GPU they are for")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = config.arch_of(device)
    path = args.out or table.table_path(arch)
    reason = files.why_not(path)
    if reason is not None:
        raise CommandError(f"{path} cannot be written: {reason}; --out names another file")
    found = {c.name: c for name in args.models for c in cases.network_cases(name)} | {
        c.name: c for c in cases.ida_cases()
    }
    dtype, entries = cases.DTYPES[args.dtype], list[Entry]()
    work = [(case, mode, b) for b in args.batch for case in found.values() for mode in ("inference", "training")]
    until = time.monotonic() + 60 * args.minutes
    status = 0
    try:
        for case, mode, batch in tqdm(work, unit="pass", disable=not sys.stderr.isatty()):
            if time.monotonic() > until:
                print("tune: time was up; the rest keeps the heuristic's configurations", file=sys.stderr)
                break
            entries += tune(pass_of(case, mode, batch, dtype, args.layout, device), [e.key for e in entries])
            write(path, entries, device)
    except KeyboardInterrupt:
        print("tune: interrupted; what is done is kept", file=sys.stderr)
        status = 130
    better = [e for e in entries if e.ms < e.heuristic_ms]
    for e in sorted(better, key=lambda e: e.ms / e.heuristic_ms):
        print(f"{' '.join(map(str, e.key[1:]))}: {e.best}, {e.heuristic_ms / e.ms:.2f}x the heuristic's")
    print(f"tune: {len(better)} of {len(entries)} problems are faster than by the heuristic; {path}")
    return status
