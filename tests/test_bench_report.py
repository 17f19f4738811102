"""What is made of a run: tables and the HTML report."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from bench_helpers import record

from dla_fast.bench import pictures, records, report, table

ROOT = Path(__file__).resolve().parents[1]
OPS = ("aggregate", "merge", "upsample")


@pytest.fixture
def whole():
    """A run with something of every kind."""
    rows = []
    for mode in ("inference", "training"):
        for i, op in enumerate(OPS):
            for suite in ("ops", "launch"):
                for impl, ms in (("dla_fast", 1.0 + i), ("eager", 2.0), ("compile", 2.5)):
                    spread = {"median_ms": ms, "p20_ms": 0.98 * ms, "p80_ms": 1.02 * ms}
                    rows.append(record(suite=suite, case=f"{op}.case", op=op, mode=mode, impl=impl, **spread))
        for impl in ("dla_fast", "eager"):
            rows.append(record(suite="models", case="dla34", op="model", mode=mode, impl=impl, median_ms=30.0))
            for value in (1, 2, 4):
                spread = {"median_ms": float(value), "axis": "batch", "value": value}
                rows.append(record(suite="scaling", case=f"batch={value}", mode=mode, impl=impl, **spread))
    for impl, size in (("dla_fast", 300), ("eager", 400)):
        sizes = {"peak_bytes": size * 2**20, "saved_bytes": size * 2**19}
        times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "floor_ms"))
        rows.append(record(suite="memory", case="dla34", op="model", mode="training", impl=impl, **sizes, **times))
    rows.append(record(case="bad", median_ms=None, error="dla_fast and <eager> differ"))
    machine = {
        "processor": "a processor",
        "isa": "AVX2",
        "threads": 2,
        "platform": "Linux",
        "bytes_per_s": 1e10,
        "flops_per_s": 1e11,
        "rates": {"float32": {"bytes_per_s": 1e10, "flops_per_s": 1e11}},
    }
    return {
        "machine": machine,
        "versions": {"torch": "2", "dla_fast": "1"},
        "commit": "c0ffee",
        "complete": True,
        "records": rows,
    }


# --- table and report -------------------------------------------------------------------------------------------------


def test_the_table_has_every_part(whole):
    whole["skipped"] = [{"case": "a", "mode": "inference", "impl": "compile", "reason": "no compiler"}] * 2
    whole["records"].append(record(impl="library", suite="ops", case="merge.case", op="merge", median_ms=0.1))
    text = table.render(whole)
    assert "ERRORS: 1 case without a figure" in text
    assert "whole networks: model, inference" in text
    assert "memory of a training step" in text
    assert "compile: no compiler (2 cases)" in text
    # A bare convolution is no peer: it would have been the best.
    merge = next(c for c in records.comparisons(whole["records"]) if c.mine["op"] == "merge")
    assert merge.best["impl"] == "eager"


def test_the_report_needs_nothing_beside_it(whole, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "report.html"
    report.write(whole, path)
    html = path.read_text(encoding="utf-8")
    assert re.findall(r"(?:https?:)?//[\w.]+\.\w", re.sub(r'src="data:[^"]*"', "", html)) == []
    assert not re.search(r"<(script|link|iframe)|@import|url\(", html)
    images = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert len(images) == html.count("<img")
    names = [name for name, _ in images]
    for wanted in ("ops, inference", "roofline, training", "memory", "scaling, inference"):
        assert wanted in names
    for _, data in images:
        svg = base64.b64decode(data).decode()
        assert svg.startswith("<?xml")
        assert not re.search(r'(?:href|src)="(?!#|data:)', svg)
    assert "differ" in html
    assert "<eager>" not in html
    assert html.count("<div") == html.count("</div>")


def test_the_report_tells_the_instruction_set_of_the_kernels(whole):
    pytest.importorskip("matplotlib")
    whole["records"] = []
    assert "CPU threads: 2, AVX2 (of torch)</dd>" in report.render(whole)
    whole["machine"]["kernel_isa"] = "avx512_bf16"
    assert "CPU threads: 2, avx512_bf16</dd>" in report.render(whole)
    del whole["machine"]["isa"], whole["machine"]["kernel_isa"]
    assert "CPU threads: 2, instruction set not recorded</dd>" in report.render(whole)


def test_the_report_is_the_same_for_the_same_run(whole):
    pytest.importorskip("matplotlib")
    assert report.render(whole) == report.render(whole)


def test_the_report_fits_a_small_screen(whole):
    pytest.importorskip("matplotlib")
    html = report.render(whole)
    assert '<meta name="viewport" content="width=device-width' in html
    boxed = re.findall(r'<div class="scroll"[^>]*><(img|table)', html)
    assert len(boxed) == html.count("<img") + html.count("<table")
    assert re.search(r"\.scroll \{ overflow-x: auto", html)
    assert re.search(r"img \{[^}]*min-width: \d+px", html)
    assert re.search(r"@media \(max-width: \d+px\) \{[^@]*dl \{ display: block", html)


def test_no_floor_is_drawn_over_a_bar(whole, monkeypatch):
    pytest.importorskip("matplotlib")
    for share in (0.5, 1.5):  # ahead of the bar, and within it where the cache beats the memory
        whole["records"].append(record(suite="ops", case=f"floor {share}", floor_ms=share))
        whole["records"].append(record(suite="ops", case=f"floor {share}", impl="eager", median_ms=3.0))
    found = [c for c in records.comparisons(whole["records"]) if c.mine["suite"] == "ops"]
    monkeypatch.setattr(pictures, "_bytes", lambda figure: figure)
    figure = pictures.ratio_bars(found, "ops")
    (axes,) = figure.axes
    bars = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
    floors = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "|"]
    assert len(bars) == len(floors) == len(found)
    assert not any(low <= y <= high for y in floors for low, high in bars)
    (legend,) = figure.legends
    assert "up to the machine's floor" in [text.get_text() for text in legend.get_texts()]


def test_a_report_of_memory_alone(whole):
    pytest.importorskip("matplotlib")
    whole["records"] = [r for r in whole["records"] if r["suite"] == "memory"]
    html = report.render(whole)
    assert "No times in this run" in html
    assert html.count("<img") == 1
