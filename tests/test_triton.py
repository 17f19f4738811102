"""Triton's kernels without a GPU: checked in the interpreter, and compiled ahead of time.

Triton decides when it is imported whether it interprets or compiles, so each has a process of its own. The interpreter
runs the same tests of aggregate, batch_norm_act and the operators that the CPU's kernels pass, on fewer cases.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from dla_fast import backend

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Left out: what starts more threads, which kernels do not have here, and what compiles C++ around the same operators.
ALL_BUT_THREADS = "not thread_counts and not 2-torch and not inductor"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


# A process each, about as long as one another: importing torch and Triton takes as long as many a test.
INTERPRETED = (
    ("interpreted_gpu", "test_compiled", "test_ops", "test_strides"),
    ("interpreted_ida", "interpreted_strides", "interpreted_tune", "interpreted_traffic", "test_not_finite"),
    ("interpreted_tf32", "interpreted_node", "interpreted_prologue", "test_batch_norm_act"),
    ("interpreted", "test_aggregate", "test_conv_norm_act"),
)


@needs_triton
@pytest.mark.parametrize("names", INTERPRETED, ids=" ".join)
def test_in_the_interpreter(names):
    here = os.path.dirname(os.path.abspath(__file__))
    files = [os.path.join(here, f"{name}.py") for name in names]
    done = run(
        "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", *files, "-k", ALL_BUT_THREADS, TRITON_INTERPRET="1",
        DLA_FAST_TEST_BACKENDS="triton",
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}"
    passed = {line.split(".py::")[0].split("/")[-1] for line in done.stdout.splitlines() if " PASSED " in line}
    assert passed == set(names)
    slow = "interpreted_ida" in names and "DLA_FAST_SLOW_TESTS" not in os.environ
    assert ("skipped" in done.stdout) == slow


COMPILE = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dla_fast.kernels import conv_norm_act, conv_norm_act_backward, moments, tail, upsample

seen = set()
for part in (conv_norm_act, conv_norm_act_backward, moments, tail, upsample):
    shipped = list(part.specialisations())
    assert len({s.name for s in shipped}) == len(shipped), "names are unique"
    for dtype in ("bf16", "fp64"):
        # One of each kernel: the rest is the work of a benchmark.
        for kernel, group in itertools.groupby(
            sorted((s for s in shipped if s.dtype == dtype), key=lambda s: s.kernel.fn.__name__),
            key=lambda s: s.kernel.fn.__name__,
        ):
            s = next(iter(group))
            compiled = triton.compile(
                ASTSource(s.kernel, s.signature, s.constexprs, s.attrs),
                target=GPUTarget("cuda", 90, 32),
                options=s.options,
            )
            assert len(compiled.asm["cubin"]) > 1000
            assert not s.gemm or dtype == "fp64" or "mma" in compiled.asm["ptx"], s.name
            seen.add((part.__name__, kernel, dtype))
print(*sorted({kernel for _, kernel, dtype in seen if dtype == "bf16"}))
"""


@needs_triton
def test_kernels_compile_without_a_gpu(tmp_path):
    done = run("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        "apply_kernel", "backward_kernel", "coefficients_kernel", "dx_kernel", "finalise_kernel", "fused_kernel",
        "inference_kernel", "moments_kernel", "reduce_kernel", "reduce_sum_kernel", "stage_kernel", "tail_kernel",
        "upsample_kernel", "weight_gradient_kernel", "weight_kernel", "weight_sum_kernel",
    ]  # fmt: skip


def test_reasons_without_the_interpreter():
    reason = backend.can_run("triton", "aggregate", "cpu", torch.float32)
    assert reason is not None
    assert "triton is not installed" in reason or "TRITON_INTERPRET=1" in reason
    for op in ("merge", "upsample", "upsample_add"):
        if op not in backend.ops.UNITS:
            assert "no triton kernel" in str(backend.can_run("triton", op, "cpu", torch.float32))


@needs_triton
def test_triton_is_imported_on_the_first_call():
    code = (
        "import sys, torch, dla_fast; assert 'triton' not in sys.modules, 'at import'; "
        "from dla_fast.nn import AggregationNode; node = AggregationNode(8, 4).eval(); x = torch.randn(1, 8, 3, 3)\n"
        "node(x)\nassert 'dla_fast.kernels' not in sys.modules, 'auto'\n"
        "with dla_fast.use_backend('triton'): node(x)\nassert 'triton' in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.dla_fast_triton.tail in flop_registry"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
