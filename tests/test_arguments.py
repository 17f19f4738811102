"""Calls that are remembered by their kind: what the checks catch they catch behind calls that have passed them, too."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dla_fast import arguments, functional


def node(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "xs": [torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)],
        "weight": torch.randn(4, 8, 1, 1),
        "bn_weight": torch.randn(4),
        "bn_bias": torch.randn(4),
        "running_mean": torch.zeros(4),
        "running_var": torch.ones(4),
        "training": False,
    }
    return {**given, **changes}


class Duck:
    shape, dtype, device = torch.Size((4, 8, 1, 1)), torch.float32, torch.device("cpu")


BAD = {
    "size": ({"xs": [torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 2)]}, ValueError, r"xs\[1\]: expected"),
    "dtype": ({"xs": [torch.randn(2, 4, 3, 3).double()] * 2}, TypeError, "weight: expected torch.float64"),
    "device": ({"weight": torch.randn(4, 8, 1, 1, device="meta")}, ValueError, "weight: expected device cpu"),
    "no tensor": ({"weight": Duck()}, TypeError, "weight: expected a Tensor, got Duck"),
    "channels": ({"weight": torch.randn(4, 7, 1, 1)}, ValueError, "expected 4 \\+ 4 = 8 input channels, got 7"),
    "vector": ({"bn_bias": torch.randn(5)}, ValueError, r"bn_bias: expected shape \(4,\)"),
    "vectors' dtypes": ({"running_var": torch.ones(4).double()}, TypeError, "running_var: expected torch.float32"),
    "one statistic": ({"running_var": None}, ValueError, "running_var: expected a tensor"),
    "eps": ({"eps": -1.0}, ValueError, "eps: expected a number >= 0"),
    "false": ({"residual": False}, TypeError, "residual: expected None, the index"),
    "residual": ({"residual": torch.randn(2, 4, 3, 2)}, ValueError, "residual: expected shape"),
    "dilation": ({"dilation": 1.0, "stride": 2}, TypeError, "dilation: expected an integer"),
    "act": ({"act": "tanh"}, ValueError, "act: unknown activation"),
    "slope": ({"act": ("leaky_relu", Fraction(1, 2))}, TypeError, "act: expected"),
    "unhashable": ({"act": ["relu"]}, TypeError, "act: expected a name"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_found_behind_what_was_right(name):
    changes, error, message = BAD[name]
    for good in (
        {},
        {"residual": 0},
        {"residual": torch.randn(2, 4, 3, 3)},
        {"stride": 2},
        {"act": ("leaky_relu", 0.5)},
    ):
        functional.conv_norm_act(**node(**good))
    for _ in range(2):
        with pytest.raises(error, match=message):
            functional.conv_norm_act(**node(**changes))


def test_training_on_one_value_is_found():
    one = {"xs": [torch.randn(1, 8, 1, 1)]}
    functional.conv_norm_act(**node(**one))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        functional.conv_norm_act(**node(**one, training=True))


@pytest.mark.parametrize("residual", [None, 0, 1, "tensor"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_a_repeated_call_reads_its_own_tensors(residual, stride, training):
    arguments._kinds.clear()
    for seed in (1, 2):
        torch.manual_seed(seed)
        xs = [torch.randn(2, 4, 3, 3) for _ in range(2)]
        side = 3 if stride == 1 else 2
        added = torch.randn(2, 4, side, side) if residual == "tensor" else residual
        if stride == 2 and residual in (0, 1):
            continue  # not of the output's shape
        given = {**node(), "xs": xs, "residual": added, "stride": stride, "training": training}
        y = functional.conv_norm_act(**given)
        z = torch.nn.functional.conv2d(torch.cat(xs, 1), given["weight"], stride=stride)
        z = torch.nn.functional.batch_norm(
            z, torch.zeros(4), torch.ones(4), given["bn_weight"], given["bn_bias"], training
        )
        if added is not None:
            z = z + (added if residual == "tensor" else xs[residual])
        torch.testing.assert_close(y, z.relu(), atol=1e-4, rtol=1e-4)


def test_kinds_are_bounded(monkeypatch):
    monkeypatch.setattr(arguments, "KINDS", 3)
    for side in range(2, 12):
        functional.conv_norm_act(**node(xs=[torch.randn(1, 4, side, side)] * 2))
        assert len(arguments._kinds) <= 3


def test_autocast_and_a_tensor_as_an_option_are_not_taken_for_what_was_known():
    functional.conv_norm_act(**node())
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv_norm_act(**node()).dtype == torch.bfloat16
    assert functional.conv_norm_act(**node()).dtype == torch.float32
    eps = torch.tensor(1e-5)
    functional.conv_norm_act(**node(eps=eps))
    eps.fill_(-1)
    with pytest.raises(ValueError, match="eps"):
        functional.conv_norm_act(**node(eps=eps))


def test_modes_and_subclasses_see_the_operators():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Called(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Sub(torch.Tensor):
        pass

    for training in (False, True):
        weight = torch.randn(4, 8, 1, 1, requires_grad=training)
        functional.conv_norm_act(**node(training=training, weight=weight))
        for mode in (Seen, Called):
            seen: list[str] = []
            with mode():
                functional.conv_norm_act(**node(training=training, weight=weight))
            assert any("conv_norm_act" in name for name in seen)
    xs = [x.as_subclass(Sub) for x in node()["xs"]]
    assert type(functional.conv_norm_act(**node(xs=xs))) is Sub
