"""``python -m benchmarks.gates.traffic``: the kernels' bytes, counted in Triton's interpreter, beside the floor.

For every root of the networks, links of chains, every step of the dense-prediction ladders at 512x512 and every other
batch norm of dla34, in inference, training forward and backward: per kernel the bytes moved (each distinct byte of an
operand once per launch that reads or writes it), the floor of the design and their ratio, the bytes of weights, which
the floor leaves out, and the bytes issued, re-reads by other tiles included, which a GPU's L2 cache has to absorb.
Exits 1 where a pass moves more than 1.05 times its floor. Needs no GPU.
"""

from __future__ import annotations

import os

# Triton reads it when it is imported, in the processes that do the work too.
os.environ["TRITON_INTERPRET"] = "1"

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.gates import quick_interpreter
from benchmarks.gates.passes import MODES, Row, Unit, measure, over
from dla_fast import models, use_backend
from dla_fast.bench import DTYPES, LAYOUTS, Case, ida_cases, network_cases

LIMIT = 1.05
NETWORKS = ("dla34", "dla60", "dla102", "dla169")
# Channels of the levels that the ladders of the dense-prediction networks join.
LADDERS = {"dla34up": (64, 128, 256, 512), "dla60up and dla102up": (128, 256, 512, 1024)}
SUITES = ("roots", "ida", "norms", "chains")
# 1 x 1 units whose first input is z of the unit before: inputs, outputs, side of the map, whether it has a residual.
CHAINS = (
    ((64,), 128, 56, False),
    ((128,), 256, 28, False),
    ((64, 64), 64, 56, True),
    ((128, 128, 64), 128, 28, True),
    ((128, 128, 64, 128), 128, 28, False),
)


def norms(network: str, size: int = 224) -> list[Case]:
    """The batch norms of a network outside of its nodes, alike ones once."""
    found: dict[tuple[int, int, int, bool], Case] = {}

    def note(label: str) -> Callable[..., None]:
        # The second norm of a block takes the shortcut.
        residual = label.endswith("bn2")

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            _, channels, height, width = args[0].shape
            case = Case(label, (channels,), channels, height, width, residual, op="batch_norm_act")
            found.setdefault((channels, height, width, residual), case)

        return hook

    model = models.create_model(network, device="meta").eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(note(f"{network}.{name}"))
    with torch.no_grad(), use_backend("reference"):
        model(torch.empty(1, 3, size, size, device="meta"))
    return list(found.values())


def units(suites: Iterable[str], networks: Iterable[str], layouts: Iterable[str], dtype: str) -> list[Unit]:
    """What is measured, alike ones once: how much of an operand is moved does not depend on the number of pixels."""
    cases: list[tuple[Case, int]] = []
    for suite in suites:
        if suite == "roots":
            cases += [(case, 256) for network in networks for case in network_cases(network, 224)]
        elif suite == "chains":
            cases += [(Case("link", i, n, side, side, residual, op="chain"), 256) for i, n, side, residual in CHAINS]
        elif suite == "norms":
            cases += [(case, 256) for case in norms("dla34")]
        else:
            cases += [(case, 16) for name, channels in LADDERS.items() for case in ida_cases(channels, name=name)]
    found: dict[object, Unit] = {}
    for (case, batch), layout in itertools.product(cases, layouts):
        key = (case.op, case.in_channels, case.out_channels, case.residual, case.factor, case.height, layout)
        found.setdefault(key, Unit(case, batch, DTYPES[dtype], layout))
    return list(found.values())


def _start() -> None:
    torch.set_num_threads(1)
    quick_interpreter.install()


def _measured(work: tuple[Unit, str]) -> tuple[list[Row], str]:
    """Rows, or an error in words: one node must not hide the others'."""
    try:
        return measure(*work), ""
    except Exception as error:
        return [], f"{work[0].label} {work[0].layout} {work[1]}: {type(error).__name__}: {error}"


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned; megabytes."""
    lines = [["op", "pass: kernel", "moved", "floor", "ratio", "weights", "issued", ""]]
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates.traffic", description=__doc__)
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=SUITES)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this in its name or shapes")
    parser.add_argument("--passes", action="store_true", help="print whole passes alone, without their kernels")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)

    chosen = units(args.suites, args.networks, args.layouts, args.dtype)
    chosen = [u for u in chosen if args.only in f"{u.case.name} {u.label}"]
    # Large ones first, so that the processes end together.
    work = sorted(
        ((unit, mode) for unit in chosen for mode in unit.modes if mode in args.modes),
        key=lambda w: -sum(w[0].case.in_channels) * w[0].case.out_channels * (1 + 4 * MODES.index(w[1])),
    )
    if not work:
        print("traffic: nothing was chosen", file=sys.stderr)
        return 2
    rows: dict[tuple[Unit, str], list[Row]] = {}
    errors = []
    progress = tqdm(total=len(work), unit="pass", disable=not sys.stderr.isatty(), leave=False)
    with progress, ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), initializer=_start) as pool:
        for one, (found, error) in zip(work, pool.map(_measured, work), strict=True):
            rows[one] = found
            errors += [error] if error else []
            progress.update()
    for layout in args.layouts:
        shown = [r for unit in chosen if unit.layout == layout for m in MODES for r in rows.get((unit, m), [])]
        if shown:
            print(f"{layout}, {args.dtype}, batch 256 at 224x224, 16 at 512x512; megabytes")
            print(table([r for r in shown if r.gated or not args.passes]), end="\n\n")
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
        f"traffic: {len(gated) - len(missed)} of {len(work)} passes of {len(chosen)} ops within {LIMIT} of the floor; "
        f"worst {worst:.3f}"
    )
    return 1 if missed or errors else 0


if __name__ == "__main__":
    sys.exit(main())
