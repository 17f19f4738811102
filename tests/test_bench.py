"""The benchmarks: what is timed, and that disagreement is never a figure."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from bench_helpers import CPU, FIELDS, OPS, RATES, TINY, quick, run

import dla_fast
from dla_fast import backend, bench, functional
from dla_fast.bench import Case, Rates, cases, network_timing, networks, peers, timing
from dla_fast.nn.frozen import Frozen
from dla_fast.proof import measure
from dla_fast.swap.report import SwapReport

MEASURE_RATES = cases.measure_rates


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch):
    """Measuring the machine takes seconds, and no test needs its figures."""
    monkeypatch.setattr(cases, "measure_rates", lambda dtype, device: RATES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_floor_takes_the_best_product(monkeypatch, dtype):
    """Of those there are: a float product may be made of six of bfloat16."""
    took: dict[str, float] = {}

    def interleave(calls, **_):
        for call in calls.values():
            call()
        return {name: measure.Timing(1.0, took.get(name, 1.0), 1.0) for name in calls}

    monkeypatch.setattr(measure, "interleave", interleave)
    product = 2 * 1024**3 * 1e3
    assert MEASURE_RATES(dtype, torch.device("cpu")) == Rates(2 * 64 * 2**20 * 1e3, product)
    took["ours"] = 0.01
    assert MEASURE_RATES(dtype, torch.device("cpu")).flops_per_s == pytest.approx(2e5 * 8 * 14**2 * 512**2)
    took = {"torch.bfloat16 matmul": 0.1}
    rate = MEASURE_RATES(dtype, torch.device("cpu")).flops_per_s
    assert rate / product == pytest.approx({torch.float32: 10 / 6, torch.float64: 1, torch.bfloat16: 10}[dtype])


# --- cases ------------------------------------------------------------------------------------------------------------


def test_the_roots_of_dla34():
    found = bench.network_cases("dla34", 224)
    assert [c.name.split(".", 1)[1] for c in found][0] == "level2.root"
    assert (found[0].in_channels, found[0].out_channels, found[0].height) == ((64, 64), 64, 56)
    assert max(len(c.in_channels) for c in found) == 4


def test_the_ladder_of_dla34up():
    found = bench.ida_cases()
    assert {c.op for c in found} == {"aggregate", "merge", "upsample", "upsample_add", "batch_norm_act"}
    nodes = [(c.in_channels, c.out_channels, c.height, c.low()[0]) for c in found if c.op == "merge"]
    assert nodes == [((256, 256), 256, 32, 16), ((128, 128), 128, 64, 32), ((64, 64), 64, 128, 64)]
    assert [(c.in_channels, c.out_channels, c.height) for c in found if c.op == "aggregate"] == [
        ((512,), 256, 16),
        ((256,), 128, 32),
        ((128,), 64, 64),
    ]
    assert len({c.name for c in found}) == len(found)


def test_work_follows_the_design():
    node = Case("n", (64, 32), 64, 10, 10)
    assert node.work("inference", 1) == (100 * (96 + 64), 100 * 2 * 96 * 64)
    assert node.work("forward", 1) == (100 * (96 + 3 * 64), 100 * 2 * 96 * 64)
    assert node.work("training", 2) == (200 * (3 * 96 + 7 * 64), 200 * 6 * 96 * 64)
    up = Case("u", (8,), 8, 10, 10, op="upsample")
    assert up.work("inference", 1) == (8 * (25 + 100), 8 * 25 * 32)
    assert up.work("training", 1) == (8 * (25 + 100 + 50 + 100), 8 * 25 * (32 + 64))
    merge = Case("m", (8, 8), 8, 10, 10, op="merge", kernel=3)
    assert merge.work("inference", 1) == (8 * 100 + 8 * 25 + 800, 2 * 9 * 16 * 8 * 100 + 8 * 4 * 8 * 25)
    assert Case("b", (8,), 8, 10, 10, op="batch_norm_act").work("training", 1)[0] == 8 * 800
    assert RATES.floor_ms(1e7, 1e7) == 1.0
    assert node.floor_ms("inference", 1, 4, RATES) == pytest.approx(1e3 * 1228800 / 1e11)  # the product decides


def test_an_odd_factor_has_its_own_size():
    assert Case("u", (4,), 4, 13, 13, op="upsample", factor=3).low() == (4, 4)
    with pytest.raises(ValueError, match="13x13 is no size upsampled by 2"):
        Case("u", (4,), 4, 13, 13, op="upsample").low()


def test_scaling_varies_one_thing_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "AXES", {"batch": (1, 2), "inputs": (1, 3)})
    found = cases.scaling_cases(cases.AXES, threads=(1, 2))
    assert [(c.axis, c.value) for c in found] == [
        ("batch", 1), ("batch", 2), ("inputs", 1), ("inputs", 3), ("threads", 1), ("threads", 2)
    ]  # fmt: skip
    assert [len(c.in_channels) for c in found] == [2, 2, 1, 3, 2, 2]


def test_names_that_others_import():
    assert Path(bench.__file__).parent.name == "bench"
    for name in ("Case", "network_cases", "Rates", "measure_rates", "interleave", "EagerNode"):
        assert hasattr(bench, name)
    assert bench.interleave is measure.interleave


# --- timing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", bench.MODES)
@pytest.mark.parametrize("case", [TINY, *cases.launch_cases()[1:]], ids=lambda case: case.op)
def test_every_op_in_every_mode(case, mode):
    wanted = ("eager", "eager_other_layout", "reference", "library")
    outcome = timing.time_case(case, mode, 2, quick(*wanted, rotate=2), RATES)
    assert not outcome.skipped
    by_impl = {r["impl"]: r for r in outcome.records}
    assert {"dla_fast", "eager", "eager_other_layout"} <= set(by_impl)
    assert ("library" in by_impl) == (mode == "inference" and case.op in ("aggregate", "merge"))
    for r in outcome.records:
        assert set(r) >= FIELDS
        assert 0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
        assert r["floor_ms"] > 0
        assert r["copies"] == 2
    assert by_impl["eager_other_layout"]["layout"] == "contiguous"
    assert by_impl["dla_fast"]["backend"] in ("cpu", "reference")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes_agree(dtype):
    settings = timing.Settings(CPU, dtype=dtype, layout="contiguous", rounds=3, seconds=0.02)
    outcome = timing.time_case(TINY, "training", 2, settings, RATES)
    assert [r["impl"] for r in outcome.records if not r.get("error")] == ["dla_fast", "eager"]


def test_compiled_peers():
    outcome = timing.time_case(TINY, "inference", 2, quick("eager", "compile_frozen"), RATES)
    impls = {r["impl"] for r in outcome.records} | {skip["impl"] for skip in outcome.skipped}
    assert impls == {"dla_fast", "eager", "compile_frozen"}


@pytest.mark.parametrize("fault", ["value", "nan", "raises"])
def test_a_disagreement_is_an_error_and_never_a_figure(monkeypatch, capsys, tmp_path, fault):
    right = functional.upsample

    def wrong(*args, **kwargs):
        if fault == "raises":
            raise RuntimeError("it is broken")
        y = right(*args, **kwargs).clone()
        y[0, 0, 0, 0] += math.nan if fault == "nan" else 0.01
        return y

    monkeypatch.setattr(functional, "upsample", wrong)
    file, html = tmp_path / "run.json", tmp_path / "run.html"
    assert run("launch", "--peers", "eager", "--modes", "inference", "--json", file, "--html", html) == 1
    found = json.loads(file.read_text())["records"]
    (error,) = [r for r in found if r.get("error")]
    assert error["op"] == "upsample"
    assert error["median_ms"] is None
    assert ("it is broken" if fault == "raises" else "differ in y by") in error["error"]
    assert {r["op"] for r in found if r["median_ms"] is not None} == set(OPS) - {"upsample"}
    assert "ERRORS: 1 case without a figure" in capsys.readouterr().out
    assert "Errors: 1 case without a figure" in html.read_text()


def test_a_wrong_gradient_is_a_disagreement():
    y, d = torch.randn(4, 4), torch.randn(3)
    results = {"dla_fast": {"y": y, "d x": d}, "eager": {"y": y, "d x": d + 0.01}}
    with pytest.raises(timing.Disagreement, match="eager differ in d x by"):
        timing.check_agreement("case", results, 1e-4)
    assert timing.difference(torch.zeros(2), torch.zeros(3)) == math.inf
    assert timing.difference(torch.zeros(0), torch.zeros(0)) == 0


def test_a_peer_that_cannot_run_is_left_out_with_its_reason(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    outcome = timing.time_case(TINY, "inference", 1, quick("eager", "compile"), RATES)
    assert {r["impl"] for r in outcome.records} == {"dla_fast", "eager"}
    assert outcome.skipped[0]["reason"] == "RuntimeError: no compiler"


def test_without_a_peer_there_is_no_figure(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no eager")

    monkeypatch.setattr(peers.eager, "aggregate", broken)
    (record,) = timing.time_case(TINY, "inference", 1, quick(), RATES).records
    assert "nothing proves dla_fast right" in record["error"]


def test_a_forced_backend_that_cannot_run_is_an_error():
    with backend.use_backend("cuda"):
        (record,) = timing.time_case(TINY, "inference", 1, quick(), RATES).records
        assert "'cuda' was asked for and cannot run aggregate" in record["error"]
        (record,) = network_timing.time_network(networks.Network("dla46_c", 64, 2), "inference", quick(), RATES).records
        assert "cannot run aggregate" in record["error"]


def test_long_cases_get_fewer_rounds():
    settings = timing.Settings(CPU, rounds=20, seconds=1.0)
    assert [timing.rounds_that_fit(settings, ms) for ms in (1.0, 100.0, 5000.0)] == [20, 10, 3]


# --- what only a GPU runs, with a stand-in for it ---------------------------------------------------------------------


class FakeEvent:
    def __init__(self, **_) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.at - self.at) * 1e3


class FakeGraph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class FakeStream:
    def __init__(self, *_) -> None:
        self.waited = 0

    def wait_stream(self, _) -> None:
        self.waited += 1


class FakeScope:
    def __init__(self, *_, **__) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as far as timing uses it, with everything on the CPU."""
    for name, value in {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": FakeScope,
        "graph": FakeScope,
        "synchronize": lambda *_: None,
        "get_device_properties": lambda _: type("P", (), {"L2_cache_size": 1000})(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return torch.device("cuda")


def test_gpu_inputs_go_round_past_the_cache(fake_cuda):
    assert timing.copies_needed(500, fake_cuda) == 5
    assert timing.copies_needed(10**9, fake_cuda) == 2
    assert timing.copies_needed(1, fake_cuda) == 64
    assert timing.copies_needed(1, CPU) == 1
    seen: list[int] = []
    turn = timing.in_turn([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(4):
        turn()
    assert seen == [1, 2, 0, 1]


def test_gpu_passes_are_captured_and_timed_with_events(fake_cuda):
    calls: list[int] = []
    graph = timing.graph_of([lambda: calls.append(1)] * 2, fake_cuda)
    assert graph is not None
    assert len(calls) == 4  # once to warm up, once to capture
    graph()
    assert len(calls) == 4
    times = measure.interleave({"a": lambda: time.sleep(0.001)}, rounds=2, min_sample_ms=0, device=fake_cuda)
    assert times["a"].median_ms >= 1
    assert timing.host_ms(lambda: time.sleep(0.001), fake_cuda, calls=3) >= 1


def test_gpu_pass_that_cannot_be_captured(fake_cuda):
    def refuses() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert timing.graph_of([refuses], fake_cuda) is None


# --- whole networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_network(mode):
    network = networks.Network("dla46_c", 64, 2)
    outcome = network_timing.time_network(network, mode, quick("eager", "eager_other_layout"), RATES)
    assert [r["impl"] for r in outcome.records] == ["dla_fast", "eager", "eager_other_layout"], outcome.records
    assert all(r["floor_ms"] > 0 for r in outcome.records)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_stock_network_swapped_and_frozen(timm, mode):
    """Beside this package's own: timm's classifier, and for dense prediction one written op by op around it."""
    other = (peers.FROZEN, "timm") if mode == "inference" else (peers.LOW, "dla_fast")
    for name in ("dla46_c", "dla34up"):
        settings = dataclasses.replace(quick("eager"), variants=peers.VARIANTS)
        outcome = network_timing.time_network(networks.Network(name, 64, 2), mode, settings, RATES)
        found = [(r["impl"], r["network"].split(",")[0]) for r in outcome.records]
        assert found == [("dla_fast", "dla_fast"), (peers.SWAPPED, "timm"), other, ("eager", "timm")], outcome.records
        assert int(re.search(r"(\d+) units swapped", outcome.records[1]["network"])[1]) > 1
        assert outcome.records[1]["backend"] == outcome.records[0]["backend"]


def test_a_frozen_network_is_frozen_and_proved(timm, monkeypatch):
    right, frozen = dla_fast.freeze_, []
    monkeypatch.setattr(dla_fast, "freeze_", lambda model: frozen.append(model.eval()) or right(model))
    settings = dataclasses.replace(quick("eager"), variants=(peers.FROZEN,))
    network = networks.Network("dla46_c", 64, 2)
    outcome = network_timing.time_network(network, "inference", settings, RATES)
    assert [r["impl"] for r in outcome.records] == ["dla_fast", peers.FROZEN, "eager"], outcome.records
    # Once in float64, once as it is timed.
    assert {p.dtype for model in frozen for p in model.parameters()} == {torch.float64, torch.float32}
    run = Frozen.run
    monkeypatch.setattr(Frozen, "run", lambda *args: run(*args) * 1.01)
    (record,) = network_timing.time_network(network, "inference", settings, RATES).records
    assert record["impl"] == peers.FROZEN
    assert "eager and dla_fast+frozen differ in output 0" in record["error"]


def test_swapping_nothing_gives_no_figure(timm, monkeypatch):
    monkeypatch.setattr(dla_fast, "swap_", lambda model: SwapReport([]))
    settings = dataclasses.replace(quick("eager"), variants=(peers.SWAPPED,))
    (record,) = network_timing.time_network(networks.Network("dla46_c", 64, 2), "inference", settings, RATES).records
    assert "swap_ took nothing of it" in record["error"]
    assert record["median_ms"] is None


def test_a_network_with_a_parameter_that_is_not_trained():
    """dla34up's last upsampling keeps its bilinear weight."""
    network = networks.Network("dla34up", 64, 2)
    outcome = network_timing.time_network(network, "training", quick("eager"), RATES)
    assert [(r["impl"], r.get("error")) for r in outcome.records] == [("dla_fast", None), ("eager", None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_that_disagrees(monkeypatch, timm, dtype):
    settings = timing.Settings(CPU, dtype=dtype, rounds=3, seconds=0.02)
    network = networks.Network("dla46_c", 64, 2)
    if dtype == "bfloat16":
        assert not network_timing.time_network(network, "inference", settings, RATES).records[0].get("error")
    right = functional.run_link
    monkeypatch.setattr(functional, "run_link", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    (record,) = network_timing.time_network(network, "inference", settings, RATES).records
    assert "differ in output 0" in record["error"]
    assert record["median_ms"] is None


def test_networks_work_counts_convolutions():
    network = networks.Network("dla34", 224, 1)
    _, flops = networks.work(network, training=False)
    assert flops == pytest.approx(2 * 3.07e9, rel=0.02)  # GMAC of the paper's network
    assert networks.work(network, training=True)[1] == pytest.approx(3 * flops)


def test_outputs_of_any_structure():
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert [t.numel() for t in networks.tensors_of({"a": a, "b": [b, (c,)]})] == [1, 2, 3]
    assert networks.Network.of("dla34up", None, None) == networks.Network("dla34up", 512, 2)
