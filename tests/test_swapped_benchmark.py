"""benchmarks.swapped: its records, its picture, and that a wrong result gives no figure."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks import readme
from benchmarks.swapped import __main__ as swapped
from dla_fast.bench import compare, records
from dla_fast.swap.report import SwapEntry, SwapReport

QUICK = ["--quick", "--rounds", "2", "--seconds", "0.1", "--models", "dla34", "--threads", "1"]


def test_a_run(tmp_path, capsys):
    path, picture = tmp_path / "run.json", tmp_path / "run.svg"
    assert swapped.main([*QUICK, "--json", str(path), "--picture", str(picture)]) == 0
    run = records.load(path)
    assert run["complete"]
    assert not run["skipped"]
    kinds = [(r["suite"], r["mode"], r["impl"]) for r in run["records"]]
    timed = [("swapped", mode, impl) for mode in swapped.MODES for impl in ("eager", "dla_fast")]
    assert kinds == [*timed, *(("memory", "training", impl) for impl in ("eager", "dla_fast"))]
    for record in run["records"][:4]:
        assert 0 < record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
    assert run["records"][1]["units"] == 25
    mine, eager = run["records"][5], run["records"][4]
    assert 0 < mine["saved_bytes"] < eager["saved_bytes"]
    said = capsys.readouterr().out
    assert "dla34: swap_ took 25 units" in said
    assert f"wrote {picture}" in said
    assert b'width="600pt"' in picture.read_bytes()[:2000], "800 pixels"
    # What others read of it.
    assert len(records.comparisons(run["records"])) == 2
    assert "| dla34, 3 @ 64x64 | 2 | inference |" in readme.figures("run.json", run)
    assert not compare.compare(run, run, 0.05).changes
    assert swapped.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out.strip() in said


def test_a_wrong_result_gives_no_figure(monkeypatch, capsys):
    def wrong(model):
        with torch.no_grad():
            next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.mul_(-1)
        return SwapReport([SwapEntry("", "aggregate")])

    monkeypatch.setattr(swapped.dla_fast, "swap_", wrong)
    assert swapped.main([*QUICK, "--modes", "inference"]) == 1
    said = capsys.readouterr().out
    assert "no case was timed" in said
    assert "ERROR: dla34 (training) in float64: dla_fast and eager differ by " in said


def test_what_an_interruption_leaves(monkeypatch, tmp_path, capsys):
    path = tmp_path / "run.json"
    time_case, calls = swapped.time_case, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return time_case(*args)

    monkeypatch.setattr(swapped, "time_case", interrupted)
    assert swapped.main([*QUICK, "--no-memory", "--json", str(path)]) == 130
    run = json.loads(path.read_text())
    assert not run["complete"]
    assert {r["mode"] for r in run["records"]} == {"inference"}
    assert "interrupted" in capsys.readouterr().err


def test_what_cannot_be_compiled_is_told(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    line = ["--size", "64", "--batch", "2", *QUICK[1:], "--modes", "inference", "--no-memory"]
    assert swapped.main(line) == 0
    said = capsys.readouterr().out
    assert "could not run: dla34, inference, dla_fast+compile: RuntimeError: no compiler" in said


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_images_and_loss_of_every_network(layout):
    for name in swapped.MODELS:
        images, loss = swapped.batch_of(name, 2, 64, layout)
        assert images.is_contiguous(memory_format=swapped.LAYOUTS[layout])
        value = loss(swapped.build(name).to(memory_format=swapped.LAYOUTS[layout])(images))
        assert value.isfinite()
        assert value > 0
