"""benchmarks.networks: whole networks and convolution units of kept runs, as the documents show them."""

from __future__ import annotations

import json

import torch
from bench_helpers import record

from benchmarks import networks, readme
from dla_fast.bench import peers

TIMES = {
    "dla_fast": 29.0,
    peers.SWAPPED: 30.0,
    peers.FROZEN: 20.0,
    "eager": 50.0,
    "eager_other_layout": 45.0,
    "compile": 42.0,
    "compile_frozen": 40.0,
    "onnxruntime": 36.0,
    "openvino": 38.0,
}


def run_of(*records):
    machine = {"processor": "a processor", "isa": "AVX512", "kernel_isa": "amx", "threads": 2, "bytes_per_s": 23.4e9}
    return {"machine": machine, "versions": {"torch": torch.__version__, "dla_fast": "1"}, "records": [*records]}


def network(times, **changes):
    fixed = {"suite": "models", "op": "model", "case": "dla34", "shape": "3 @ 224x224", "side": 224, **changes}
    return [record(**fixed, impl=impl, median_ms=ms) for impl, ms in times.items()]


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| dla")]


def test_a_network_beside_the_best_of_each_runtime():
    training = {"dla_fast": 90.0, peers.SWAPPED: 100.0, "eager": 150.0, "compile": 130.0}
    text = networks.table([run_of(*network(TIMES)), run_of(*network(training, mode="training"))])
    (row,) = rows(text)
    cells = "dla34, 224² | 8 | 45.00 | 40.00 | 36.00 | 38.00 | 30.00 (1.50x) | 20.00 (2.00x, 1.80x) | 100.0 (1.30x)"
    assert row == f"| {cells} |"
    assert "a processor, amx, 2 threads, 23 GB/s copied, torch" in text


def test_what_a_run_has_not():
    without = {impl: ms for impl, ms in TIMES.items() if impl not in ("onnxruntime", "openvino")}
    runs = [
        run_of(*network(without), *network(TIMES, case="dla102"), *network(TIMES, dtype="bfloat16", batch=4)),
        run_of(*network({"dla_fast": 1.0, "eager": 2.0}, batch=1, mode="training")),
    ]
    found = rows(networks.table(runs))
    assert [row.split(" | ")[:2] for row in found] == [
        ["| dla102, 224²", "8"],
        ["| dla34, 224²", "1"],
        ["| dla34, 224²", "8"],
    ]
    assert found[1].endswith("| 1 | – | – | – | – | – | – | – |")
    assert found[2].endswith("| 40.00 | – | – | 30.00 (1.50x) | 20.00 (2.00x) | – |")
    assert networks.table([run_of(*network(TIMES, suite="swapped"))]) == ""


def test_the_readme_takes_every_run_of_a_name(tmp_path):
    text = "a\n<!-- networks: cpu-x -->\nold\n<!-- end of networks -->\nb\n"
    empty = "a\n<!-- networks: cpu-x -->\n<!-- end of networks -->\nb\n"
    assert readme.rewritten(text, tmp_path) == empty
    for name, case in (("cpu-x-classifiers", "dla34"), ("cpu-x-dense", "dla34up"), ("cpu-y", "dla60")):
        (tmp_path / f"{name}.json").write_text(json.dumps(run_of(*network(TIMES, case=case))))
    new = readme.rewritten(text, tmp_path)
    assert [line.split(" | ")[0] for line in rows(new)] == ["| dla34, 224²", "| dla34up, 224²"]
    assert "old" not in new
    assert readme.rewritten(new, tmp_path) == new


def test_units_beside_floor_and_library():
    unit = {"suite": "convs", "op": "conv_norm_act", "case": "dla34.a", "shape": "64 -> 64 @ 56x56, 3x3", "flops": 2e9}
    times = {"dla_fast": 4.0, peers.FROZEN: 2.0, "eager": 5.0, "library": 1.8}
    alike = [record(**unit, impl=impl, median_ms=ms, floor_ms=1.0) for impl, ms in times.items()]
    alike += [
        record(**unit, impl=impl, median_ms=ms, floor_ms=1.0, mode="training", batch=1)
        for impl, ms in (("dla_fast", 4.0), ("eager", 5.0))
    ]
    text = "\n".join(networks.units(run_of(*alike)))
    assert "| dla34.a | 64 -> 64 @ 56x56, 3x3 | 1000 | 50% | 0.90x | 2.50x |" in text
    assert "1 convolution units, inference; beside the library's: geometric mean 0.90x, worst 0.90x" in text
    assert "| dla34.a | 64 -> 64 @ 56x56, 3x3 | 500 | 25% | – | 1.25x |" in text
    assert not networks.units(run_of(*network(TIMES)))
    page = readme.figures("run.json", {**run_of(*alike), "commit": None})
    assert "| convs | conv_norm_act | inference, frozen | 1 | 2.50x | 2.50x | 2.50x |" in page
    assert "23 GB/s copied" in page
    assert "<details>" in page
