"""Predictions beside a run on a GPU: where both name the same thing, the worst first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gates.launches import Features
from benchmarks.gates.model import Machine
from benchmarks.gates.plan import Work
from benchmarks.gates.prediction import Predicted, Prediction, aligned

Found = Sequence[tuple[Work, list[Predicted], list[Prediction]]]
# Figures of the run's block "bandwidth" -> passes.
_FIGURES = {"tail_backward_reduce": "reduce", "tail_backward_apply": "apply"}


@dataclass(frozen=True)
class Row:
    """A prediction and a measurement in one unit.

    Attributes:
        what: both are of.
        predicted: microseconds, or microseconds that a copy of the same bytes takes a hundredth of.
        measured: the same.
        launches: features of what was launched, where times are compared and the library took no part.
    """

    what: str
    predicted: float
    measured: float
    launches: tuple[Features, ...] = ()

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def _row(what: str, steps: Sequence[Predicted], us: float) -> Row:
    made = tuple(s.features for s in steps if s.features is not None)
    return Row(what, 1e6 * sum(s.time.total for s in steps), us, made if len(made) == len(steps) else ())


def kept(found: Found, run: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Features beside times, as benchmarks/results/model has them: what the model's parameters are fitted to."""
    memory = machine.memory
    rows = [r for r in compare(found, run) if r.launches]
    return {
        "commit": run.get("commit", ""),
        "machine": machine.name,
        "memory": {"far": memory.far, "near": memory.near, "port": memory.port},
        "measured": [
            {
                "what": r.what,
                "us": round(r.measured, 2),
                "launches": [{**f.to_dict(), "loops": [], "counts": {}} for f in r.launches],
            }
            for r in rows
        ],
    }


def compare(found: Found, run: dict[str, Any]) -> list[Row]:
    """What a run measured that is predicted too, the farthest apart first.

    Args:
        found: what :func:`benchmarks.gates.predict.every` gave.
        run: gpu.json of :mod:`benchmarks.gpu`.
    """
    nodes: dict[tuple[str, str, int], dict[str, list[Predicted]]] = {}
    kernels: dict[tuple[str, str], list[Predicted]] = {}
    shares: dict[tuple[str, str], float] = {}
    for work, steps, made in found:
        unit = work.unit
        shape = unit.case.describe()
        if unit.case.op in ("aggregate", "merge") and unit.layout == "channels_last":
            nodes.setdefault((unit.case.op, shape, unit.batch), {})[work.mode] = steps
            if work.mode != "inference":
                for step in steps:
                    kernels.setdefault((f"{shape}, batch {unit.batch}", step.name), []).append(step)
        for p in made if work.kind == "maps" else ():
            shares[p.what, p.layout] = p.share
    rows = []
    for r in run.get("records", ()):
        if r.get("impl") != "dla_fast" or r.get("backend") != "triton" or r.get("dtype") != "bfloat16":
            continue
        times = nodes.get((r["op"], r["shape"], r["batch"])) if r.get("layout") == "channels_last" else None
        if times is None:
            continue
        modes = {"training": ("forward", "backward")}.get(r["mode"], (r["mode"],))
        if all(m in times for m in modes):
            label = f"{r['op']} {r['shape']} batch {r['batch']} {r['mode']}"
            rows.append(_row(label, [s for m in modes for s in times[m]], 1e3 * r["median_ms"]))
    for t in run.get("tables", ()):
        where = t["table"].partition(": ")[2]
        rows += [
            _row(f"{where}: {row['kernel']}", kernels[where, row["kernel"]], row["us"])
            for row in t["rows"]
            if (where, row["kernel"]) in kernels
        ]
    for f in run.get("figures", ()):
        if f.get("block") == "bandwidth" and f.get("backend") == "triton":
            _, _, dtype, layout = f["figure"].split()
            share = shares.get((_FIGURES.get(f["op"], f["op"]), layout))
            if dtype == "bfloat16" and share is not None:
                rows.append(Row(f["figure"], 1 / share, 1 / f["value"]))
    return sorted(rows, key=lambda row: -abs(math.log(row.ratio)))


def table(found: Found, run: dict[str, Any]) -> str:
    """The rows in words. Kernels of a pass of the run's own commit: another commit's are other kernels."""
    rows = compare(found, run)
    lines = [["beside a run of " + str(run.get("commit", ""))[:12], "predicted", "measured", "ratio"]]
    lines += [[r.what, f"{r.predicted:.2f}", f"{r.measured:.2f}", f"{r.ratio:.2f}"] for r in rows]
    apart = sorted(abs(math.log(r.ratio)) for r in rows)
    middle = math.exp(apart[len(apart) // 2]) - 1 if apart else 0.0
    return f"{aligned(lines)}\nbeside: {len(rows)} measurements, {middle:.0%} apart in the middle"
