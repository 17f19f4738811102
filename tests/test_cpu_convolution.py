"""The CPU's convolutions on maps of many blocks: several panels, pieces and blocks, and ragged ones of each."""

from __future__ import annotations

import pytest
import torch

from dla_fast import backend, functional
from dla_fast.proof import parity

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def cpu():
    with backend.use_backend("cpu"):
        yield


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks(dtype, layout):
    pool = parity.Pool()
    for factor, height, width, out in ((2, 10, 21, 130), (3, 8, 12, 67)):
        pool.add(
            parity.merge(
                parity.Spec(
                    dtype=dtype,
                    layout=layout,
                    kernel=3,
                    channels=(70, 66),
                    out_channels=out,
                    batch=1,
                    height=height,
                    width=width,
                    factor=factor,
                )
            )
        )
    assert pool.failures() == ""


# Rows and columns of blocks, several images in one, few channels of many pixels, more taps than pixels, and small
# contiguous maps of a 1x1 kernel: (channels, out_channels, batch, height, width, kernel, stride, dilation).
DIRECT = {
    "columns": ((70,), 66, 1, 6, 70, 3, 2, 1),
    "images": ((40, 9), 130, 7, 7, 7, 3, 2, 1),
    "stem": ((3,), 16, 2, 40, 300, 7, 1, 1),
    "narrow": ((16,), 16, 2, 24, 40, 3, 1, 1),
    "dilated": ((20,), 20, 2, 9, 11, 3, 1, 4),
    "wide_kernel": ((5, 3), 33, 6, 6, 5, 7, 3, 1),
    "long_stride": ((6,), 8, 3, 10, 13, 3, 4, 2),
    "pixels": ((70, 30), 66, 9, 7, 7, 1, 1, 1),
    "strided_pixels": ((30,), 70, 5, 14, 13, 1, 2, 1),
}


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DIRECT)
def test_direct_sums(name, dtype, layout):
    channels, out, batch, height, width, kernel, stride, dilation = DIRECT[name]
    pool = parity.Pool()
    for seed, training in ((0, True), (1, False), (2, True)):
        pool.add(
            parity.conv_norm_act(
                parity.Spec(
                    dtype=dtype,
                    layout=layout,
                    channels=channels,
                    out_channels=out,
                    batch=batch,
                    height=height,
                    width=width,
                    kernel=kernel,
                    stride=stride,
                    dilation=dilation,
                    training=training,
                    seed=seed,
                )
            )
        )
    assert pool.failures() == ""


@pytest.mark.parametrize("channels", [(64, 64), (256, 256), (512, 512)], ids=str)
def test_deep_sums(channels):
    """What the transforms round does not grow past the bound with the depth."""
    pool = parity.Pool()
    for seed in range(2):
        pool.add(
            parity.merge(
                parity.Spec(kernel=3, channels=channels, out_channels=64, batch=1, height=8, width=8, seed=seed)
            )
        )
    assert pool.failures() == ""


def test_only_what_is_needed():
    """An input without a gradient costs none, and those of the others are what they were."""
    torch.manual_seed(0)
    xs = [torch.randn(2, c, 9, 9) for c in (5, 66, 3)]
    weight = torch.randn(7, 74, 3, 3)
    norm = (torch.rand(7), torch.randn(7), torch.zeros(7), torch.ones(7))

    def gradients(needed):
        leaves = [x.clone().requires_grad_(i in needed) for i, x in enumerate(xs)]
        y = functional.merge(leaves, weight, *norm, training=True)
        return dict(zip(needed, torch.autograd.grad(y.square().sum(), [leaves[i] for i in needed]), strict=True))

    every = gradients([0, 1, 2])
    for needed in ([0], [1], [2], [0, 2]):
        for i, grad in gradients(needed).items():
            torch.testing.assert_close(grad, every[i], rtol=0, atol=0)


def test_a_weight_in_either_layout():
    torch.manual_seed(0)
    x = torch.randn(2, 20, 11, 6)
    weight = torch.randn(70, 20, 3, 3)
    norm = (torch.rand(70), torch.randn(70), torch.zeros(70), torch.ones(70))
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaves = [x.clone().requires_grad_(), weight.clone(memory_format=layout).requires_grad_()]
        y = functional.merge(leaves[:1], leaves[1], *norm, training=False)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        assert grads[1].stride() == leaves[1].stride()
        results.append([y, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
