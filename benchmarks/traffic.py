"""``python -m benchmarks.traffic``: the bytes that the kernels move, counted in Triton's interpreter, beside the floor.

For every root of the networks, in inference, training forward and backward: per kernel the bytes moved (each distinct
byte of an operand once per launch that reads or writes it), the floor of the design and their ratio, the bytes of
weights, which the floor leaves out, and the bytes issued, re-reads by other tiles included, which a GPU's L2 cache has
to absorb. Exits 1 where a pass moves more than 1.05 times its floor. Needs no GPU.
"""

from __future__ import annotations

import os

# Triton reads it when it is imported, in the processes that do the work too.
os.environ["TRITON_INTERPRET"] = "1"

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from tqdm import tqdm

from benchmarks._roots import MODES, Root, Row, measure, over
from dla_fast.commands.bench import DTYPES, LAYOUTS, network_cases

LIMIT = 1.05
NETWORKS = ("dla34", "dla60", "dla102", "dla169")


def roots(networks: Iterable[str], layouts: Iterable[str], batch: int, dtype: str) -> list[Root]:
    """The roots of networks, alike ones once."""
    found: dict[object, Root] = {}
    for name, layout in itertools.product(networks, layouts):
        for case in network_cases(name, 224):
            key = (case.in_channels, case.out_channels, case.height, case.width, case.residual, layout)
            found.setdefault(key, Root(case, batch, DTYPES[dtype], layout))
    return list(found.values())


def _measured(work: tuple[Root, str]) -> tuple[list[Row], str]:
    """Rows, or an error in words: one node must not hide the others'."""
    torch.set_num_threads(1)
    try:
        return measure(*work), ""
    except Exception as error:
        return [], f"{work[0].case.name} {work[0].layout} {work[1]}: {type(error).__name__}: {error}"


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned; megabytes."""
    lines = [["node", "pass: kernel", "moved", "floor", "ratio", "weights", "issued", ""]]
    for r in rows:
        figures = [r.moved, r.floor, r.weights, r.issued]
        moved, floor, weights, issued = ["-" if f is None else f"{f / 1e6:.2f}" for f in figures]
        ratio = "-" if r.ratio is None else f"{r.ratio:.3f}"
        verdict = ("over" if over([r], LIMIT) else "ok") if r.gated else ""
        lines.append([r.case, r.what, moved, floor, ratio, weights, issued, verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 1, 7) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and judge: 0 when every pass is within the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--batch", type=int, default=256, help="images at 224x224 (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", default="", metavar="TEXT", help="nodes whose name holds this")
    parser.add_argument("--passes", action="store_true", help="print whole passes alone, without their kernels")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)

    nodes = [r for r in roots(args.networks, args.layouts, args.batch, args.dtype) if args.only in r.case.name]
    # Large ones first, so that the processes end together.
    work = sorted(
        itertools.product(nodes, args.modes),
        key=lambda w: -sum(w[0].case.in_channels) * w[0].case.out_channels * (1 + 4 * MODES.index(w[1])),
    )
    if not work:
        print("traffic: no node was chosen", file=sys.stderr)
        return 2
    rows: dict[tuple[Root, str], list[Row]] = {}
    errors = []
    progress = tqdm(total=len(work), unit="pass", disable=not sys.stderr.isatty(), leave=False)
    with progress, ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for one, (found, error) in zip(work, pool.map(_measured, work), strict=True):
            rows[one] = found
            errors += [error] if error else []
            progress.update()
    for layout in args.layouts:
        chosen = [r for one in itertools.product(nodes, args.modes) if one[0].layout == layout for r in rows[one]]
        if chosen:
            print(f"{layout}, {args.dtype}, batch {args.batch} at 224x224; megabytes")
            print(table([r for r in chosen if r.gated or not args.passes]), end="\n\n")
    gated = [r for found in rows.values() for r in found if r.gated]
    missed = over(gated, LIMIT)
    print(
        "moved: each distinct byte of a pixel map or of partial moments once per launch; weights (with partial sums of "
        "dW) and vectors apart. Measured over whole tiles of a few pixels, with the tiles of the real size, and scaled "
        "to it: the share of an operand that a launch touches does not depend on the number of pixels."
    )
    for error in errors:
        print(f"traffic: {error}")
    worst = max((r.ratio or 0.0 for r in gated), default=0.0)
    print(
        f"traffic: {len(gated) - len(missed)} of {len(work)} passes of {len(nodes)} nodes within {LIMIT} of the floor; "
        f"worst {worst:.3f}"
    )
    return 1 if missed or errors else 0


if __name__ == "__main__":
    sys.exit(main())
