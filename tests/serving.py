"""Which backends the tests of an op run over, and how much of their matrix.

Without a word it is the CPU's, or the reference where all else is disabled. ``test_triton.py`` starts the same tests
once more, in a process where Triton interprets its kernels, and names the backend in DLA_FAST_TEST_BACKENDS. The
interpreter takes a hundred times longer, so there the large matrices are thinned; and it has no bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from dla_fast import backend

# With DLA_FAST_DISABLE=1 kernels are not what is to be tested, and the reference is there without them.
DISABLED = backend.selected() == "reference"
NAMES = os.environ.get("DLA_FAST_TEST_BACKENDS", "reference" if DISABLED else "cpu").split(",")
INTERPRETED = "triton" in NAMES


def backends(op: str) -> list[str]:
    """Those asked for that can run ``op`` on the tensors of a test."""
    return [name for name in NAMES if backend.can_run(name, op, "cpu", torch.float32) is None]


DTYPES = tuple(
    dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if all(backend.can_run(name, "aggregate", "cpu", dtype) is None for name in NAMES)
)
HALF = torch.float16 if INTERPRETED else torch.bfloat16


def served_by(op: str) -> Any:
    """A fixture ``served``: the name of each backend that :func:`backends` gives, in force."""

    @pytest.fixture(name="served", params=backends(op))
    def fixture(request: pytest.FixtureRequest) -> Iterator[str]:
        with backend.use_backend(request.param):
            yield request.param

    return fixture


def thinned(cases: Iterable[Any], keep: int, offset: int = 0) -> Iterator[Any]:
    """The cases; where kernels are interpreted only every ``keep``-th, from ``offset`` on."""
    for index, case in enumerate(cases):
        if not INTERPRETED or (index + offset) % keep == 0:
            yield case
