"""benchmarks.gpu without a GPU: the same program on the CPU's kernels, and what remains when something goes wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks._gpu_sections import SECTIONS, cases_of
from dla_fast import backend

needs_extension = pytest.mark.skipif(
    backend.can_run("cpu", "aggregate", "cpu", torch.float32) is not None, reason="extension not built"
)


def run(path: Path, *arguments: object) -> tuple[int, dict]:
    status = gpu.main(["--device", "cpu", "--small", "--json", str(path), *map(str, arguments)])
    return status, json.loads(path.read_text())


@needs_extension
def test_on_the_cpu(tmp_path, capsys):
    sections = ["parity", "determinism", "launch", "ops", "roots"]
    status, data = run(tmp_path / "gpu.json", "--minutes", 12, "--sections", *sections)
    out = capsys.readouterr().out
    assert status == 0, out
    assert data["complete"], data["left_out"]
    assert {c["section"] for c in data["checks"]} >= {"parity", "determinism", "launch"}
    assert all(c["ok"] for c in data["checks"])
    assert {r["op"] for r in data["records"]} == {"merge", "upsample", "aggregate"}
    assert all(r["median_ms"] > 0 and r["floor_ms"] > 0 for r in data["records"])
    assert data["machine"]["threads"] > 0
    assert "torch" in data["versions"]
    goals = {t["what"]: t for t in data["targets"]}
    assert goals["aggregate inference: slowest shape over eager"]["value"] > 0
    assert goals["upsample_add over eager"]["met"] is None
    assert "goal upsample_add over eager >= 3: not measured" in out


def test_goals():
    """Against the fastest of the compiled peers, at the batch they are set for, where memory decides."""

    def record(impl, case, batch, median, floor):
        shape = {"op": "aggregate", "mode": "inference", "dtype": "bfloat16", "bytes": 100.0}
        return {**shape, "case": case, "batch": batch, "impl": impl, "median_ms": median, "floor_ms": floor}

    times = {"dla_fast": 1.0, "eager": 3.0, "compile": 2.0, "compile_frozen": 1.5}
    records = [record(impl, "root", 256, time, 0.9) for impl, time in times.items()]
    records += [record(impl, "deep", 256, 2 * time, 1.0) for impl, time in times.items()]
    records += [record("dla_fast", "root", 1, 1.0, 0.1), record("eager", "root", 1, 0.5, 0.1)]
    goals = {t["what"]: (t["value"], t["met"]) for t in gpu.targets(records)}
    assert goals["aggregate inference over eager, batch 256"] == (pytest.approx(3.0), True)
    assert goals["aggregate inference over compiled, batch 256"] == (pytest.approx(1.5), False)
    assert goals["aggregate inference: slowest shape over eager"] == (pytest.approx(0.5), False)
    memory = "aggregate inference, batch 256, memory-bound: share of the floor"
    assert goals[memory] == (pytest.approx(0.9), True)
    assert goals["aggregate training over eager, batch 256"] == (None, None)


@pytest.fixture
def dying(monkeypatch):
    monkeypatch.setattr(gpu, "CHILD", "dying_sections")
    here = Path(__file__).resolve().parent
    path = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


def test_a_failure_costs_the_case_it_happened_in(dying, tmp_path, capsys):
    sections = ["parity", "determinism", "compile", "launch"]
    status, data = run(tmp_path / "gpu.json", "--minutes", 2, "--sections", *sections)
    assert status == 1
    failed = {c["check"]: c for c in data["checks"] if not c["ok"]}
    assert failed["raises"]["detail"] == "RuntimeError: a case that raises"
    assert "ended with 11 in dies" in failed["dies"]["detail"]
    assert "illegal memory access" in next(c["detail"] for c in data["checks"] if "CUDA error" in c["detail"])
    # What came before and behind was done, in each of them.
    for section in sections:
        assert sum(c["ok"] for c in data["checks"] if c["section"] == section) == 2, section
    assert "FAILED determinism: dies" in capsys.readouterr().out


def test_time_that_is_up(dying, tmp_path):
    status, data = run(tmp_path / "gpu.json", "--minutes", 0.15, "--grace", 1, "--sections", "networks", "launch")
    assert status == 1
    assert not data["complete"]
    assert "networks: what comes after hangs" in data["left_out"]
    assert [c["check"] for c in data["checks"] if c["section"] == "networks"] == ["fine", "hangs"]
    status, data = run(tmp_path / "none.json", "--minutes", 0, "--sections", "launch")
    assert data["left_out"] == ["launch: first", "launch: last"]


def test_an_interruption_keeps_what_is_done(dying, monkeypatch, tmp_path, capsys):
    right = gpu.run_section

    def interrupted(name, *rest):
        if name == "ops":
            raise KeyboardInterrupt
        return right(name, *rest)

    monkeypatch.setattr(gpu, "run_section", interrupted)
    status, data = run(tmp_path / "gpu.json", "--minutes", 1, "--sections", "launch", "ops")
    assert status == 130
    assert [c["section"] for c in data["checks"]] == ["launch", "launch"]
    assert not data["complete"]
    assert "what was done is kept" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 0
    assert "no CUDA device was found, so nothing was measured" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


@needs_extension
def test_a_build_that_fails_is_a_record(monkeypatch, tmp_path):
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler here')\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    record = gpu.build("cpu")
    assert not record["ok"]
    assert "no compiler here" in record["detail"]


def test_every_section_lists_its_cases():
    for section in SECTIONS:
        labels = [label for label, _ in cases_of(section, "cpu", small=False)]
        assert labels
        assert len(set(labels)) == len(labels), section
