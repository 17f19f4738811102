"""What is made of a run: tables, the HTML report, the README's figures."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from pathlib import Path

import pytest

from dla_fast.commands.bench import records, report, table

ROOT = Path(__file__).resolve().parents[1]
OPS = ("aggregate", "merge", "upsample")


def record(**changes):
    base = {
        "suite": "nodes",
        "case": "a",
        "op": "aggregate",
        "mode": "inference",
        "impl": "dla_fast",
        "device": "cpu",
        "dtype": "float32",
        "layout": "channels_last",
        "batch": 8,
        "threads": 2,
        "shape": "8+8 -> 8 @ 28x28",
        "side": 28,
        "median_ms": 1.0,
        "p20_ms": 0.98,
        "p80_ms": 1.02,
        "floor_ms": 0.5,
        "bytes": 1e6,
        "flops": 1e7,
        "peak_bytes": None,
        "saved_bytes": None,
    }
    return {**base, **changes}


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


def test_the_report_is_the_same_for_the_same_run(whole):
    pytest.importorskip("matplotlib")
    assert report.render(whole) == report.render(whole)


def test_a_report_of_memory_alone(whole):
    pytest.importorskip("matplotlib")
    whole["records"] = [r for r in whole["records"] if r["suite"] == "memory"]
    html = report.render(whole)
    assert "No times in this run" in html
    assert html.count("<img") == 1


# --- the README -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme():
    path = ROOT / "benchmarks" / "readme.py"
    if not path.exists():
        pytest.skip("not a checkout")
    spec = importlib.util.spec_from_file_location("readme_figures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_figures_of_the_kept_runs(readme):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.BLOCK.search(text)
    assert readme.rewritten(text) == text, "run `make readme`"


def test_the_readmes_figures_follow_the_run(readme, whole, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(whole))
    text = "before\n<!-- figures: run.json -->\nold 9.99x\n<!-- end of figures -->\nafter\n"
    new = readme.rewritten(text, tmp_path)
    assert "9.99x" not in new
    assert "| ops | aggregate | inference | 1 | 2.00x | 2.00x | 2.00x |" in new
    assert "300 MiB (0.75x)" in new
    assert new.startswith("before\n<!-- figures: run.json -->\n`benchmarks/results/run.json` — a processor, AVX2")
    assert readme.rewritten(new, tmp_path) == new
