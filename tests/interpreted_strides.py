"""Arguments of every operator with strides of every kind, on Triton's kernels: test_triton.py starts this file.

An operator has to give what it gives for dense arguments, to the bit, and with the strides that its fake promises.
"""

from __future__ import annotations

import pytest
import torch
from interpreted_node import LAYOUTS, OPS, Node, check, outcome
from torch import Tensor
from torch._subclasses import FakeTensorMode

KEPT = {
    "every second": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2],
    "reversed dims": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "sliced": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t], 0)[1:],
}
MAPS = KEPT | {
    "output and input channels": lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "rows and columns": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "some channels": lambda t: torch.cat([torch.full_like(t[:, :1], torch.nan), t], 1)[:, 1:],
}


def given(t: Tensor | None, way: str) -> Tensor | None:
    """The same values with other strides."""
    ways = MAPS if t is not None and t.dim() == 4 else KEPT
    return t if t is None or way not in ways else ways[way](t)


def same(op, *args) -> None:
    """An operator of strided arguments against itself of dense ones; the layout of a map's result may follow either."""
    expected = op(*args)
    for way in MAPS:
        strided = [
            [given(t, way) for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor)
            else given(a, way) if isinstance(a, Tensor) else a
            for a in args
        ]  # fmt: skip
        results = op(*strided)
        for mine, exact in zip(*[_flat(r) for r in (results, expected)], strict=True):
            scale = exact.abs().max() if exact.numel() else 1.0
            assert mine.shape == exact.shape, way
            # A node in another layout adds up in another order.
            assert ((mine - exact).abs() <= 1e-12 * scale).all(), way
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = [
                [mode.from_tensor(t) for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor)
                else mode.from_tensor(a) if isinstance(a, Tensor) else a
                for a in strided
            ]  # fmt: skip
            promised = [(f.shape, f.stride()) for f in _flat(op(*fakes))]
        assert [(t.shape, t.stride()) for t in _flat(results)] == promised, way


def _flat(results) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for r in results for t in _flat(r)]


def draw(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sizes)))


def norm(channels: int = 8) -> tuple[Tensor, ...]:
    mean, var, gamma, beta = draw(4, channels).unbind(0)
    return mean.clone(), var.square() + 0.5, gamma.clone(), beta.clone()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_tail(layout):
    z, dy, residual = (draw(2, 8, 5, 3 + i)[..., :3].contiguous(memory_format=LAYOUTS[layout]) for i in range(3))
    vectors = norm()
    for added in (residual, None):
        same(OPS.tail, z, *vectors, added, 1e-5, "silu", 0.0)
        same(OPS.tail_backward_reduce, dy, z, *vectors, added, 1e-5, "silu", 0.0)
        same(OPS.tail_backward_apply, dy, z, *vectors, added, *norm()[:2], 30, 1e-5, "silu", 0.0, True)
    same(OPS.moments, z, None, None, 0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upsampling(layout):
    x, up = draw(2, 6, 3, 4).contiguous(memory_format=LAYOUTS[layout]), draw(6, 1, 4, 4)
    y = draw(2, 6, 6, 8).contiguous(memory_format=LAYOUTS[layout])
    same(OPS.upsample, x, up, 2)
    same(OPS.upsample_add, x, y, up, 2)
    same(OPS.upsample_backward, y, x, up, 2, True, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel, stride, factors", [(1, 1, (1, 1)), (3, 1, (1, 2)), (1, 2, (1, 1)), (5, 1, (1, 1))])
def test_the_node(kernel, stride, factors, layout):
    options = {"channels": (8, 4), "kernel": kernel, "stride": stride, "layout": layout, "sides": (4, 6)}
    node = Node(**options, residual=True, factors=factors)
    tensors, geometry = node._tensors(node.leaves), node._geometry()
    (xs, ups, weight, bias, residual, gamma, beta), options = tensors, (1e-5, "silu", 0.0)
    mean, var, *_ = norm()
    same(OPS.conv_norm_act_inference, xs, ups, weight, bias, residual, gamma, beta, mean, var, *geometry, *options)
    same(OPS.conv_norm_act_stage, xs, ups, weight, bias, None, None, *geometry[:-1], 0.1, True)
    z = draw(*residual.shape).contiguous(memory_format=LAYOUTS[layout])
    dy = draw(*residual.shape, 2)[..., 0]
    count = z.numel() // 8
    for own, needed in ((residual, True), (residual, False), (None, False)):
        wanted = [True] * len(xs), [True] * len(ups), True, needed
        same(
            OPS.conv_norm_act_backward, dy, xs, ups, weight, own, z, mean, var, gamma, beta, *norm()[2:], *geometry,
            count, *options, *wanted,
        )  # fmt: skip


@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (3, 4)])
@pytest.mark.parametrize("way", KEPT)
def test_running_statistics_are_written_where_they_lie(way, kernel, groups):
    for dtype in (torch.float64, torch.float32):
        node = Node(channels=(8, 4), kernel=kernel, groups=groups, dtype=dtype)
        buffers = {name: KEPT[way](t.clone()) for name, t in node.buffers.items()}
        check(node, buffers=buffers)
    mean, var = (KEPT[way](t.clone()) for t in norm()[:2])
    z, before = draw(2, 8, 3, 5), (mean.clone(), var.clone())
    OPS.moments(z, mean, var, 0.1)
    exact = torch.var_mean(z, (0, 2, 3))
    torch.testing.assert_close(mean, 0.9 * before[0] + 0.1 * exact[1])
    torch.testing.assert_close(var, 0.9 * before[1] + 0.1 * exact[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_expanded_arguments(kernel, layout):
    """Stride 0: a gradient that a sum gives, a vector or a map of one value."""
    node = Node(channels=(8, 4), kernel=kernel, layout=layout, residual=True)
    size = (2, 8, 5, 6)
    for dy in (torch.ones((), dtype=torch.float64).expand(size), draw(2, 8, 1, 1).expand(size)):
        check(node, dy=dy)
    leaves = node.leaves | {
        "x1": draw(1, 4, 1, 1).expand(2, 4, 5, 6),
        "weight": draw(8, 12, 1, 1).expand(8, 12, kernel, kernel),
        "bn_weight": draw(1).expand(8),
        "residual": draw(2, 1, 5, 6).expand(size),
    }
    assert leaves["weight"].stride(3) == 0 or kernel == 1
    check(node, leaves)
    for buffer in ({"running_mean": draw(1).expand(8), "running_var": draw(1).square().expand(8)},):
        check(Node(channels=(8, 4), kernel=kernel, training=False), buffers=buffer)


def test_vectors_with_a_stride_and_a_weight_not_in_row_order():
    """As they were first found wrong."""
    node = Node(kernel=1, channels=(8, 8), out_channels=16)
    exact = outcome(node, node.call, node.leaves, {n: t.clone() for n, t in node.buffers.items()})
    leaves = {
        n: torch.rand(32, dtype=t.dtype)[::2].copy_(t.detach()) if t.dim() == 1 else t for n, t in node.leaves.items()
    }
    leaves["weight"] = node.leaves["weight"].permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    mine = check(node, leaves)
    assert mine["d weight"].stride() == (1, 16, 1, 1) != exact["d weight"].stride()
    assert all(torch.equal(t, exact[name]) for name, t in mine.items())
