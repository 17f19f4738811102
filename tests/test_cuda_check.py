"""benchmarks.gates.cuda_check: what it reads of the compiler's output, what is a fault, what it says without nvcc."""

from __future__ import annotations

import pytest

from benchmarks.gates import cuda_check
from benchmarks.gates.cuda_check import Kernel

LOG = """
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compiling entry function '_Z3badPf' for 'sm_90'
ptxas info    : Function properties for _Z3badPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers, 16 bytes cumulative stack size
"""

SASS = """
		Function : _Z4goodPf
        /*0130*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0150*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
		Function : _Z3badPf
        /*0130*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0140*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
"""


def test_reads_the_compilers_output():
    found = cuda_check.resources(LOG)
    assert found["_Z4goodPf"] == Kernel("_Z4goodPf", registers=40, shared=2048)
    assert found["_Z3badPf"] == Kernel("_Z3badPf", registers=128, stack=16, spills=20)
    assert cuda_check.instructions(SASS) == {"_Z4goodPf": {"load", "store"}, "_Z3badPf": {"mma"}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tail_kernel<float, 4, true, (Act)1>", {"load", "store"}),
        ("tail_kernel<float, 1, true, (Act)5>", set()),
        ("moments_kernel<__half, 8, false>", {"load"}),
        ("reduce_kernel<double, 2, true, (Act)1>", {"load"}),
        ("upsample_rows_kernel<__nv_bfloat16, 8, 2>", {"store"}),
        ("upsample_backward_kernel<__half, 8, 2>", {"load"}),
        ("upsample_backward_taps_kernel<__half, 4, 8>", set()),
        ("aggregate_inference_kernel<float, true, true>", {"mma", "load"}),
        ("aggregate_inference_kernel<float, true, false>", {"mma"}),
        ("finalise_kernel<float>", set()),
    ],
)
def test_what_machine_code_must_hold(name, expected):
    assert cuda_check.expected(name) == expected


def test_faults():
    def faults(**properties):
        return cuda_check.faults(Kernel("tail_kernel<float, 4, true, (Act)1>", **properties), disassembled=True)

    assert faults(instructions=["load", "store"]) == []
    assert faults(instructions=["load"]) == ["has no 128-bit store"]
    assert faults(instructions=["load", "store"], spills=4, stack=8) == [
        "spills 4 bytes",
        "has a stack frame of 8 bytes",
    ]


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    assert cuda_check.main([]) == 0
    assert "skipped: nvcc was not found" in capsys.readouterr().out


@pytest.mark.skipif(cuda_check.toolkit() is None, reason="nvcc is not installed")
def test_a_kernel_that_spills_and_one_that_does_not_compile_fail(monkeypatch, tmp_path, capsys):
    (tmp_path / "spills.cu").write_text(
        "__global__ void __launch_bounds__(1024, 2) tail_kernel(float* p) {\n"
        "  float v[64];\n#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) v[i] = p[i * threadIdx.x];\n  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 64; ++i) p[(i * i) ^ threadIdx.x] = v[i] * v[63 - i];\n}\n"
    )
    (tmp_path / "broken.cu").write_text("__global__ void kernel() { nothing(); }\n")
    monkeypatch.setattr(cuda_check, "SOURCES", tmp_path)
    monkeypatch.setattr(cuda_check, "check_bindings", lambda cuda: None)
    assert cuda_check.main(["--architectures", "90", "--out", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "FAILED tail_kernel" in out
    assert "spills" in out
    assert 'identifier "nothing" is undefined' in out
