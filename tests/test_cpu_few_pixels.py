"""1x1 products of few pixels with weights of many channels, where the CPU packs the pixels and not the weight."""

from __future__ import annotations

import itertools

import pytest
import torch

from dla_fast import backend, functional
from dla_fast.proof import parity


@pytest.fixture(autouse=True)
def cpu():
    with backend.use_backend("cpu"):
        yield


# (channels, out_channels, batch, height, width): whole tiles and blocks and ragged ones, one pixel, most pixels.
SHAPES = {
    "7x7": ((256, 256), 256, 1, 7, 7),
    "ragged": ((330, 1, 130), 310, 1, 9, 11),
    "whole": ((128, 256), 384, 1, 8, 8),
    "one": ((400,), 401, 1, 1, 1),
    "14x14": ((256, 130), 353, 1, 14, 14),
    "images": ((300, 100), 350, 5, 7, 7),
    "most": ((512,), 256, 1, 16, 16),
}


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, layout):
    channels, out, batch, height, width = SHAPES[name]
    pool = parity.Pool()
    for training, residual in itertools.product((True, False), (True, False)):
        if training and batch * height * width == 1:
            continue
        spec = parity.Spec(
            dtype=dtype, layout=layout, channels=channels, out_channels=out, batch=batch, height=height, width=width,
            kernel=1, training=training, residual=residual,
        )  # fmt: skip
        pool.add(parity.conv_norm_act(spec))
        if channels[0] == out or not residual:
            pool.add(parity.aggregate(spec))
    assert pool.failures() == ""


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("wanted", ["x0", "x1", "weight", "residual", "x1 weight", "x0 residual"])
@pytest.mark.parametrize("adds_input", [False, True])
def test_gradients_that_are_wanted(wanted, layout, adds_input):
    """Each alone: what is not asked for is not formed, and what others share with it still is right."""
    shapes = {"x0": (1, 256, 6, 5), "x1": (1, 260, 6, 5), "weight": (256, 516, 1, 1), "residual": (1, 256, 6, 5)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    given["weight"] *= 0.05
    dy = torch.randn(1, 256, 6, 5, dtype=torch.float64).to(memory_format=layout)
    grads = []
    for name in ("cpu", "reference"):
        t = {key: value.clone().contiguous(memory_format=layout) for key, value in given.items()}
        for key in wanted.split():
            t[key].requires_grad_()
        one = torch.ones(256, dtype=torch.float64)
        with backend.use_backend(name):
            y = functional.conv_norm_act(
                [t["x0"], t["x1"]], t["weight"], one, 0 * one, 0 * one, one.clone(), training=True,
                residual=0 if adds_input else t["residual"],
            )  # fmt: skip
        if y.requires_grad:
            y.backward(dy)
        grads.append([t[key].grad for key in wanted.split()])
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
