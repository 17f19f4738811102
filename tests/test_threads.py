"""Calls from several Python threads at once give what one thread gets, to the bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from dla_fast import backend, functional, use_backend
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

THREADS, REPEATS = 4, 8


@pytest.mark.skipif(
    backend.can_run("cpu", "aggregate", "cpu", torch.float32) is not None, reason="the C++ extension is not built"
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("op", list(parity.PROBLEMS))
def test_concurrent_calls(op, layout, threads):
    # Each thread has its own values, so that memory shared by mistake shows.
    size = {"channels": (24, 40), "height": 23, "width": 21, "kernel": 3 if op == "merge" else 1}
    problems = [parity.PROBLEMS[op](Spec(layout=layout, seed=seed, **size)) for seed in range(THREADS)]
    gradients = [parity.safe_gradient(p, torch.device("cpu")) for p in problems]
    together = Barrier(THREADS)

    def run(i: int) -> dict[str, torch.Tensor]:
        return parity.execute(problems[i], functional, gradients[i], None)

    def run_often(i: int) -> list[dict[str, torch.Tensor]]:
        together.wait()
        return [run(i) for _ in range(REPEATS)]

    torch.set_num_threads(threads)
    try:
        with use_backend("cpu"), ThreadPoolExecutor(THREADS) as pool:
            alone = [run(i) for i in range(THREADS)]
            found = list(pool.map(run_often, range(THREADS)))
    finally:
        torch.set_num_threads(1)
    for expected, results in zip(alone, found, strict=True):
        for result in results:
            assert all(torch.equal(expected[name], value) for name, value in result.items())
