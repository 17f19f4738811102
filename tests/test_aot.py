"""The gate of benchmarks.gates.aot: kernels compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[1]


def aot(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: Triton decides when it is imported whether it compiles."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gates.aot", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_triton
def test_every_fault_is_found_and_nothing_is_compiled_twice(tmp_path):
    toys = ("--modules", "toy_kernels", "--targets", "sm_90", "--cache", tmp_path / "kept")
    done = aot(*toys, "--json", tmp_path / "all.json")
    assert done.returncode == 1, done.stderr[-2000:]
    written = json.loads((tmp_path / "all.json").read_text())
    # Of a part of the kernels nothing is predicted unless it is asked for.
    assert written["predictions"] == []
    results = {r["kernel"]: r for r in written["kernels"]}
    faults = {line.split()[2]: line.split(": ", 2)[2] for line in done.stdout.splitlines() if "aot: sm_90" in line}
    assert "good_kernel" not in faults
    assert results["good_kernel"]["matrix"] == ["wgmma.mma_async"]
    assert results["good_kernel"]["registers"] > 16
    assert "without a matrix instruction" in faults["no_matrix_instruction_kernel"]
    assert "spills" in faults["spilling_kernel"]
    assert results["spilling_kernel"]["spilled"] > 0
    assert "bytes of shared memory, a block may have 232448" in faults["large_kernel"]
    assert "does not compile" in faults["broken_kernel"]
    assert "aot: 1 of 5 kernels may ship" in done.stdout
    again = aot(*toys, "--only", "good_kernel")
    assert again.returncode == 0, again.stdout
    assert "0 compiled now, 1 kept from before" in again.stdout


@needs_triton
def test_a_product_without_warpgroup_instructions_is_a_fault_where_its_tile_allows_them():
    from benchmarks.gates.compiled import TARGETS, Result

    result = Result("name", "kernel", "bf16", True, "sm_90", 4, registers=64, occupancy=0.5, half_products=1)
    result.matrix = ["mma.sync"]
    assert result.faults() == []
    result.dots = [(64, "mma")]
    assert result.faults() == ["a half-precision product whose tile allows wgmma goes without it"]
    result.target = "sm_80"
    assert result.faults() == []
    result.dots = [(64, "blocked")]
    assert "has no matrix instruction" in result.faults()[0]
    # 65536 registers: four blocks of four warps at 128 a thread; 100 KB of shared memory: two.
    assert TARGETS["sm_90"].occupancy(128, 0, 4) == 4 * 4 / 64
    assert TARGETS["sm_90"].occupancy(32, 100 * 1024, 4) == 2 * 4 / 64


NODE = "512+512+256 -> 512 @ 7x7 channels_last inference"


@needs_triton
def test_shares_of_floors_are_predicted_and_held_to_their_lines(tmp_path):
    toys = ("--modules", "toy_kernels", "--targets", "sm_90", "--cache", tmp_path, "--only", "good_kernel")
    done = aot(*toys, "--predict", NODE, "--json", tmp_path / "all.json")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (found,) = json.loads((tmp_path / "all.json").read_text())["predictions"]
    assert found["op"] == "aggregate 512+512+256 -> 512 @ 7x7"
    assert (found["pass"], found["layout"], found["dtype"]) == ("inference", "channels_last", "bfloat16")
    assert (found["batch"], found["height"], found["library"]) == (256, 7, False)
    assert found["kernels"] == ["inference_kernel"]
    assert found["share"] == pytest.approx(found["floor_us"] / found["us"], abs=1e-3)
    assert found["line"] <= found["share"] <= 1
    assert found["goal"] == 0.75
    assert "1 of 1 shares hold their line" in done.stdout
    # What a kernel does is read once; a line above what is predicted fails.
    program = (
        "import sys; from benchmarks.gates import lines, predict; "
        "lines.LINES['inference', 'channels_last'] = ((0, 0.99, 0.99),); sys.exit(predict.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--only", NODE, "--cache", str(tmp_path / "features"), "--loops"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 1, failed.stderr[-2000:]
    assert "under its line of 99%: aggregate 512+512+256 -> 512 @ 7x7 inference channels_last" in failed.stdout
    assert "programs of" in failed.stdout
    assert len(list((tmp_path / "features").glob("*.json"))) == 1


@needs_triton
def test_nothing_chosen():
    assert aot("--only", "no such kernel").returncode == 2
    command = [sys.executable, "-m", "benchmarks.gates.predict", "--only", "no such pass"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 2
