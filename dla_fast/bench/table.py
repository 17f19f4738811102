"""The run as text: aligned tables, the worst cases first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dla_fast.bench import peers
from dla_fast.bench.records import Comparison, Record, comparisons, geometric_mean, side_of

TITLES = {
    "ops": "ops",
    "nodes": "aggregation nodes",
    "ida": "steps of the dense-prediction ladder",
    "convs": "convolution units",
    "models": "whole networks",
    "necks": "necks of others, after swap_ (dla_fast) and before (eager)",
    "launch": "cost of a call, on maps of 2x2",
    "small": "calls of 8x8 maps, one image",
    "scaling": "scaling",
}
LARGE = 28  # rows of a map from which on memory, rather than the product, decides


def milliseconds(value: float | None) -> str:
    """Four digits at most, three behind the point."""
    if value is None:
        return "-"
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def counted(number: int, what: str = "case") -> str:
    """So many cases, or something else."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def align(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of aligned cells, the first ``left`` columns to the left, with a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def summary(found: Sequence[Comparison], what: str) -> str:
    """One line: geometric means, the worst, and how many are lost."""
    ratios = [c.speedup for c in found]
    large = [c.speedup for c in found if (side_of(c.mine) or 0) >= LARGE]
    text = f"{what}: geometric mean {geometric_mean(ratios):.2f}x over {len(ratios)}"
    if large and len(large) < len(ratios):
        text += f", {geometric_mean(large):.2f}x at {LARGE}x{LARGE} and above"
    return f"{text}, worst {min(ratios):.2f}x, {sum(r < 1 for r in ratios)} behind; against the best peer"


def _section(found: Sequence[Comparison]) -> list[str]:
    """The comparisons of one suite, op and mode as a table."""
    impls: list[str] = []
    for c in found:
        impls += [impl for impl in c.by_impl if impl not in impls]
    impls.sort(key=lambda impl: (not impl.startswith(peers.FUSED), impl in peers.YARDSTICKS))
    hosted = any(c.mine.get("host_ms") is not None for c in found)
    measured = "library" in impls
    variants = [impl for impl in impls if impl in peers.VARIANTS]
    beside_eager = found[0].mine.get("suite") == "necks" and "eager" in impls
    head = [
        "case",
        "shape",
        "batch",
        *impls,
        *(["host"] if hosted else []),
        "floor",
        "of floor",
        *(["GFLOP/s", "of library"] if measured else []),
        *(["of eager"] if beside_eager else []),
        "best peer",
        *(impl.removeprefix(f"{peers.FUSED}+") for impl in variants),
        "speedup",
    ]
    rows = [head]
    for c in found:
        share = c.share_of_floor
        times = [milliseconds(c.by_impl[impl]["median_ms"]) if impl in c.by_impl else "-" for impl in impls]
        host = [milliseconds(c.mine.get("host_ms"))] if hosted else []
        rows.append(
            [
                c.mine["case"],
                str(c.mine.get("shape", "")),
                str(c.mine["batch"]),
                *times,
                *host,
                milliseconds(c.mine.get("floor_ms")),
                "-" if share is None else f"{share:.0%}",
                *(_beside_library(c) if measured else []),
                *([_beside_eager(c)] if beside_eager else []),
                c.best["impl"],
                *(f"{c.speedup_of(impl):.2f}x" if impl in c.by_impl else "-" for impl in variants),
                f"{c.speedup:.2f}x",
            ]
        )
    return align(rows, left=2)


def _beside_eager(c: Comparison) -> str:
    """How many times as fast as before it was swapped."""
    before = c.by_impl.get("eager")
    return "-" if before is None else f"{before['median_ms'] / c.mine['median_ms']:.2f}x"


def _beside_library(c: Comparison) -> list[str]:
    """GFLOP/s, and the library's time over that of dla_fast: frozen where it is, as the library's weight is packed."""
    mine = c.by_impl.get(peers.FROZEN, c.mine)
    rate = f"{mine['flops'] / mine['median_ms'] / 1e6:.0f}" if mine.get("flops") else "-"
    theirs = c.by_impl.get("library")
    return [rate, "-" if theirs is None else f"{theirs['median_ms'] / mine['median_ms']:.2f}x"]


def memory_cases(records: Iterable[Record]) -> list[dict[str, Record]]:
    """Records by implementation per model with memory measured, the worst ratio of peaks first."""
    cases: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        if record.get("suite") == "memory" and record.get("peak_bytes") and not record.get("error"):
            key = tuple(record.get(name) for name in ("case", "device", "dtype", "layout", "batch"))
            cases.setdefault(key, {})[record["impl"]] = record
    found = [by for by in cases.values() if {peers.FUSED, "eager"} <= set(by)]
    return sorted(found, key=lambda by: -by[peers.FUSED]["peak_bytes"] / by["eager"]["peak_bytes"])


def memory_pairs(records: Iterable[Record]) -> list[tuple[Record, Record]]:
    """(dla_fast, eager) of :func:`memory_cases`."""
    return [(by[peers.FUSED], by["eager"]) for by in memory_cases(records)]


def _memory(records: Sequence[Record]) -> list[str]:
    cases = memory_cases(records)
    if not cases:
        return []
    rows = [["model", "shape", "batch", "", "peak eager", "dla_fast", "ratio", "saved eager", "dla_fast", "ratio"]]
    for by in cases:
        theirs = by["eager"]
        for impl in (peers.FUSED, *peers.VARIANTS):
            if impl not in by:
                continue
            mine, how = by[impl], impl.removeprefix(peers.FUSED).removeprefix("+")
            row = [mine["case"], str(mine.get("shape", "")), str(mine["batch"]), how]
            for name in ("peak_bytes", "saved_bytes"):
                a, b = mine[name], theirs[name]
                row += [f"{b / 2**20:.1f}", f"{a / 2**20:.1f}", f"{a / b:.2f}x"]
            rows.append(row)
    return ["", "memory of a training step, MiB: its peak, and what it saves for the backward pass", *align(rows, 2)]


def sections(records: Iterable[Record]) -> dict[tuple[str, str, str], list[Comparison]]:
    """Comparisons by suite, op and mode, each worst first; whole networks and nodes before the rest."""
    found: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in comparisons(records):
        suite = c.mine.get("suite", "nodes")
        op = "every op" if suite == "launch" else c.mine["op"]
        found.setdefault((suite, op, c.mine["mode"]), []).append(c)
    order = list(TITLES)
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][0]) if item[0][0] in order else 99))


def render(run: dict[str, Any]) -> str:
    """The run as it is printed.

    Args:
        run: as in the JSON file.
    """
    records = run["records"]
    lines: list[str] = []
    for name, rate in run["machine"].get("rates", {}).items():
        gigabytes, gigaflops = rate["bytes_per_s"] / 1e9, rate["flops_per_s"] / 1e9
        lines.append(f"floor from {gigabytes:.1f} GB/s copied and {gigaflops:.0f} GFLOP/s of the best product ({name})")
    errors = [record for record in records if record.get("error")]
    if errors:
        lines += ["", f"ERRORS: {counted(len(errors))} without a figure"]
        lines += [f"  {record['error']}" for record in errors]
    found = sections(records)
    for (suite, op, mode), rows in found.items():
        lines += ["", f"{TITLES.get(suite, suite)}: {op}, {mode}, ms", *_section(rows)]
        lines.append(summary(rows, f"{op}, {mode}"))
    lines += _memory(records)
    if len(found) > 1:
        lines += ["", *(summary(rows, f"{suite} {op} {mode}") for (suite, op, mode), rows in found.items())]
    reasons: dict[str, int] = {}
    for skip in run.get("skipped", []):
        key = f"{skip['impl']}: {skip['reason']}"
        reasons[key] = reasons.get(key, 0) + 1
    if reasons:
        lines += ["", "left out:", *(f"  {reason} ({counted(count)})" for reason, count in reasons.items())]
    return "\n".join(lines).strip("\n")
