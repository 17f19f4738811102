"""The benchmarks' cases as pytest-benchmark runs them: the same definitions as ``python -m dla_fast bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dla_fast.bench import MODES, Case, peers, timing
from dla_fast.proof import parity

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLEMENTATIONS = ("dla_fast", "eager")
BATCH = 8


@pytest.fixture
def bench_case(benchmark: Any) -> Callable[[Case, str, str], None]:
    """Prove that an implementation agrees with eager PyTorch on a case, then benchmark it."""

    def run(case: Case, mode: str, impl: str, dtype: torch.dtype = torch.float32) -> None:
        benchmark.group = f"{case.op} {case.name} {mode}"
        benchmark.extra_info["shape"] = case.describe()
        spec = case.spec(BATCH, dtype, "channels_last", training=mode != "inference")
        problem = parity.PROBLEMS[case.op](spec)
        dy = parity.safe_gradient(problem, DEVICE) if mode == "training" else None
        runners = {name: peers.make_runner(case, mode, name, problem, dy, DEVICE) for name in IMPLEMENTATIONS}
        results = {
            name: dict(zip(runner.names, (t.detach().clone() for t in runner.call()), strict=True))
            for name, runner in runners.items()
        }
        timing.check_agreement(case.name, results, timing.tolerance(dtype, DEVICE))

        def call() -> None:
            runners[impl].call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark(call)

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every benchmark its modes and implementations."""
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", MODES)
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", IMPLEMENTATIONS)
