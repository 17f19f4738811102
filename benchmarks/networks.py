"""Whole networks of the kept runs as Markdown: every runtime that was asked, beside the network swapped and frozen.

And the convolution units of those networks, each beside the machine's floor and the library's convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dla_fast.bench import peers
from dla_fast.bench.records import Comparison, Record, comparisons, geometric_mean, instruction_set
from dla_fast.bench.table import milliseconds

# What a cell is the best of.
EAGER = ("eager", "eager_other_layout")
COMPILED = tuple(impl for impl in peers.PEERS if impl.startswith("compile"))
OUTSIDE = ("onnxruntime", "openvino")
NAMES = {"inference": "inference", "training": "training step"}


def best(c: Comparison, impls: Sequence[str]) -> float | None:
    """The least median among some implementations; None where none was timed."""
    times = [c.by_impl[impl]["median_ms"] for impl in impls if impl in c.by_impl]
    return min(times) if times else None


def _milliseconds(c: Comparison | None, impls: Sequence[str]) -> str:
    time = None if c is None else best(c, impls)
    return "–" if time is None else milliseconds(time)


def _mine(c: Comparison | None, impl: str, against: Iterable[Sequence[str]]) -> str:
    """The time of an implementation, and how many times as fast that is as each of some groups of peers."""
    if c is None or impl not in c.by_impl:
        return "–"
    ms = c.by_impl[impl]["median_ms"]
    times = [best(c, impls) for impls in against]
    ratios = [f"{time / ms:.2f}x" for time in times if time is not None]
    return f"{milliseconds(ms)} ({', '.join(ratios)})" if ratios else milliseconds(ms)


def measured_on(run: dict[str, Any]) -> str:
    """The machine of a run, with what it copies in a second."""
    machine = run["machine"]
    where = [machine["processor"], instruction_set(machine) or "", f"{machine['threads']} threads"]
    if machine.get("bytes_per_s"):
        where.append(f"{machine['bytes_per_s'] / 1e9:.0f} GB/s copied")
    return ", ".join(filter(None, [*where, f"torch {run['versions']['torch']}"]))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The networks of some runs of one machine in float32 inference, and what a training step gains; empty for none.

    Args:
        runs: as in the JSON files.
    """
    found: dict[tuple[str, int], dict[str, Comparison]] = {}
    for run in runs:
        for c in comparisons(run["records"]):
            if c.mine["suite"] == "models" and c.mine["dtype"] == "float32":
                found.setdefault((c.mine["case"], c.mine["batch"]), {})[c.mine["mode"]] = c
    if not found:
        return ""
    columns = ["network", "batch", "eager", "compile", "ONNX Runtime", "OpenVINO", "swapped", "frozen", "training step"]
    lines = [
        "Milliseconds of inference in float32, medians of interleaved rounds, eager and `torch.compile` in their best "
        f"layout and mode; {measured_on(runs[0])}. In brackets how many times as fast as eager; frozen, as the best of "
        "PyTorch and of the other two; a training step, swapped, as the best of PyTorch.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for (name, batch), by_mode in sorted(found.items()):
        c, training = by_mode.get("inference"), by_mode.get("training")
        side = (c or training or next(iter(by_mode.values()))).mine["side"]
        cells = [f"{name}, {side}²", str(batch)]
        cells += [_milliseconds(c, impls) for impls in (EAGER, COMPILED, *([impl] for impl in OUTSIDE))]
        cells += [
            _mine(c, peers.SWAPPED, [EAGER]),
            _mine(c, peers.FROZEN, [(*EAGER, *COMPILED), OUTSIDE]),
            _mine(training, peers.SWAPPED, [(*EAGER, *COMPILED)]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(record: Record) -> str:
    return f"{record['flops'] / record['median_ms'] / 1e6:.0f}"


def _share(record: Record) -> str:
    return f"{record['floor_ms'] / record['median_ms']:.0%}" if record.get("floor_ms") else "–"


def _unit_row(mode: str, by_batch: dict[int, Comparison], batches: Sequence[int]) -> tuple[list[str], list[float]]:
    """Cells of a unit for each batch, and its ratios to the library."""
    cells, ratios = [], []
    for batch in batches:
        c = by_batch.get(batch)
        if c is None:
            cells += ["–"] * 4
            continue
        mine = c.by_impl.get(peers.FROZEN, c.mine)
        library = c.by_impl.get("library")
        ratio = library["median_ms"] / mine["median_ms"] if library else None
        ratios += [ratio] if ratio and mode == "inference" else []
        speedup = c.best["median_ms"] / mine["median_ms"]
        cells += [_rate(mine), _share(mine), f"{ratio:.2f}x" if ratio else "–", f"{speedup:.2f}x"]
    return cells, ratios


def units(run: dict[str, Any]) -> list[str]:
    """Every convolution unit of a run as Markdown, in inference (frozen where it is) and training; none, no lines."""
    found = [c for c in comparisons(run["records"]) if c.mine["suite"] == "convs"]
    lines: list[str] = []
    for mode in dict.fromkeys(c.mine["mode"] for c in found):
        alike = [c for c in found if c.mine["mode"] == mode]
        batches = sorted({c.mine["batch"] for c in alike})
        by_case: dict[tuple[str, str], dict[int, Comparison]] = {}
        for c in sorted(alike, key=lambda c: c.mine["case"]):
            by_case.setdefault((c.mine["case"], c.mine["shape"]), {})[c.mine["batch"]] = c
        rows, ratios = [], []
        for (case, shape), by_batch in by_case.items():
            cells, beside = _unit_row(mode, by_batch, batches)
            rows.append(f"| {case} | {shape} | {' | '.join(cells)} |")
            ratios += beside
        head = [f"batch {batch}: GFLOP/s | of floor | of library | of best peer" for batch in batches]
        told = f"{len(by_case)} convolution units, {NAMES.get(mode, mode)}"
        if ratios:
            told += f"; beside the library's: geometric mean {geometric_mean(ratios):.2f}x, worst {min(ratios):.2f}x"
        lines += ["<details>", f"<summary>{told}</summary>", "", f"| unit | shape | {' | '.join(head)} |"]
        lines += [f"|---|---{'|---' * (4 * len(batches))}|", *rows, "", "</details>", ""]
    return lines
