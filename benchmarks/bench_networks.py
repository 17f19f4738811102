"""Whole networks in pytest-benchmark: ``pytest benchmarks``.

The same networks as ``python -m dla_fast bench models``, which interleaves the peers and prints them beside the floor.
"""

from __future__ import annotations

import pytest
import torch

from dla_fast.bench import network_timing, networks, timing
from dla_fast.models import list_models

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", list_models())
def test_network(benchmark, name, mode, impl):
    network = networks.Network.of(name, None, None)
    benchmark.group = f"{name} {mode}"
    benchmark.extra_info["shape"] = f"{network.batch} images of {network.size}x{network.size}"
    settings = timing.Settings(DEVICE, peers=("eager",))
    call = network_timing.prove(network, mode, settings, [])[0][impl]

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)
