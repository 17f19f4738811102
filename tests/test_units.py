"""The convolution units as benchmark cases: read off the networks, proved, timed beside the library's convolution."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bench_helpers import CPU, RATES, quick, run

from dla_fast.bench import Case, alone, cases, peers, table, timing, units

PLAIN = Case("plain", (8,), 16, 6, 6, op="conv_norm_act", kernel=3)
UNITS = (
    PLAIN,
    dataclasses.replace(PLAIN, name="added", residual=True, kernel=1),
    dataclasses.replace(PLAIN, name="strided", stride=2, kernel=7, in_channels=(3,)),
    dataclasses.replace(PLAIN, name="split", groups=4, dilation=2),
    dataclasses.replace(PLAIN, name="projection", kernel=1, act="identity"),
)


def test_the_units_of_a_classifier():
    found = units.unit_cases(["dla34"])
    assert len(found) == 19
    shapes = [case.describe() for case in found]
    assert shapes[0] == "3 -> 16 @ 224x224, 7x7"
    assert "64 -> 64 @ 56x56, 3x3 + residual" in shapes
    assert "256 -> 512 @ 7x7, 3x3 s=2" in shapes
    assert "32 -> 64 @ 56x56, 1x1 identity" in shapes
    # What has several inputs is a node.
    assert not any("root" in case.name for case in found)
    assert found[5].name == "dla34.level2.tree1.conv2"


def test_units_of_several_networks_are_there_once():
    alone_, both = units.unit_cases(["dla34"], 64), units.unit_cases(["dla34", "dla60"], 64)
    assert both[: len(alone_)] == alone_
    assert len({dataclasses.astuple(case)[1:] for case in both}) == len(both)
    assert any(case.groups > 1 for case in units.unit_cases(["dla46x_c"], 64))


def test_the_units_of_a_ladder_are_its_projections():
    found = [case for case in units.unit_cases(["dla34up"], 64) if ".dla_up." in case.name]
    assert [case.in_channels for case in found] == [(512,), (256,), (128,), (64,)]
    assert {case.kernel for case in found} == {1}


def test_work_of_a_unit():
    case = Case("n", (64,), 32, 10, 10, op="conv_norm_act", kernel=3, stride=2, groups=2, residual=True)
    values, flops = case.work("inference", 2)
    assert flops == 200 * 2 * 9 * 64 * 32 / 2
    assert values == 64 * 800 + 9 * 64 * 32 / 2 + 2 * 32 * 200
    assert case.low() == (20, 20)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("case", UNITS, ids=lambda case: case.name)
def test_every_unit_beside_its_peers(case, mode):
    settings = dataclasses.replace(quick("eager", "eager_other_layout", "library"), variants=peers.VARIANTS)
    outcome = timing.time_case(case, mode, 2, settings, RATES, suite="convs")
    assert not outcome.skipped
    assert [r["impl"] for r in outcome.records if r.get("error")] == [], outcome.records
    impls = ["dla_fast", *([peers.FROZEN] if mode == "inference" else []), "eager", "eager_other_layout", "library"]
    assert [r["impl"] for r in outcome.records] == impls


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*UNITS, Case("node", (8, 4), 8, 4, 4, residual=True),
                                  Case("merge", (8, 8), 8, 4, 4, op="merge", kernel=3)],
                         ids=lambda case: case.name)  # fmt: skip
def test_the_library_and_the_frozen_unit_compute_the_whole(case, dtype, layout):
    """As what the library is given holds the norm, the residual and the activation, it has to agree."""
    settings = timing.Settings(CPU, dtype=dtype, layout=layout)
    results = {}
    for impl in ("eager", "library", peers.FROZEN):
        runner = timing.runner_of(case, "inference", 2, settings, impl)
        assert runner.checked
        results[impl] = runner.call()[0].float()
    for impl in ("library", peers.FROZEN):
        assert timing.difference(results[impl], results["eager"]) < timing.TOLERANCES[settings.torch_dtype], impl


def test_a_library_that_disagrees_gives_no_figure(monkeypatch):
    right = alone.prepared

    def wrong(*args):
        found = right(*args)
        return {**found, "bias": found["bias"] + 1}

    monkeypatch.setattr(alone, "prepared", wrong)
    (record,) = timing.time_case(PLAIN, "inference", 2, quick("eager", "library"), RATES).records
    assert record["impl"] == "library"
    assert "differ in y" in record["error"]


def test_without_a_reordered_weight_the_convolution_alone_is_the_yardstick():
    settings = timing.Settings(CPU, dtype="float64")
    runner = timing.runner_of(PLAIN, "inference", 2, settings, "library")
    assert not runner.checked
    assert runner.call()[0].dtype == torch.float64


def test_the_suite_and_its_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cases, "measure_rates", lambda dtype, device: RATES)
    monkeypatch.setattr(units, "unit_cases", lambda names, size: [PLAIN] if "dla34up" in names else [])
    file = tmp_path / "run.json"
    assert run("convs", "--batch", 2, "--peers", "eager", "library", "--json", file) == 0
    data = json.loads(file.read_text())
    assert {r["suite"] for r in data["records"]} == {"convs"}
    said = capsys.readouterr().out
    assert "convolution units: conv_norm_act, inference, ms" in said
    (head,) = [line for line in said.splitlines() if "dla_fast+frozen" in line and line.startswith("case")]
    assert head.split()[-7:] == ["GFLOP/s", "of", "library", "best", "peer", "frozen", "speedup"]
    by_impl = {r["impl"]: r for r in data["records"] if r["mode"] == "inference"}
    ratio = by_impl["library"]["median_ms"] / by_impl[peers.FROZEN]["median_ms"]
    (row,) = [
        line for line in table.render(data).splitlines() if line.startswith("plain") and f" {ratio:.2f}x " in line
    ]
    assert f" {by_impl['dla_fast']['flops'] / by_impl[peers.FROZEN]['median_ms'] / 1e6:.0f} " in row
