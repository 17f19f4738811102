"""Aggregation nodes of dla34 in pytest-benchmark: ``pytest benchmarks``.

The same cases as ``python -m dla_fast bench``, which interleaves the peers and prints them beside the floor.
"""

from __future__ import annotations

import pytest
import torch

from dla_fast.commands.bench import MODES, EagerNode, network_cases
from dla_fast.nn import AggregationNode

CASES = network_cases("dla34", 224)
BATCH = 8


@pytest.mark.parametrize("impl", ["dla_fast", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", MODES)
def test_aggregate(benchmark, mode, case, impl):
    torch.manual_seed(0)
    benchmark.group = f"{case.name} {mode}"
    node = AggregationNode(case.in_channels, case.out_channels, case.residual).train(mode == "training")
    module = node if impl == "dla_fast" else EagerNode(node).train(mode == "training")
    sizes = [(BATCH, c, case.height, case.width) for c in case.in_channels]
    xs = [torch.randn(size).to(memory_format=torch.channels_last) for size in sizes]
    if mode == "inference":
        with torch.no_grad():
            benchmark(lambda: module(*xs))
    else:
        wanted = [x.requires_grad_() for x in xs] + list(node.parameters())
        dy = torch.randn(BATCH, case.out_channels, case.height, case.width).to(memory_format=torch.channels_last)
        benchmark(lambda: torch.autograd.grad(module(*xs), wanted, dy))
