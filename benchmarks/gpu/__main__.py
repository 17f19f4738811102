"""``python -m benchmarks.gpu``: everything that only a GPU can tell, in one run of under eight minutes.

It builds the extension and compiles every kernel that it will launch, on all cores; then it checks (parity of every op
and dtype against float64, gradients, determinism, CUDA graphs, torch.compile, whole networks) and measures (nodes and
whole networks beside eager and compiled peers, kernel by kernel, as shares of the machine's floor). Blocks run in
processes of their own, so that a crash or a hang costs the case it happened in. OUT/gpu.json holds all of it and is
whole at any moment; OUT/gpu.txt says it in words. Only wrong results fail a run: goals that were missed are told.

Without a GPU, ``--rehearse`` compiles all of it for one, runs every block's Python, and prints the timetable.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import child, rehearsal, report
from benchmarks.gpu import run as running
from benchmarks.gpu.blocks import BLOCKS
from dla_fast.bench.records import NotARun

OUT = Path(__file__).resolve().parents[1] / "out"
MINUTES = 7.5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)")
    names = ["build", *BLOCKS]
    parser.add_argument("--blocks", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--continue", dest="before", type=Path, metavar="FILE",
        help="an earlier gpu.json: what went well there is kept, what failed or was left out is done",
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="everything that needs no GPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu", "meta"], help="cpu tests this program")
    parser.add_argument("--small", action="store_true", help="the smallest shapes alone, for testing this program")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="of compiled kernels and logs (default: OUT/cache)"
    )
    parser.add_argument("--arch", type=int, default=90, help="to rehearse for; 90 is sm_90 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile in a rehearsal")
    parser.add_argument("--grace", type=float, default=running.GRACE, help=argparse.SUPPRESS)
    parser.add_argument("--patience", type=float, default=1.0, help=argparse.SUPPRESS)
    for hidden, kind in (("--child", str), ("--lines", Path), ("--done", Path), ("--skip", int), ("--until", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--child-blocks", nargs="+", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs=2, type=int, default=(0, 1), help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all blocks: 0 where nothing is wrong or there is no GPU, 1 where something is, 130 after an interruption."""
    args = _parser().parse_args(arguments)
    if args.child:
        args.skip, args.until = args.skip or 0, args.until or time.time() + 1e6
        return child.main(args)
    if args.rehearse:
        return rehearsal.main(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu: no CUDA device was found, so nothing was measured; --rehearse does what needs none")
        return 0
    try:
        before = report.load(args.before) if args.before else None
    except NotARun as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    collected = report.Collected(args.out / "gpu.json", args.device, before)
    cache = args.cache or args.out / "cache"
    how = (args.grace, args.patience, collected)
    plan = running.Plan(args.device, args.small, args.minutes, args.blocks, cache / "processes", cache, *how)
    shutil.rmtree(plan.out, ignore_errors=True)
    plan.out.mkdir(parents=True)
    interrupted = False
    with running.progress(len([name for name in args.blocks if name in BLOCKS])) as bar:
        plan.bar, plan.say = bar, bar.write
        try:
            with running.terminated_is_interrupted():
                running.run(plan)
        except KeyboardInterrupt:
            interrupted = True
    data = collected.save(complete=not interrupted)
    (args.out / "gpu.txt").write_text(report.summary(data, long=True) + "\n", encoding="utf-8")
    print(report.summary(data))
    print(f"records: {collected.path}")
    if interrupted:
        print("gpu: interrupted; what was done is kept", file=sys.stderr)
        return 130
    return 1 if report.failures(data) else 0


if __name__ == "__main__":
    sys.exit(main())
