"""The learned upsamplings in pytest-benchmark: ``pytest benchmarks``.

The same cases as ``python -m dla_fast bench ida ops``, which interleaves the peers and prints them beside the floor.
"""

from __future__ import annotations

import pytest

from dla_fast.bench import ida_cases, op_cases

CASES = {case.name: case for case in [*ida_cases(), *op_cases()] if case.op == "upsample"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_upsample(bench_case, case, mode, impl):
    bench_case(case, mode, impl)
