"""What a run found, as data and as text: the JSON file, the goals beside what was measured, the summary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.process import ROOT, Line
from dla_fast.bench import records as recorded

# Whichever of them is fastest on a case stands for a compiled peer.
COMPILED = ("compile", "compile_reduce_overhead", "compile_max_autotune", "compile_frozen")


@dataclass
class Collected:
    """Everything that was found so far, on disk after every change.

    Attributes:
        path: the JSON file.
        device: name of the device's type.
        before: an earlier run that this one continues, as its file has it.
        lines: what the processes told, in order.
    """

    path: Path
    device: str
    before: dict[str, Any] | None = None
    lines: list[Line] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    timetable: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._fixed = {
            "versions": recorded.versions() | triton_version(),
            "commit": recorded.commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
        }
        self._machine = recorded.machine_facts(torch.device(self.device), {}) | {"cores": os.cpu_count()}

    def add(self, line: Line) -> None:
        """Keep a line of a process, without the place of this checkout in what it quotes."""
        record = line.get("record")
        for name in ("detail", "error"):
            if record and isinstance(record.get(name), str):
                record[name] = record[name].replace(f"{ROOT}{os.sep}", "")
        self.lines.append(line)

    def done(self) -> dict[str, list[str]]:
        """Labels, by block, of the cases that ended well, an earlier run's included."""
        found: dict[str, list[str]] = {name: list(v) for name, v in ((self.before or {}).get("done") or {}).items()}
        for line in self.lines:
            if "ended" in line and line.get("ok"):
                found.setdefault(line["block"], []).append(line["label"])
        return found

    def _kept(self) -> list[dict[str, Any]]:
        """Records of the earlier run that nothing replaces."""
        if self.before is None:
            return []
        again = {(line["block"], line["label"]) for line in self.lines if "ok" in line or line.get("lost")}
        older = [*self.before["checks"], *self.before["records"], *self.before["figures"], *self.before["tables"]]
        return [r for r in older if (r["block"], r["case_label"]) not in again]

    def found(self) -> list[dict[str, Any]]:
        """Every record there is."""
        commit = self._fixed["commit"]
        new = [
            {"block": line["block"], "case_label": line.get("label") or line["record"].get("check", ""), "at": commit}
            | line["record"]
            for line in self.lines
            if "record" in line
        ]
        return [*self._kept(), *new]

    def left_out(self) -> list[str]:
        """The cases that time did not reach."""
        return [f"{line['block']}: {line['left_out']}" for line in self.lines if "left_out" in line]

    def compilations(self) -> list[dict[str, str]]:
        """What was compiled while cases ran, though it should have been before."""
        return [
            {"block": line["block"], "case": line["label"], "kernel": kernel}
            for line in self.lines
            if "ended" in line and line.get("launches", True)
            for kernel in line.get("compiled", ())
        ]

    def warm(self) -> dict[str, Any]:
        """What the compiling beforehand came to."""
        made = [line["made"] for line in self.lines if "made" in line]
        return {
            "specialisations": len(made),
            "seconds": sum(m["seconds"] + m["stub_seconds"] for m in made),
            "longest": max((m["seconds"] + m["stub_seconds"] for m in made), default=0.0),
            "failures": [{"kernel": m["name"], "error": m["error"]} for m in made if m["error"]],
        }

    def to_dict(self, complete: bool) -> dict[str, Any]:
        """The run as the JSON file has it; ``records`` are those of ``python -m dla_fast bench``."""
        found = self.found()
        checks = [r for r in found if "check" in r]
        figures, tables = [r for r in found if "figure" in r], [r for r in found if "table" in r]
        records = [r for r in found if not {"check", "figure", "table", "skipped"} & r.keys()]
        data: dict[str, Any] = {
            "machine": self._machine,
            **self._fixed,
            "continues": None if self.before is None else {k: self.before.get(k) for k in ("commit", "date")},
            "seconds": time.time() - self.started,
            "complete": complete and not self.left_out(),
            "left_out": self.left_out(),
            "timetable": self.timetable,
            "warm": self.warm(),
            "prepared": [
                {k: line[k] for k in ("prepared", "seconds", "error")} for line in self.lines if "prepared" in line
            ],
            "compilations": self.compilations(),
            "skipped": [r for r in found if "skipped" in r],
            "done": self.done(),
            "checks": checks,
            "figures": figures,
            "tables": tables,
            "records": records,
        }
        return data | {"goals": goals(data)}

    def save(self, complete: bool = False) -> dict[str, Any]:
        """Write the file at one stroke."""
        data = self.to_dict(complete)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)
        return data


def triton_version() -> dict[str, str]:
    """Triton's version, where it is installed."""
    import importlib.metadata

    try:
        return {"triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def load(path: Path) -> dict[str, Any]:
    """A run that is to be continued.

    Raises:
        NotARun: it is none of this program's.
    """
    run = recorded.load(path)
    missing = {"checks", "figures", "tables", "done"} - run.keys()
    if missing:
        raise recorded.NotARun(f"{path}: no run of benchmarks.gpu, it lacks {', '.join(sorted(missing))}")
    return run


def _case(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(k) for k in ("case", "op", "mode", "batch", "dtype", "side"))


def pairs(
    found: Sequence[dict[str, Any]], op: str, mode: str, *impls: str, batch: int | None = None, by: str = "median_ms"
) -> list[tuple[float, dict[str, Any]]]:
    """(figure of the best of the peers over dla_fast's, dla_fast's record) of the cases that both have."""
    timed = [r for r in found if r.get("op") == op and r.get("mode") == mode and r.get(by) and not r.get("error")]
    best: dict[tuple[Any, ...], float] = {}
    for r in timed:
        if r["impl"] in impls:
            best[_case(r)] = min(best.get(_case(r), r[by]), r[by])
    mine = [r for r in timed if r["impl"] == "dla_fast" and _case(r) in best and batch in (None, r["batch"])]
    return [(best[_case(r)] / r[by], r) for r in mine]


def goals(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that were set as goals, beside what was measured; None where nothing was."""
    found, rows = data["records"], list[dict[str, Any]]()

    def add(what: str, goal: float, values: Sequence[float], most: bool = False) -> None:
        value = recorded.geometric_mean(values) if values and min(values) > 0 else max(values, default=None)
        worst = (max if most else min)(values, default=None)
        met = None if value is None else value <= goal if most else value >= goal
        row = {"what": what, "goal": goal, "at most": most, "value": value, "worst": worst, "met": met}
        rows.append(row | {"cases": len(values)})

    def over(what: str, goal: float, op: str, mode: str, *impls: str, **more: Any) -> None:
        add(what, goal, [ratio for ratio, _ in pairs(found, op, mode, *impls, **more)])

    def figures(op: str, backend: str | None = None) -> list[float]:
        found = [f for f in data["figures"] if f.get("op") == op and f["value"]]
        return [f["value"] for f in found if backend in (None, f.get("backend"))]

    for mode, over_eager, over_compiled in (("inference", 2.5, 1.8), ("training", 1.6, 1.4)):
        everywhere = [ratio for ratio, _ in pairs(found, "aggregate", mode, "eager")]
        add(f"aggregate {mode}: slowest shape over eager", 1.0, [min(everywhere)] if everywhere else [])
        over(f"aggregate {mode} over eager, batch 256", over_eager, "aggregate", mode, "eager", batch=256)
        over(f"aggregate {mode} over compiled, batch 256", over_compiled, "aggregate", mode, *COMPILED, batch=256)
        large = [r for _, r in pairs(found, "aggregate", mode, "eager", batch=256)]
        # Memory decides where a byte costs no more than it does anywhere.
        byte = min((r["floor_ms"] / r["bytes"] for r in large), default=0.0)
        memory = [r["floor_ms"] / r["median_ms"] for r in large if r["floor_ms"] / r["bytes"] < 1.01 * byte]
        add(f"aggregate {mode}, batch 256, memory-bound: share of the floor", 0.85, memory)
        over(f"networks, {mode}: over eager", 1.0, "model", mode, "eager")
        over(f"networks, {mode}: over compiled", 1.0, "model", mode, *COMPILED)
    over(
        "networks: peak of a training step, eager's over dla_fast's", 1.2, "model", "training", "eager", by="peak_bytes"
    )
    for op in ("upsample", "batch_norm_act"):
        for mode in ("inference", "training"):
            mine = [r for _, r in pairs(found, op, mode, "eager")]
            add(f"{op} {mode}: share of the floor", 0.8, [r["floor_ms"] / r["median_ms"] for r in mine])
    over("upsample forward and backward over eager", 5.0, "upsample", "training", "eager")
    over("upsample_add over eager", 3.0, "upsample_add", "training", "eager")
    over("bare convolution over merge 3x3, inference", 0.8, "merge", "inference", "library")
    bandwidths = [f["value"] for f in data["figures"] if f.get("unit") == "of copy" and f.get("backend") == "cuda"]
    add("memory-bound CUDA kernels: share of copy", 0.85, bandwidths)
    add("one image, inference: over an empty kernel", 1.3, figures("latency", "cuda"), most=True)
    host = [f["value"] for f in data["figures"] if f["figure"] == "host cost of a inference node"]
    add("host cost of an inference node, us", 10.0, host, most=True)
    timed = any(f.get("median_ms") for f in found)
    add("compilations inside timed cases", 0.0, [float(len(data["compilations"]))] if timed else [], most=True)
    return rows


def failures(data: dict[str, Any]) -> list[str]:
    """What is wrong: checks that do not hold and records with an error."""
    lines = [f"{c['block']}: {c['check']}: {c['detail']}" for c in data["checks"] if not c["ok"]]
    errors = [r for r in data["records"] if r.get("error")]
    return lines + [f"{r['block']}: {r['case']} {r['mode']} batch {r['batch']}: {r['error']}" for r in errors]


def _ratios(data: dict[str, Any]) -> list[str]:
    """Every case that was timed, in a line."""
    rows = []
    for op in ("aggregate", "model", "merge", "upsample", "upsample_add", "batch_norm_act"):
        for mode in ("inference", "training"):
            by_peer = {i: pairs(data["records"], op, mode, i) for i in ("eager", *COMPILED)}
            against = {i: {id(r): v for v, r in found} for i, found in by_peer.items()}
            for _, r in sorted(pairs(data["records"], op, mode, "eager"), key=lambda pair: pair[0]):
                ratios = ", ".join(f"{v[id(r)]:.2f}x {i}" for i, v in against.items() if id(r) in v)
                share = r["floor_ms"] / r["median_ms"]
                shape = r["shape"] if op != "model" else f"{r['case']} {r['side']}"
                rows.append(
                    f"{op} {mode} {shape} batch {r['batch']} {r['dtype']} {r['layout']}: {r['median_ms']:.4f} ms, "
                    f"{share:.0%} of the floor, {ratios}"
                )
    return rows


def _table(table: dict[str, Any], most: int = 14) -> list[str]:
    lines = [table["table"]]
    for row in table["rows"][:most]:
        floor = f", {row['bytes'] / 1e6:.1f} MB, {row['of_floor']:.0%} of the floor" if "of_floor" in row else ""
        lines.append(f"  {row['us']:9.1f} us  {row['calls']:5.1f}x  {row['kernel'][:90]}{floor}")
    return lines


def summary(data: dict[str, Any], *, long: bool = False) -> str:
    """What failed, what was timed, the goals; with ``long`` the tables of kernels too."""
    lines = [f"FAILED {text}"[: None if long else 300] for text in failures(data)]
    lines += _ratios(data)
    for table in data["tables"] if long else ():
        lines += _table(table, 60)
    if long:
        lines += [f"{f['block']}: {f['figure']}: {f['value']:.3g} {f['unit']}" for f in data["figures"]]
    for t in data["goals"]:
        sign, verdict = "<=" if t["at most"] else ">=", {None: "", True: ": met", False: ": MISSED"}[t["met"]]
        value = "not measured" if t["value"] is None else f"{t['value']:.2f}, worst {t['worst']:.2f}"
        lines.append(f"goal {t['what']} {sign} {t['goal']:g}: {value}{verdict}")
    warm = data["warm"]
    if warm["specialisations"]:
        lines.append(
            f"compiled beforehand: {warm['specialisations']} kernels in {warm['seconds']:.0f} s of a core, "
            f"{len(warm['failures'])} failures; {len(data['compilations'])} compiled while cases ran"
        )
    good = sum(bool(c["ok"]) for c in data["checks"])
    lines.append(
        f"gpu: {good} of {len(data['checks'])} checks hold, {len(data['records'])} records, "
        f"{len(data['figures'])} figures, {len(data['left_out'])} left out, {data['seconds']:.0f} s"
    )
    return "\n".join(lines)
