"""``bench compare A.json B.json``: what changed between two runs beyond their noise.

What is compared: the time of each case of dla_fast over that of its peers in the same run, since a machine that was
slower in one run was slower for both; the difference d of its logarithm between the runs.

How it is judged, with w² the variance of d that the rounds within both runs tell (the median of n rounds with standard
deviation s has a standard error of 1.25 s / √n, and s comes from the span between the 20th and the 80th percentile):

1. Few rounds can agree by chance, so w² is at least half its median over the cases of the op. Two runs differ by more
   than their rounds show: most cases are unchanged, so the median absolute deviation of all d/w says how much more
   (:func:`_between_runs`), and v = that factor² × w² is the variance of a case.
2. An op in a mode is judged by the mean of its cases' d, weighted by 1/v. Its standard error √(1/Σ(1/v)) is multiplied
   by the scatter that its own cases show against v (the Birge ratio). Few cases tell that badly, so it is averaged with
   v as if v were known from :data:`PRIOR` cases more, and Student's t has as many degrees of freedom more (the
   moderated t of Smyth 2004). Cases of an op are timed one after another and share what the machine does meanwhile:
   a correlation of :data:`ALIKE` among them multiplies the variance of the mean (the design effect of Kish 1965).
3. A single case stands out if its d alone is too large for v and for the scatter of its op's other cases. The tails of
   single cases are heavy, of unchanged code too: Student's t of :data:`TAILS` degrees of freedom, whatever the cases.

Where the machine was :data:`DISTURBED` times slower in one run, half of the drift beyond that is a standard deviation
that all cases share: what fights for the cores hits one program harder than another.

Both levels share :data:`noise.ALARM`, the chance to call unchanged code worse, each divided by the number of
comparisons (Bonferroni). A change that is significant and larger than the threshold counts. Bytes have no noise, and
no statistics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from dla_fast.bench import peers
from dla_fast.bench.noise import POWER, QUARTILE, Judge, moved, quantile
from dla_fast.bench.records import Record, identity, is_timed

# Cases that the common variance counts for, beside those of an op.
PRIOR = 4
# The correlation of the noise of an op's cases. Of unchanged builds on a busy machine it was about this.
ALIKE = 0.05
# Degrees of freedom for the tails of single cases. With 6, two in a hundred pairs of runs of one build had an alarm.
TAILS = 5
# Two runs of one build differ at least this much: memory is laid out anew.
FLOOR = 0.01
# A machine this many times slower in one run had other work, which slows down some code more than other.
DISTURBED = 2.0
# With fewer cases than this the factor between the noise of rounds and of runs cannot be estimated;
FEW = 10
# it is then what runs of one build on a shared machine have shown.
USUAL_FACTOR = 2.0


@dataclass(frozen=True)
class Change:
    """One figure of dla_fast that changed: ``ratio`` is after over before, so above 1 is slower or larger.

    ``before`` and ``after`` are as measured, the ratio of a time is what remains beside the peers' change.
    """

    record: Record
    what: str
    before: float
    after: float
    ratio: float


@dataclass(frozen=True)
class Pooled:
    """What the cases of one op in one mode say together.

    Attributes:
        op: the op, and what else tells the group from others: backend, dtype.
        mode: inference, forward or training.
        cases: how many there are.
        ratio: geometric mean of after over before, weighted.
        low: lower end of its 95 % confidence interval,
        high: and upper end.
        least: the smallest change, as a ratio above 1, that would be found four times of five.
        changed: whether it is a change.
        missing: cases of the first run beside these that the second has no time of.
    """

    op: str
    mode: str
    cases: int
    ratio: float
    low: float
    high: float
    least: float
    changed: bool
    missing: int = 0


@dataclass(frozen=True)
class Gone:
    """An op in a mode that the second run has no time of at all.

    Attributes:
        op: as in :class:`Pooled`.
        mode: inference, forward or training.
        missing: its cases in the first run.
    """

    op: str
    mode: str
    missing: int


@dataclass(frozen=True)
class Result:
    """What :func:`compare` found.

    Attributes:
        ops: each op in each mode: what became worse, what did not change, what became better; the worst first.
        gone: ops in modes that the second run lacks altogether.
        changes: single cases and sizes in memory, the worst first.
        broken: cases that had a figure and are an error now.
        missing: records of the first run that the second lacks.
        new: records that the first run lacks.
        compared: records that both runs have.
        ours: those of them that are of dla_fast.
        drift: geometric mean of the peers' change in time: how much the machine itself changed; None without peers.
        least: for each timed case the smallest change, as a ratio above 1, that would be found four times of five.
        disturbed: the machine had other work in one of the runs, and what that may do is allowed for.
        alone: timed cases with no peer in both runs, judged by their own times;
        allowed: whether a change of the machine is part of their noise, as far as other cases tell it.
        factor: noise between the runs over that within them; None without times.
        absolute: whether times were compared as they are.
    """

    ops: list[Pooled]
    gone: list[Gone]
    changes: list[Change]
    broken: list[Record]
    missing: list[Record]
    new: list[Record]
    compared: int
    ours: int
    drift: float | None
    least: list[float]
    disturbed: bool
    alone: int
    allowed: bool
    factor: float | None
    absolute: bool

    def regressions(self) -> list[Pooled | Change]:
        """Changes for the worse."""
        return [*(op for op in self.ops if op.changed and op.ratio > 1), *(c for c in self.changes if c.ratio > 1)]


@dataclass(frozen=True)
class _Row:
    """A timed case of dla_fast in both runs: the change of its logarithm, and the variance that its rounds tell."""

    before: Record
    after: Record
    change: float
    variance: float
    alone: bool

    def group(self) -> tuple[str, ...]:
        """What it is pooled with: mode, then what the op is called by, of which :func:`_names` drops what is common."""
        return (*_facts(self.after), "without peers" if self.alone else "")


def _facts(r: Record) -> tuple[str, ...]:
    """What a record of dla_fast is pooled by, wherever it has peers."""
    # What calls cost, on maps so small that nothing else counts, is one thing for all ops: as in the tables.
    op = "every op (launch)" if r.get("suite") == "launch" else str(r["op"])
    backend = r["impl"].removeprefix(peers.FUSED).removeprefix(":")
    return (r["mode"], op, backend, *(str(r.get(name) or "") for name in ("dtype", "layout", "device")))


def _case(record: Record) -> tuple[Any, ...]:
    """A record's case, whoever ran it."""
    return tuple(record.get(k) for k in ("suite", "case", "op", "mode", "device", "dtype", "batch", "threads"))


def _is_ours(record: Record) -> bool:
    return bool(record["impl"].startswith(peers.FUSED))


def _between_runs(rows: Sequence[_Row]) -> float:
    """The noise between two runs over that within them: the scaled median absolute deviation, 1 at least.

    About the median, so that a change of everything is not taken for noise.
    """
    if len(rows) < FEW:
        return USUAL_FACTOR
    middle = median(row.change for row in rows)
    return max(1.0, median(abs(row.change - middle) / math.sqrt(row.variance) for row in rows) / QUARTILE)


def _mean(rows: Sequence[_Row]) -> tuple[float, float, float]:
    """Weighted mean of the changes, its variance, and the sum of squares about it in units of the rows' variance."""
    weight = sum(1 / row.variance for row in rows)
    mean = sum(row.change / row.variance for row in rows) / weight if rows else 0.0
    return mean, 1 / weight if rows else 0.0, sum((row.change - mean) ** 2 / row.variance for row in rows)


def _pool(op: str, mode: str, rows: Sequence[_Row], judge: Judge, shared: float) -> Pooled:
    """An op in a mode; ``shared`` is the variance that all rows have in common."""
    mean, variance, squares = _mean(rows)
    degrees = PRIOR + len(rows) - 1
    error = math.sqrt(variance * (PRIOR + squares) / degrees * (1 + ALIKE * (len(rows) - 1)) + shared)
    margin = quantile(0.025, degrees) * error
    return Pooled(
        op=op,
        mode=mode,
        cases=len(rows),
        ratio=math.exp(mean),
        low=math.exp(mean - margin),
        high=math.exp(mean + margin),
        least=math.exp(judge.least(error, degrees, POWER)),
        changed=abs(mean) > judge.least(error, degrees),
    )


def _single(row: _Row, others: Sequence[_Row], judge: Judge, shared: float) -> tuple[bool, float]:
    """Whether a case stands out, and the smallest ratio that would."""
    _, _, squares = _mean(others)
    scatter = max(1.0, (PRIOR + squares) / (PRIOR + max(len(others) - 1, 0)))
    error = math.sqrt(row.variance * scatter + shared)
    return abs(row.change) > judge.least(error, TAILS), math.exp(judge.least(error, TAILS, POWER))


def _grouped(rows: Iterable[_Row]) -> dict[tuple[str, ...], list[_Row]]:
    """The rows by what they are pooled with."""
    groups: dict[tuple[str, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.group(), []).append(row)
    return groups


def _names(groups: Sequence[tuple[str, ...]]) -> list[str]:
    """Names of ops as short as tells them apart: the op, and of the rest what the groups do not have in common."""
    varying = [i for i, facts in enumerate(zip(*groups, strict=True)) if i == 1 or (i > 1 and len(set(facts)) > 1)]
    return [" ".join(filter(None, (group[i] for i in varying))) for group in groups]


def _shared_noise(rows: Sequence[_Row], drifts: Sequence[float]) -> float:
    """The variance of what cases without peers may have changed together with the machine.

    By the peers of other cases, which are unchanged; where there are none, by what dla_fast's own cases have in
    common if they are many.
    """
    if len(drifts) >= FEW:
        return (median(map(abs, drifts)) / QUARTILE) ** 2
    changes = [row.change for row in rows if row.alone]
    return median(changes) ** 2 if len(changes) >= FEW else 0.0


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float, *, absolute: bool = False) -> Result:
    """Compare two runs record by record: see the head of this file.

    Args:
        before: a run, as in its JSON file.
        after: another.
        threshold: the smallest change that counts, as a fraction.
        absolute: compare times as they are, so that a machine that was slower altogether counts, instead of the times
            over those of the peers of the same run.
    """
    old = {identity(r): r for r in before["records"] if not r.get("error")}
    new = {identity(r): r for r in after["records"] if not r.get("error")}
    shared = [(old[key], new[key]) for key in old if key in new]
    timed = [(a, b) for a, b in shared if is_timed(a) and is_timed(b)]
    moves: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for a, b in timed:
        if not _is_ours(a):
            moves.setdefault(_case(a), []).append(moved(a, b))
    drifts = [change for changes in moves.values() for change, _ in changes]
    rows = []
    for a, b in timed:
        if _is_ours(a):
            change, variance = moved(a, b)
            against = [] if absolute else moves.get(_case(a), [])
            if against:
                change -= sum(c for c, _ in against) / len(against)
                variance += sum(v for _, v in against) / len(against) ** 2
            rows.append(_Row(a, b, change, variance + FLOOR**2, not against and not absolute))
    groups = _grouped(rows)
    floors = {name: median(row.variance for row in alike) / 2 for name, alike in groups.items()}
    rows = [replace(row, variance=max(row.variance, floors[row.group()])) for row in rows]
    factor = _between_runs(rows)
    rows = [replace(row, variance=factor**2 * row.variance) for row in rows]
    groups = _grouped(rows)
    noise = _shared_noise(rows, drifts)
    drift = sum(drifts) / len(drifts) if drifts else None
    beyond = 0.0 if absolute or drift is None else max(0.0, abs(drift) - math.log(DISTURBED)) / 2
    had = {_case(r) for r in old.values()}
    known = {identity(r) for r in before["records"] if r.get("error")}
    broken = [r for r in after["records"] if r.get("error") and _case(r) in had and identity(r) not in known]
    failed = {_case(r) for r in broken}
    missing = [r for key, r in old.items() if key not in new and _case(r) not in failed]
    lost = Counter(_facts(r) for r in missing if _is_ours(r) and is_timed(r))
    gone = [(*facts, "") for facts in lost if all(group[:-1] != facts for group in groups)]
    names = _names([*groups, *gone]) if groups or gone else []
    ops, changes, shown = [], [], []
    for name, group, alike in zip(names, groups, groups.values(), strict=False):
        extra = noise if alike[0].alone else beyond**2
        pooled = _pool(name, group[0], alike, Judge(len(groups), threshold), extra)
        ops.append(replace(pooled, missing=lost.pop(group[:-1], 0)))
        for i, row in enumerate(alike):
            others = alike[:i] + alike[i + 1 :]
            stands_out, needed = _single(row, others, Judge(len(rows), threshold), extra)
            shown.append(needed)
            if stands_out:
                times = row.before["median_ms"], row.after["median_ms"]
                changes.append(Change(row.after, "ms", *times, math.exp(row.change)))
    changes += _sizes(shared, threshold)
    return Result(
        ops=sorted(ops, key=lambda op: (op.changed and (op.ratio < 1) - (op.ratio > 1), -op.ratio)),
        gone=[Gone(name, group[0], lost[group[:-1]]) for name, group in zip(names[len(groups) :], gone, strict=True)],
        changes=sorted(changes, key=lambda change: -change.ratio),
        broken=broken,
        missing=missing,
        new=[r for key, r in new.items() if key not in old],
        compared=len(shared),
        ours=sum(_is_ours(r) for r, _ in shared),
        drift=None if drift is None else math.exp(drift),
        least=sorted(shown),
        disturbed=beyond > 0,
        alone=sum(row.alone for row in rows),
        allowed=noise > 0,
        factor=factor if rows else None,
        absolute=absolute,
    )


def _sizes(shared: Iterable[tuple[Record, Record]], threshold: float) -> list[Change]:
    """Changes of dla_fast's bytes, which have no noise to speak of."""
    return [
        Change(b, what, a[what], b[what], b[what] / a[what])
        for a, b in shared
        for what in ("peak_bytes", "saved_bytes")
        if _is_ours(a) and a.get(what) and b.get(what) and abs(math.log(b[what] / a[what])) > math.log1p(threshold)
    ]
