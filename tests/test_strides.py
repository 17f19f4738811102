"""Every tensor argument may have any strides: inputs, weights, norm vectors, running statistics, gradients."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import INTERPRETED, NAMES, backends
from stride_helpers import check, problems

from dla_fast import backend


@pytest.mark.parametrize("op", backend.OPS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6 if INTERPRETED else 40, deadline=None)
@given(data=st.data())
def test_any_strides(name, op, data):
    assert name in backends(op)
    check(*data.draw(problems(op)), name)
