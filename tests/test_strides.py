"""Every tensor argument may have any strides: inputs, weights, norm vectors, running statistics, gradients."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stride_helpers import check, problems

from dla_fast import backend


@pytest.mark.parametrize("op", backend.OPS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_strides(op, data):
    check(*data.draw(problems(op)), "cpu")
