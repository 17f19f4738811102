"""Aggregation nodes of dla34 in pytest-benchmark: ``pytest benchmarks``.

The same cases as ``python -m dla_fast bench nodes``, which interleaves the peers and prints them beside the floor.
"""

from __future__ import annotations

import pytest

from dla_fast.bench import network_cases


@pytest.mark.parametrize("case", network_cases("dla34"), ids=lambda case: case.name)
def test_aggregate(bench_case, case, mode, impl):
    bench_case(case, mode, impl)
