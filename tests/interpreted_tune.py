"""``dla_fast tune`` with the interpreter for a GPU and a made-up clock: test_triton.py starts this file."""

from __future__ import annotations

import json

import pytest
import torch

from dla_fast import cli, functional, use_backend
from dla_fast.bench import Case
from dla_fast.commands import tune
from dla_fast.kernels import config, launch, table
from dla_fast.kernels.config import DEFAULT_ARCH, TileConfig

CPU = torch.device("cpu")
NODE = Case("node", (16, 16), 16, 8, 8)
KEY = table.key(DEFAULT_ARCH, "forward", torch.float32, 128, 32, 16)


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    """No test reads or leaves a table."""
    monkeypatch.setattr(table, "table_path", lambda arch: tmp_path / f"sm_{arch}.json")
    yield
    table.TABLE.clear()
    table._read.clear()
    config.install({})


def problem(mode="inference", case=NODE):
    return tune.pass_of(case, mode, 2, torch.float32, "channels_last", CPU)


def clocks(milliseconds):
    """A clock that gives the times one after another, then 9."""
    rest = iter(milliseconds)
    return lambda call, device: next(rest, 9.0)


def launched() -> TileConfig:
    xs = [torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last) for _ in range(2)]
    v = torch.ones(16)
    with use_backend("triton"), torch.no_grad(), launch.record() as launches:
        functional.aggregate(xs, torch.randn(16, 32, 1, 1), v, v, v, v, training=False)
    return launches[0].config


def test_the_fastest_is_written_and_used_by_the_next_launch(tmp_path):
    before = launched()
    (entry,) = tune.tune(problem(), [], clocks([4.0, 3.0, 1.0, 2.0]))
    assert entry.key == KEY
    assert (entry.ms, entry.heuristic_ms) == (1.0, 4.0)
    assert entry.best not in (before, TileConfig(0, 0))
    assert entry.tried >= 4
    path = table.table_path(DEFAULT_ARCH)
    tune.write(path, [entry], CPU)
    table.TABLE.clear()
    table._read.clear()
    config.install({})
    assert launched() == entry.best
    data = json.loads(path.read_text())
    assert data["machine"]["threads"] > 0
    assert data["entries"][0]["heuristic_ms"] == 4.0


def test_a_gain_within_noise_keeps_the_heuristic():
    (entry,) = tune.tune(problem(), [], clocks([4.0, 3.99, 3.9]))
    assert (entry.best, entry.ms) == (launched(), 4.0)


def test_what_is_wrong_or_does_not_run_is_refused(monkeypatch):
    wrong, broken = TileConfig(64, 16, 16, 2, 1), TileConfig(16, 16, 16, 2, 1)
    monkeypatch.setattr(tune, "candidates", lambda kernel, heuristic: [heuristic, wrong, broken])
    right = launch.launch

    def sabotaged(kernel, grid, args, constexprs, cfg, *rest):
        if cfg == broken:
            raise RuntimeError("out of resource: shared memory")
        right(kernel, grid, args, constexprs, cfg, *rest)
        if cfg == wrong:
            args[kernel.arg_names.index("y")].add_(1)

    monkeypatch.setattr(launch, "launch", sabotaged)
    (entry,) = tune.tune(problem(), [], clocks([4.0, 1.0, 1.0]))
    assert entry.best not in (wrong, broken)
    assert entry.tried == 1
    assert "of the largest value" in entry.refused[0]
    assert "shared memory" in entry.refused[1]


@pytest.mark.parametrize(
    ("case", "mode", "kernels"),
    [
        (NODE, "training", {"stage", "elementwise", "fused"}),
        (Case("up", (8,), 8, 8, 8, op="upsample"), "training", {"upsample", "upsample_backward"}),
        (Case("ida", (8, 8), 8, 8, 8, op="merge", kernel=3), "inference", {"merge"}),
    ],
    ids=["aggregate", "upsample", "merge"],
)
def test_every_kernel_is_tuned_once(monkeypatch, case, mode, kernels):
    few = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda *args: few(*args)[:2])
    entries = tune.tune(problem(mode, case), [], clocks([]))
    assert {e.key[1] for e in entries} == kernels
    assert all(e.tried == 2 and not e.refused for e in entries)
    assert tune.tune(problem(mode, case), [e.key for e in entries], clocks([])) == []


def test_candidates_begin_with_the_heuristic():
    first = TileConfig(64, 128, 64, 8, 3)
    found = tune.candidates("forward", first)
    assert found[0] == first
    assert len(set(found)) == len(found) > 10
    assert all(c.block_n == 128 for c in tune.candidates("fused", first))


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": [{"kernel": "forward"}]}'])
def test_a_broken_table_is_told_and_left_alone(text):
    table.table_path(DEFAULT_ARCH).write_text(text)
    config.install({})
    with pytest.warns(RuntimeWarning, match="the heuristic chooses"):
        assert launched().block_m > 0


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "device", lambda *args: CPU)
    monkeypatch.setattr(tune, "machine_facts", lambda device, rates: {})
    monkeypatch.setattr(tune.cases, "network_cases", lambda name: [NODE])
    monkeypatch.setattr(tune.cases, "ida_cases", lambda: [])


def test_an_interrupted_run_keeps_its_entries(fake_gpu, monkeypatch, tmp_path, capsys):
    entry = tune.Entry(KEY, TileConfig(16, 16, 16), 1.0, 2.0, tried=2)
    answers = iter([[entry]])

    def interrupted(problem, known):
        try:
            return next(answers)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(tune, "tune", interrupted)
    file = tmp_path / "table.json"
    arguments = ["tune", "--models", "dla34", "--batch", "2", "--dtype", "float32"]
    assert cli.main([*arguments, "--out", str(file)]) == 130
    assert table.read_table(file, DEFAULT_ARCH) == {KEY: entry.best}
    assert "2.00x the heuristic's" in capsys.readouterr().out
    monkeypatch.setattr(tune, "tune", lambda problem, known: [])
    assert cli.main([*arguments, "--out", str(file), "--minutes", "1e-9"]) == 0
    assert "time was up" in capsys.readouterr().err


def test_without_a_gpu(capsys):
    assert cli.main(["tune"]) == 1
    assert "no CUDA device was found" in capsys.readouterr().err
