"""What is not finite stands where it stands in PyTorch: the cases of not_finite.py over every backend."""

from __future__ import annotations

import pytest
from not_finite import GEOMETRIES, of_a_node, of_a_norm, of_a_wide_node, of_upsampling
from serving import DTYPES, INTERPRETED, backends

# Prime to the numbers of all that is combined.
KEEP = 113 if INTERPRETED else 7


@pytest.mark.parametrize("served", backends("conv_norm_act"))
# A dilated convolution in half precision is the library's, which makes of 0 times infinity what it will.
@pytest.mark.parametrize(
    ("geometry", "dtype"), [(g, d) for g in GEOMETRIES for d in DTYPES if g != "dilation" or d.itemsize > 2]
)
def test_of_a_node(served, dtype, geometry):
    of_a_node(served, dtype, geometry, KEEP)


@pytest.mark.parametrize("served", backends("batch_norm_act"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 6, 8), (4, 5, 8)], ids=str)
def test_of_a_norm(served, dtype, size):
    of_a_norm(served, dtype, size, KEEP)


@pytest.mark.parametrize("served", backends("upsample_add"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_of_upsampling(served, factor, dtype):
    of_upsampling(served, dtype, factor, 11 if INTERPRETED else 1)


if not INTERPRETED:

    @pytest.mark.parametrize("served", backends("conv_norm_act"))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_of_wide_nodes(served, kernel, dtype):
        of_a_wide_node(served, dtype, kernel, KEEP)
