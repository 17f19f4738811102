"""The fingerprint of tensors: what it cannot miss, and of what there is none."""

from __future__ import annotations

import pytest
import torch

from dla_fast.ops.packed import fingerprint


def tensors():
    return [torch.randn(16, 8, 3, 3), None, *torch.randn(4, 16).unbind()]


def test_is_the_same_for_the_same():
    given = tensors()
    assert fingerprint(given) == fingerprint(given) != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 3, 1, 1), (16, 8, 3, 3), (100, 64, 3, 3), (300, 7, 1, 1)])
def test_sees_every_filter_and_every_value_of_a_vector(shape, layout, dtype):
    weight = torch.randn(shape, dtype=dtype).to(memory_format=layout)
    vector = torch.randn(shape[0], dtype=dtype)
    seen = {fingerprint([weight, vector])}
    for i in range(shape[0]):
        weight.data[i] += 1
        seen.add(fingerprint([weight, vector]))
        vector.data[i] += 1
        seen.add(fingerprint([weight, vector]))
    assert len(seen) == 2 * shape[0] + 1


def test_sees_what_a_tensor_is():
    values = torch.ones(4, 4, 1, 1)
    views = [values, values.view(2, 8, 1, 1), values.transpose(0, 1), values.view(torch.int32), values[:2]]
    assert len({fingerprint([v]) for v in (*views, None, values.clone())}) == len(views) + 2


def test_sees_a_write_that_torch_counts():
    given = tensors()
    before = fingerprint(given)
    given[0][3, 3, 1, 1] = given[0][3, 3, 1, 1].item()
    assert fingerprint(given) != before


def test_vectors_with_a_stride():
    weight, vector = torch.randn(4, 4, 1, 1), torch.randn(4, 2)
    before = fingerprint([weight, vector[:, 0]])
    vector.data[:, 1] = 0
    assert fingerprint([weight, vector[:, 0]]) == before
    vector.data[3, 0] = 0
    assert fingerprint([weight, vector[:, 0]]) != before


def test_there_is_none_of_what_cannot_be_read():
    for other in (torch.empty(4, device="meta"), torch.eye(4).to_sparse(), torch.randn(4, 9)[:, :4]):
        assert fingerprint([torch.randn(3), other]) == 0
