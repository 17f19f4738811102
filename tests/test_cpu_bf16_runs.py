"""Frozen units in vectors of bfloat16: widths around their segments, edges, NaN, and their error beside PyTorch's."""

from __future__ import annotations

import pytest
import torch
from unit_helpers import unit

from dla_fast import _extension

pytestmark = pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")

# Inputs' channels, output channels, kernel, stride, dilation.
GEOMETRIES = [
    ((3,), 16, 7, 1, 1),
    ((16,), 40, 3, 2, 1),
    ((5, 8), 33, 3, 1, 1),
    ((64,), 64, 3, 1, 1),
    ((7,), 17, 3, 1, 2),
    ((16,), 32, 3, 2, 3),
    ((4, 6), 8, 3, 1, 2),
    ((33, 64), 48, 1, 1, 1),
    ((16,), 20, 1, 2, 1),
]
SIZES = [(2, 1, 1), (1, 7, 7), (3, 5, 9), (1, 16, 23), (2, 30, 30)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("act", ["relu", "identity", "silu"])
def test_error_is_at_most_twice_that_of_pytorch(geometry, act):
    for size in SIZES:
        for residual in (False, True):
            found, eager, exact = unit(geometry, size, torch.bfloat16, act, residual=residual)
            assert found.shape == exact.shape
            error, known = ((y.double() - exact).abs().max().item() for y in (found, eager))
            assert error <= 2 * known + 2**-9 * exact.abs().max().item(), (size, residual)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_go_where_they_go_in_pytorch(geometry, value):
    for size in SIZES:
        found, _, exact = unit(geometry, size, torch.bfloat16, spoilt=value)
        assert torch.equal(found.isnan(), exact.isnan()), size
        assert torch.equal(found.isinf(), exact.isinf()), size


def test_threads_agree():
    """Who computes a segment does not matter."""
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.manual_seed(0)
            torch.set_num_threads(count)
            found.append(unit(GEOMETRIES[3], (3, 37, 29), torch.bfloat16)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
