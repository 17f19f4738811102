"""Frozen units of floats whose sums are finished in registers: ragged tiles, deep sums, NaN, and their error."""

from __future__ import annotations

import pytest
import torch
from unit_helpers import ACTIVATIONS, unit

from dla_fast import _extension


def splits_floats() -> bool:
    """Whether products are of bfloat16 parts, where infinity turns into NaN."""
    from dla_fast import _C

    return _C.cpu_isa().startswith("amx")


pytestmark = pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")

# Inputs' channels, output channels, kernel, stride, dilation: whole and ragged vectors of channels, sums of one block
# of the depth and of several, rows that are computed one by one.
GEOMETRIES = [
    ((32,), 64, 1, 1, 1),
    ((3,), 5, 1, 1, 1),
    ((200, 61), 150, 1, 1, 1),
    ((16,), 20, 1, 2, 1),
    ((3,), 16, 7, 1, 1),
    ((16,), 32, 3, 2, 1),
    ((70,), 66, 3, 2, 1),
    ((7, 5), 17, 3, 1, 2),
]
SIZES = [(2, 1, 1), (3, 5, 9), (1, 16, 23), (1, 12, 230)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("act", list(ACTIVATIONS))
# Of float64, what is exact is as far off.
@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 2), (torch.float64, 64)], ids=str)
def test_error_is_at_most_twice_that_of_pytorch(geometry, act, dtype, slack):
    torch.manual_seed(0)
    for size in SIZES:
        for residual in (False, True):
            found, eager, exact = unit(geometry, size, dtype, act, residual=residual)
            assert found.shape == exact.shape
            error, known = ((y.double() - exact).abs().max().item() for y in (found, eager))
            assert error <= 2 * known + slack * torch.finfo(dtype).eps * exact.abs().max().item(), (size, residual)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("act", ["relu", "identity"])
def test_nan_and_infinity_go_where_they_go_in_pytorch(geometry, value, act):
    if splits_floats():
        pytest.skip("infinity has no bfloat16 parts")
    torch.manual_seed(0)
    for size in SIZES:
        found, _, exact = unit(geometry, size, torch.float32, act, spoilt=value)
        assert torch.equal(found.isnan(), exact.isnan()), size
        assert torch.equal(found.isinf(), exact.isinf()), size
