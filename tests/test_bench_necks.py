"""``bench necks``: what it records and prints, what is swapped in it, and that a wrong result gives no figure."""

from __future__ import annotations

import json

import pytest
import torch
from bench_helpers import CPU, FIELDS, RATES, quick, run

import dla_fast
from dla_fast.bench import cases, compare, ladders, neck_timing, neck_units, necks, peers, timing

CHANNELS = (8, 12, 16, 20)


def tiny(name: str) -> neck_timing.Neck:
    return neck_timing.Neck(name, 8, 2, CHANNELS)


def test_a_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cases, "measure_rates", lambda dtype, device: RATES)
    monkeypatch.setattr(neck_timing.Neck, "of", staticmethod(lambda name, size, batch: tiny(name)))
    monkeypatch.setattr(necks, "NECKS", ("plain", "returning"))
    file = tmp_path / "run.json"
    assert run("necks", "--peers", "eager", "--json", file, "--html", tmp_path / "run.html") == 0
    data = json.loads(file.read_text())
    found = [(r["case"], r["mode"], r["impl"]) for r in data["records"]]
    assert found == [
        (f"neck.{name}", mode, impl)
        for name in ("plain", "returning")
        for mode, impls in (
            ("inference", ("dla_fast", "dla_fast+frozen", "eager")),
            ("training", ("dla_fast", "eager")),
        )
        for impl in impls
    ]
    assert all(set(r) >= FIELDS and not r.get("error") and r["suite"] == "necks" for r in data["records"])
    assert [r["network"] for r in data["records"][:3]] == ["4 units swapped", "4 units swapped", "as it is"]
    assert data["records"][0]["shape"] == "8+12+16+20 @ 8x8"
    assert not compare.compare(data, data, 0.05).changes
    lines = capsys.readouterr().out.splitlines()
    for mode in ("inference", "training"):
        (at,) = [i for i, line in enumerate(lines) if line.startswith("necks of others") and f"neck, {mode}" in line]
        columns = lines[at + 1].split("  ")
        assert "of eager" in [c.strip() for c in columns]
        for line in lines[at + 3 : at + 5]:
            mine, eager = ((r["median_ms"]) for r in _pair(data["records"], line.split()[0], mode))
            assert f" {eager / mine:.2f}x " in line, "before over after"
    assert "Necks of others" in (tmp_path / "run.html").read_text()


def _pair(records, case, mode):
    by = {r["impl"]: r for r in records if (r["case"], r["mode"]) == (case, mode)}
    return by["dla_fast"], by["eager"]


@pytest.mark.parametrize("name", necks.NECKS)
def test_every_neck_gives_the_finest_map_and_is_bilinear_at_first(name):
    neck = necks.make(name, CHANNELS)
    given = tiny(name).levels()
    kept = list(given)
    assert neck(given).shape == (2, 8, 8, 8)
    assert all(a is b for a, b in zip(given, kept, strict=True)), "the next pass takes the same levels"
    for module in neck.modules():
        if isinstance(module, torch.nn.ConvTranspose2d):
            flat = module(torch.ones(1, module.in_channels, 6, 6))
            f = module.stride[0]
            torch.testing.assert_close(flat[..., f:-f, f:-f], torch.ones_like(flat[..., f:-f, f:-f]))


def test_a_toolboxs_convolutions_know_what_to_do_without_images():
    for ours, stock in (
        (neck_units.EmptyConv2d(3, 4, 3, stride=2, padding=1), torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)),
        (ladders.up_convolution(3, 2, neck_units.EmptyConvTranspose2d), ladders.up_convolution(3, 2)),
    ):
        stock.load_state_dict(ours.state_dict())
        x = torch.randn(2, 3, 6, 4)
        assert torch.equal(ours(x), stock(x))
        assert ours(x[:0]).shape == (0, *stock(x).shape[1:])


def test_sizes():
    assert neck_timing.Neck.of("plain", None, None) == neck_timing.Neck("plain", 128, 1, (64, 128, 256, 512))
    assert neck_timing.Neck.of("plain", 100, 2).side == 24, "whole pixels of the coarsest level"
    assert neck_timing.Neck.of("plain", 8, 2).side == 8
    assert [tuple(x.shape) for x in tiny("plain").levels(device="meta")] == [
        (2, c, 8 >> i, 8 >> i) for i, c in enumerate(CHANNELS)
    ]
    with pytest.raises(KeyError):
        necks.make("nothing")


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_agree_and_are_counted(mode, dtype):
    settings = timing.Settings(
        CPU, dtype, rounds=3, peers=("eager", "reference", "eager_other_layout"), seconds=0.02, variants=(peers.LOW,)
    )
    outcome = neck_timing.time_neck(tiny("returning"), mode, settings, RATES)
    assert not outcome.skipped
    impls = {r["impl"]: r for r in outcome.records}
    assert not [r["error"] for r in outcome.records if r.get("error")]
    assert {"dla_fast", "eager", "reference", "eager_other_layout"} <= set(impls)
    assert (peers.LOW in impls) == (mode == "training")
    assert impls["eager_other_layout"]["layout"] == "contiguous"
    assert impls["dla_fast"]["flops"] > 0


def test_what_cannot_be_frozen_is_told():
    settings = timing.Settings(CPU, rounds=3, peers=("eager",), seconds=0.02, variants=(peers.FROZEN,))
    outcome = neck_timing.time_neck(tiny("deformable"), "inference", settings, RATES)
    assert [r["impl"] for r in outcome.records] == ["dla_fast", "eager"]
    assert [(s["impl"], "nothing in it is fused" in s["reason"]) for s in outcome.skipped] == [(peers.FROZEN, True)]


def test_a_wrong_result_gives_no_figure(monkeypatch):
    swap = dla_fast.swap_

    def wrong(model, **options):
        report = swap(model, **options)
        model.ida_0.register_forward_hook(lambda m, xs, y: [t + 1e-3 for t in y])
        return report

    monkeypatch.setattr(dla_fast, "swap_", wrong)
    neck_timing._swapped.cache_clear()
    try:
        (record,) = neck_timing.time_neck(tiny("returning"), "inference", quick("eager"), RATES).records
    finally:
        neck_timing._swapped.cache_clear()
    assert record["error"].startswith("neck.returning (inference) in float64: eager and dla_fast differ in output 0 by")
    assert record["median_ms"] is None


def test_a_neck_that_is_not_swapped_is_an_error(monkeypatch):
    monkeypatch.setattr(dla_fast, "swap_", lambda model, **options: dla_fast.swap.SwapReport())
    neck_timing._swapped.cache_clear()
    (record,) = neck_timing.time_neck(tiny("returning"), "inference", quick("eager"), RATES).records
    assert "swap_ took nothing of it" in record["error"]
    assert record["impl"] == "dla_fast"


def test_levels_too_small_to_train_on_give_no_figure():
    outcome = neck_timing.time_neck(neck_timing.Neck("plain", 8, 1, CHANNELS), "training", quick("eager"), RATES)
    assert "more than 1 value per channel" in outcome.records[0]["error"]
