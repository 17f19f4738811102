"""``python -m dla_fast bench``: what it writes and prints, its options, and what an interruption leaves."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import FIELDS, OPS, RATES, TINY, quick, run

from dla_fast import cli
from dla_fast.bench import cases, records, timing
from dla_fast.commands import bench as command


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch):
    """Measuring the machine takes seconds, and no test needs its figures."""
    monkeypatch.setattr(cases, "measure_rates", lambda dtype, device: RATES)


def test_bench_cpu_json(monkeypatch, capsys, tmp_path):
    tiny = [TINY, *cases.launch_cases()[1:]]
    monkeypatch.setattr(cases, "network_cases", lambda name, size: tiny[:1])
    monkeypatch.setattr(cases, "ida_cases", lambda: tiny[1:])
    file = tmp_path / "deep" / "run.json"
    assert run("cpu", "--peers", "eager", "--variants", "--batch", 1, 2, "--json", file) == 0
    data = json.loads(file.read_text())
    assert {"machine", "versions", "commit", "records"} <= set(data)
    assert data["complete"] is True
    assert {r["op"] for r in data["records"]} == set(OPS)
    assert {r["mode"] for r in data["records"]} == {"inference", "training"}
    assert {r["batch"] for r in data["records"]} == {1, 2}
    assert {r["impl"] for r in data["records"]} == {"dla_fast", "eager"}
    assert len({records.identity(r) for r in data["records"]}) == len(data["records"]) == 5 * 2 * 2 * 2
    assert all(set(r) >= FIELDS for r in data["records"])
    out = capsys.readouterr().out
    for mode in ("inference", "training"):
        assert f"merge, {mode}: geometric mean" in out
    table = [line for line in out.splitlines() if line.startswith("launch.upsample ")]
    assert len(table) == 4


def test_the_table_shows_the_worst_first(capsys, tmp_path):
    assert run("launch", "--peers", "eager", "--modes", "inference") == 0
    speedups = [
        float(line.split()[-1][:-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("launch.")
    ]
    assert len(speedups) == 5
    assert speedups == sorted(speedups)


def test_an_interruption_before_the_first_case_says_that_there_is_nothing(monkeypatch, capsys, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "time_case", interrupted)
    file = tmp_path / "run.json"
    assert run("launch", "--peers", "eager", "--json", file) == 130
    assert "no case was complete, and nothing was written" in capsys.readouterr().err
    assert not file.exists()


def test_an_interrupted_run_keeps_what_is_done(monkeypatch, capsys, tmp_path):
    done = timing.time_case
    calls = 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return done(*args, **kwargs)

    monkeypatch.setattr(timing, "time_case", interrupted)
    file, html = tmp_path / "run.json", tmp_path / "run.html"
    assert run("launch", "--peers", "eager", "--json", file, "--html", html) == 130
    data = json.loads(file.read_text())
    assert {r["case"] for r in data["records"]} == {"launch.aggregate"}
    assert {r["mode"] for r in data["records"]} == {"inference", "training"}
    assert data["complete"] is False
    said = capsys.readouterr()
    assert "launch.aggregate" in said.out
    assert "interrupted" in said.err
    assert "it was interrupted" in html.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_every_case_is_on_disk_before_the_next(monkeypatch, tmp_path):
    file = tmp_path / "run.json"
    done, sizes = timing.time_case, []

    def watching(*args, **kwargs):
        sizes.append(len(json.loads(file.read_text())["records"]) if file.exists() else 0)
        return done(*args, **kwargs)

    monkeypatch.setattr(timing, "time_case", watching)
    assert run("launch", "--peers", "eager", "--variants", "--modes", "inference", "--json", file) == 0
    assert sizes == [0, 2, 4, 6, 8]


def test_time_that_is_up(capsys, tmp_path):
    file = tmp_path / "run.json"
    assert run("launch", "--peers", "eager", "--minutes", 1e-9, "--json", file) == 0
    assert "10 cases left out" in capsys.readouterr().err


def test_under_a_time_limit_the_suites_take_turns():
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--minutes", "1", "--models", "dla34"])
    found = command.jobs(["launch", "memory"], args, quick(), None)
    assert [job.suite for job in found].index("memory") == len(found) // 2


@pytest.mark.parametrize(
    ("arguments", "parsed", "message"),
    [
        (["nope"], False, "unknown suite 'nope'"),
        (["cpu", "--device", "cuda"], False, "device given twice"),
        (["compare", "a.json"], False, "expected two files"),
        (["--batch", "0"], False, "expected at least 1"),
        (["--device", "meta"], True, "expected cpu or cuda"),
        (["compare", "/nowhere/a.json", "/nowhere/b.json"], True, "No such file"),
    ],
)
def test_bad_options(capsys, arguments, parsed, message):
    """Read wrong, the parser ends the process; meant wrong, the command does: 2 both ways."""
    if not parsed:
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *arguments])
        assert stop.value.code == 2
    else:
        assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert cli.main(["bench", "cuda"]) == 1
    assert "no CUDA device was found" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dla46_c", "dla34up"])
def test_memory_of_a_training_step(capsys, tmp_path, name):
    file = tmp_path / "run.json"
    assert run("memory", "--models", name, "--size", 64, "--batch", 2, "--json", file) == 0
    records = {r["impl"]: r for r in json.loads(file.read_text())["records"]}
    low, own, swapped, theirs = (records[i] for i in ("dla_fast+low", "dla_fast", "dla_fast+swapped", "eager"))
    assert len(records) == 4
    assert 0 < low["saved_bytes"] < own["saved_bytes"] <= swapped["saved_bytes"] < theirs["saved_bytes"]
    assert all(r["peak_bytes"] > 0 for r in records.values())
    printed = capsys.readouterr().out
    assert "memory of a training step" in printed
    assert "  low  " in printed
