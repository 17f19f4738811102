"""What :mod:`dla_fast.bench.compare` found, as text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from dla_fast.bench import table
from dla_fast.bench.compare import FEW, Change, Result
from dla_fast.bench.records import IDENTITY


def _figure(value: float, what: str) -> str:
    return f"{table.milliseconds(value)} ms" if what == "ms" else f"{value / 2**20:.1f} MiB"


def _size(ratio: float) -> str:
    """A ratio above 1 as a change: in percent, and as a factor where that is many."""
    return f"{ratio - 1:.0%}" if ratio < 2 else f"{ratio:.1f}x" if ratio < 100 else "over 100x"


def _setting(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Where machine and versions differ."""
    lines = []
    for key in ("processor", "isa", "threads"):
        was, now = before.get("machine", {}).get(key), after.get("machine", {}).get(key)
        if was != now:
            lines.append(f"not the same machine: {key} was {was}, is {now}")
    for key, was in before.get("versions", {}).items():
        now = after.get("versions", {}).get(key)
        if was != now:
            lines.append(f"{key} was {was}, is {now}")
    return lines


def _ops(result: Result) -> list[str]:
    """The table of ops: what is missing has a column of its own, if anything is."""
    lacks = any(op.missing for op in result.ops) or bool(result.gone)
    rows = [["op", "mode", "", "cases", *(["missing"] if lacks else []), "after/before", "95 % interval", "would show"]]
    for op in result.ops:
        verdict = ("worse" if op.ratio > 1 else "better") if op.changed else "-"
        counts = [str(op.cases), *([str(op.missing) if op.missing else "-"] if lacks else [])]
        figures = [f"{op.ratio:.3f}x", f"{op.low:.2f} to {op.high:.2f}", _size(op.least)]
        rows.append([op.op, op.mode, verdict, *counts, *figures])
    rows += [[op.op, op.mode, "missing", "0", str(op.missing), "", "", ""] for op in result.gone]
    worse = sum(op.changed and op.ratio > 1 for op in result.ops)
    better = sum(op.changed and op.ratio < 1 for op in result.ops)
    counts = [f"{worse} worse", f"{better} better", f"{len(result.ops) - worse - better} unchanged"]
    counts += [f"{len(result.gone)} missing"] if result.gone else []
    return [f"ops: {', '.join(counts)}, of {len(result.ops) + len(result.gone)}", *table.align(rows, left=3)]


def _cases(changes: Sequence[Change]) -> list[str]:
    """The table of single cases."""
    rows = [["op", "case", "mode", "impl", "batch", "what", "before", "after", "after/before"]]
    for c in changes:
        r = c.record
        what = {"ms": "time", "peak_bytes": "peak", "saved_bytes": "saved"}[c.what]
        names = [r["op"], r["case"], r["mode"], r["impl"], str(r["batch"]), what]
        rows.append([*names, _figure(c.before, c.what), _figure(c.after, c.what), f"{c.ratio:.2f}x"])
    return table.align(rows, left=4)


def apart(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What tells the cases of two runs apart, in a line: the facts in which no two are alike."""
    counts = [len(run["records"]) for run in (before, after)]
    if not all(counts):
        return f"one has no figure ({counts[0]} and {counts[1]})"
    differ = []
    for name in IDENTITY:
        was, now = ({str(r.get(name)) for r in run["records"]} for run in (before, after))
        if not was & now:
            differ.append(f"{name} was {', '.join(sorted(was)[:4])}, is {', '.join(sorted(now)[:4])}")
    return "; ".join(differ) or f"none of {counts[0]} figures is among the {counts[1]}"


def render(result: Result, before: dict[str, Any], after: dict[str, Any]) -> str:
    """The result as text."""
    lines = _setting(before, after)
    drift = "no peers" if result.drift is None else f"the peers' times changed by {result.drift:.2f}x altogether"
    lines.append(f"{result.compared} figures compared; {drift}")
    if result.disturbed:
        lines.append(
            "other work disturbed one of the runs, and may have slowed down some code more than other: repeat it"
        )
    if result.factor is not None:
        how = ", times as measured" if result.absolute else ", times over those of the peers of the same run"
        known = "" if len(result.least) >= FEW else " (assumed, for want of cases)"
        noise = f"noise between the runs {result.factor:.1f} times that within them{known}"
        lines.append(f"{table.counted(len(result.least))} of dla_fast{how}; {noise}")
    if result.alone:
        allowed = "is allowed for" if result.allowed else "counts as a change"
        lines.append(
            f"{table.counted(result.alone)} of these without a peer in both runs: compared as measured, "
            f"a slower machine {allowed}"
        )
    if result.ops or result.gone:
        lines += ["", *_ops(result)]
    for title, changes in (
        ("worse", [c for c in result.changes if c.ratio > 1]),
        ("better", [c for c in reversed(result.changes) if c.ratio < 1]),
    ):
        if changes:
            lines += ["", f"single figures that stand out, {title}: {len(changes)}", *_cases(changes)]
    for title, records in (("now an error", result.broken), ("missing", result.missing), ("new", result.new)):
        if records:
            lines += ["", f"{title}: {len(records)}"]
            names = [f"  {r['case']} {r['mode']} {r['impl']} batch {r['batch']}" for r in records]
            lines += names[:20] + ([f"  and {len(names) - 20} more"] if len(names) > 20 else [])
    lines.append("")
    if not result.changes and not result.broken and not any(op.changed for op in result.ops):
        lacks = (
            f" of what both runs have; {table.counted(len(result.missing), 'figure')} missing" if result.missing else ""
        )
        lines.append(f"nothing changed beyond noise{lacks}")
    if result.ops:
        pooled, single = [op.least for op in result.ops], result.least
        lines += [
            "smallest change that these two runs would show, four times of five:",
            f"  of an op {_size(min(pooled))} to {_size(max(pooled))}, of a single case {_size(single[0])} to "
            f"{_size(single[-1])}, in half of them {_size(median(single))} or less",
        ]
    return "\n".join(lines)
