"""``bench compare A.json B.json``: what changed between two runs beyond their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dla_fast.commands.bench import peers, table
from dla_fast.commands.bench.records import Record, geometric_mean, identity, is_timed, load


@dataclass(frozen=True)
class Change:
    """One figure that changed: ``ratio`` is after over before, so above 1 is slower or larger."""

    record: Record
    what: str
    before: float
    after: float
    ratio: float

    @property
    def is_ours(self) -> bool:
        """Whether it is a figure of dla_fast, rather than of a peer."""
        return bool(self.record["impl"].startswith(peers.FUSED))


@dataclass(frozen=True)
class Result:
    """What :func:`compare` found.

    Attributes:
        changes: beyond noise and the threshold, the worst first.
        broken: cases that had a figure and are an error now.
        missing: records of the first run that the second lacks.
        new: records that the first run lacks.
        compared: figures that both runs have.
        drift: geometric mean of the peers' change in time: how much the machine itself changed.
    """

    changes: list[Change]
    broken: list[Record]
    missing: list[Record]
    new: list[Record]
    compared: int
    drift: float

    def regressions(self) -> list[Change]:
        """Changes of dla_fast for the worse."""
        return [change for change in self.changes if change.is_ours and change.ratio > 1]


def _case(record: Record) -> tuple[Any, ...]:
    """A record's case, whoever ran it."""
    return tuple(record.get(k) for k in ("suite", "case", "op", "mode", "device", "dtype", "batch", "threads"))


def _overlap(a: Record, b: Record, factor: float) -> bool:
    """Whether the spans from p20 to p80 meet, the second divided by ``factor``."""
    spans = []
    for record, scale in ((a, 1.0), (b, factor)):
        low = record.get("p20_ms") or record["median_ms"]
        high = record.get("p80_ms") or record["median_ms"]
        spans.append((low / scale, high / scale))
    return spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float, *, relative: bool = False) -> Result:
    """Compare two runs record by record.

    A time has changed when its median differs by more than ``threshold`` and the spans from the 20th to the 80th
    percentile do not meet; bytes, which have no noise to speak of, when they differ by more than ``threshold``.

    Args:
        before: a run, as in its JSON file.
        after: another.
        threshold: the smallest change that counts, as a fraction.
        relative: divide each time's change by that of the peers on the same case, so that a machine that was slower
            altogether does not count.
    """
    old = {identity(r): r for r in before["records"] if not r.get("error")}
    new = {identity(r): r for r in after["records"] if not r.get("error")}
    shared = [(old[key], new[key]) for key in old if key in new]
    drifts: dict[tuple[Any, ...], list[float]] = {}
    for a, b in shared:
        if is_timed(a) and is_timed(b) and not a["impl"].startswith(peers.FUSED):
            drifts.setdefault(_case(a), []).append(b["median_ms"] / a["median_ms"])
    changes = []
    for a, b in shared:
        if is_timed(a) and is_timed(b):
            drift = drifts.get(_case(a)) if relative and a["impl"].startswith(peers.FUSED) else None
            factor = geometric_mean(drift) if drift else 1.0
            ratio = b["median_ms"] / a["median_ms"] / factor
            if _beyond(ratio, threshold) and not _overlap(a, b, factor):
                changes.append(Change(b, "ms", a["median_ms"], b["median_ms"], ratio))
        for what in ("peak_bytes", "saved_bytes"):
            if a.get(what) and b.get(what) and _beyond(b[what] / a[what], threshold):
                changes.append(Change(b, what, a[what], b[what], b[what] / a[what]))
    had = {_case(r) for r in old.values()}
    broken = [r for r in after["records"] if r.get("error") and _case(r) in had]
    failed = {_case(r) for r in broken}
    missing = [r for key, r in old.items() if key not in new and _case(r) not in failed]
    every = [ratio for ratios in drifts.values() for ratio in ratios]
    return Result(
        sorted(changes, key=lambda change: -change.ratio),
        broken,
        missing,
        [r for key, r in new.items() if key not in old],
        len(shared),
        geometric_mean(every) if every else 1.0,
    )


def _beyond(ratio: float, threshold: float) -> bool:
    """Whether a ratio lies further from 1 than ``threshold``, the same for faster and slower."""
    return abs(math.log(ratio)) > math.log1p(threshold)


def _figure(value: float, what: str) -> str:
    return f"{table.milliseconds(value)} ms" if what == "ms" else f"{value / 2**20:.1f} MiB"


def render(result: Result, before: dict[str, Any], after: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for key in ("processor", "isa", "threads"):
        was, now = before.get("machine", {}).get(key), after.get("machine", {}).get(key)
        if was != now:
            lines.append(f"not the same machine: {key} was {was}, is {now}")
    for key, was in before.get("versions", {}).items():
        now = after.get("versions", {}).get(key)
        if was != now:
            lines.append(f"{key} was {was}, is {now}")
    lines.append(f"{result.compared} figures compared; the peers' times changed by {result.drift:.2f}x altogether")
    for title, changes in (
        ("worse", [c for c in result.changes if c.ratio > 1]),
        ("better", [c for c in reversed(result.changes) if c.ratio < 1]),
    ):
        if not changes:
            continue
        rows = [["op", "case", "mode", "impl", "batch", "what", "before", "after", "after/before"]]
        for c in changes:
            r = c.record
            what = {"ms": "time", "peak_bytes": "peak", "saved_bytes": "saved"}[c.what]
            names = [r["op"], r["case"], r["mode"], r["impl"], str(r["batch"]), what]
            rows.append([*names, _figure(c.before, c.what), _figure(c.after, c.what), f"{c.ratio:.2f}x"])
        lines += ["", f"{title}: {len(changes)}", *table.align(rows, left=4)]
    for title, records in (("now an error", result.broken), ("missing", result.missing), ("new", result.new)):
        if records:
            lines += ["", f"{title}: {len(records)}"]
            names = [f"  {r['case']} {r['mode']} {r['impl']} batch {r['batch']}" for r in records]
            lines += names[:20] + ([f"  and {len(names) - 20} more"] if len(names) > 20 else [])
    if not result.changes and not result.broken:
        lines.append("nothing changed beyond noise")
    return "\n".join(lines)


def main(a: Path, b: Path, threshold: float, *, relative: bool = False) -> int:
    """Compare two files and print; 1 where dla_fast got worse past the threshold, or gives no figure any more.

    Raises:
        CommandError: a file that is no run.
    """
    before, after = load(a), load(b)
    result = compare(before, after, threshold, relative=relative)
    print(render(result, before, after))
    return 1 if result.regressions() or result.broken else 0
