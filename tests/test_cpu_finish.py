"""Frozen units of floats whose sums are finished in registers: ragged tiles, deep sums, NaN, and their error."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dla_fast import _extension
from dla_fast.ops import packed


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
ACTIVATIONS = {"relu": torch.relu, "identity": lambda y: y, "silu": F.silu}


def unit(geometry, size, dtype, act="relu", spoilt=None, residual=True):
    """What a frozen unit gives, PyTorch op by op, and that in float64."""
    channels, out, kernel, stride, dilation = geometry
    n, h, w = size

    def channels_last(*size):
        return torch.randn(size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    xs = [channels_last(n, c, h, w) for c in channels]
    if spoilt is not None:
        xs[0][-1, -1, h // 2, w // 2] = spoilt
    weight = channels_last(out, sum(channels), kernel, kernel) * (sum(channels) * kernel**2) ** -0.5
    scale, shift = torch.rand(out, dtype=dtype) + 0.5, torch.randn(out, dtype=dtype)

    def z(dtype):
        return F.conv2d(torch.cat(xs, 1).to(dtype), weight.to(dtype), None, stride, dilation * (kernel // 2), dilation)

    added = channels_last(*z(dtype).shape) if residual else None
    way = packed.way_of(xs, [], weight, [1] * len(xs), stride, dilation, 1, False)
    kept = packed.pack(weight, list(channels), way)
    call = packed.Call(weight, kept, way, scale, shift, [1] * len(xs), stride, dilation, 1, -1, -1, act, 0.0)

    def eager(dtype):
        y = z(dtype) * scale.view(-1, 1, 1).to(dtype) + shift.view(-1, 1, 1).to(dtype)
        return ACTIVATIONS[act](y if added is None else y + added.to(dtype))

    return packed.run(call, xs, [], added), eager(dtype), eager(torch.float64)


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
