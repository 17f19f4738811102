"""The node's operator on Triton's kernels, against plain PyTorch in float64: test_triton.py starts this file.

Every argument that an aggregation or IDA node does not use, and arguments with strides of every kind.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dla_fast.kernels import config, conv_norm_act, conv_norm_act_backward, launch, library, tail

OPS = torch.ops.dla_fast_triton
DTYPES = (torch.float64, torch.float32, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Error over the norm of what is expected; a batch norm's backward is a difference of close values.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2}
EPS, MOMENTUM = 1e-5, 0.1
ACTS = {"relu": F.relu, "silu": F.silu, "identity": lambda u: u}


@dataclass
class Node:
    """A problem of the operator: its arguments, drawn, and what they should give."""

    channels: tuple[int, ...] = (8, 5)
    out_channels: int = 8
    kernel: int = 3
    sides: tuple[int, int] = (5, 6)
    factors: tuple[int, ...] = (1, 1)
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    residual: int | bool = False
    training: bool = True
    act: str = "silu"
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    affine: bool = True
    bias: bool = True
    leaves: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.channels) + self.kernel)

        def draw(*sizes: int) -> Tensor:
            t = torch.randn(sizes, dtype=torch.float64, generator=generator).to(self.dtype)
            return t.contiguous(memory_format=LAYOUTS[self.layout]) if len(sizes) == 4 else t

        n, k = self.out_channels, self.kernel
        # As large as the others once upsampled.
        low = [[(s - 2 * f + 2 * (f // 2)) // f + 1 if f > 1 else s for s in self.sides] for f in self.factors]
        xs = {f"x{i}": draw(2, c, *sides) for i, (c, sides) in enumerate(zip(self.channels, low, strict=True))}
        ups = {
            f"up{i}": draw(c, 1, 2 * f, 2 * f)
            for i, (c, f) in enumerate(zip(self.channels, self.factors, strict=True))
            if f > 1
        }
        self.leaves = {**xs, **ups, "weight": draw(n, sum(self.channels) // self.groups, k, k) / k}
        if self.bias:
            self.leaves["conv_bias"] = draw(n)
        if self.residual is True:
            steps = [(s + 2 * self.dilation * (k // 2) - self.dilation * (k - 1) - 1) for s in self.sides]
            self.leaves["residual"] = draw(2, n, *[s // self.stride + 1 for s in steps])
        if self.affine:
            self.leaves |= {"bn_weight": draw(n), "bn_bias": draw(n)}
        self.buffers = {"running_mean": draw(n), "running_var": draw(n).square() + 0.5}

    def call(self, leaves: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        """y of the operator."""
        return OPS.conv_norm_act(
            *self._tensors(leaves), *buffers.values(), *self._geometry(), self.training, MOMENTUM, EPS, self.act, 0.0
        )[0]

    def infer(self, leaves: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        """y of the operator for inference."""
        tensors = self._tensors(leaves)
        return OPS.conv_norm_act_inference(*tensors, *buffers.values(), *self._geometry(), EPS, self.act, 0.0)

    def _tensors(self, leaves: dict[str, Tensor]) -> list[Any]:
        several = [[t for name, t in leaves.items() if name.startswith(p) and name[-1].isdigit()] for p in ("x", "up")]
        return [*several, *map(leaves.get, ("weight", "conv_bias", "residual", "bn_weight", "bn_bias"))]

    def _geometry(self) -> tuple[Any, ...]:
        index = -1 if isinstance(self.residual, bool) else self.residual
        return list(self.factors), self.stride, self.dilation, self.groups, index

    def exact(self, leaves: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        """The same by PyTorch."""
        maps = []
        for i, (c, f) in enumerate(zip(self.channels, self.factors, strict=True)):
            x = leaves[f"x{i}"]
            maps.append(F.conv_transpose2d(x, leaves[f"up{i}"], None, f, f // 2, 0, c) if f > 1 else x)
        padding = self.dilation * (self.kernel // 2)
        z = F.conv2d(
            torch.cat(maps, 1), leaves["weight"], leaves.get("conv_bias"), self.stride, padding, self.dilation,
            self.groups,
        )  # fmt: skip
        norm = leaves.get("bn_weight"), leaves.get("bn_bias"), self.training, MOMENTUM, EPS
        u = F.batch_norm(z, *buffers.values(), *norm)
        if self.residual is not False:
            u = u + (leaves["residual"] if self.residual is True else leaves[f"x{self.residual}"])
        return ACTS[self.act](u)


def close(name: str, mine: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert mine.shape == exact.shape, name
    error = (mine.double() - exact).norm() / exact.norm().clamp_min(1e-3)
    assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


def outcome(node: Node, call: Any, leaves: dict[str, Tensor], buffers: dict[str, Tensor], dy: Tensor | None = None):
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    y = call(leaves, buffers)
    dy = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape) if dy is None else dy
    # The mean of a batch does not see a bias: its gradient there is nothing but rounding.
    wanted = {name: t for name, t in leaves.items() if not (node.training and name == "conv_bias")}
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d {n}": g for n, g in zip(wanted, grads, strict=True)}, **buffers}


def check(
    node: Node, leaves: dict[str, Tensor] | None = None, buffers: dict[str, Tensor] | None = None, **more
) -> dict:
    """Outputs, gradients and running statistics of the operator, held to PyTorch's in float64."""
    leaves = node.leaves if leaves is None else leaves
    buffers = {name: t.clone() for name, t in node.buffers.items()} if buffers is None else buffers
    doubles = [{name: t.double().clone() for name, t in given.items()} for given in (leaves, buffers)]
    exact = outcome(node, node.exact, *doubles, **more)
    if not node.training:
        with torch.no_grad():
            close("inference", node.infer(leaves, buffers), exact["y"], node.dtype)
    mine = outcome(node, node.call, leaves, buffers, **more)
    assert mine.keys() == exact.keys()
    for name, t in mine.items():
        close(name, t, exact[name], node.dtype)
    return mine


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride, dilation", [(2, 1), (1, 2), (2, 2)])
def test_stride_and_dilation(kernel, stride, dilation, dtype, layout):
    for training in (True, False) if dtype == torch.float32 else (True,):
        node = Node(
            kernel=kernel, stride=stride, dilation=dilation, dtype=dtype, layout=layout, training=training, act="relu"
        )
        check(node)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_a_residual_of_its_own(kernel, stride, layout):
    modes = itertools.product((True, False), ("silu", "identity"))
    for (training, act), dtype in zip(modes, (*DTYPES, torch.float32), strict=True):
        check(Node(kernel=kernel, stride=stride, residual=True, dtype=dtype, layout=layout, training=training, act=act))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("split", [False, True])
def test_any_input_is_the_residual(monkeypatch, split, index, kernel, layout):
    if split:
        monkeypatch.setattr(config, "fits_fused", lambda *args: False)
    for act, dtype in (("silu", torch.float64), ("relu", torch.float32), ("identity", torch.float16)):
        options = {"channels": (8, 8, 8), "factors": (1, 1, 1), "kernel": kernel, "layout": layout}
        check(Node(**options, residual=index, act=act, dtype=dtype, training=act != "relu"))


@pytest.mark.parametrize("needed", [("x0",), ("x2", "weight"), ("residual",), ("residual", "x1"), ("weight",)])
@pytest.mark.parametrize("residual", [True, 1])
def test_gradients_that_are_wanted_alone(residual, needed):
    for kernel in (1, 3):
        node = Node(channels=(8, 8, 8), factors=(1, 1, 1), kernel=kernel, residual=residual)
        asked = [name for name in needed if name in node.leaves]
        found = []
        for call in (node.call, node.exact):
            leaves = {n: t.detach().clone().requires_grad_(n in asked) for n, t in node.leaves.items()}
            y = call(leaves, {n: t.clone() for n, t in node.buffers.items()})
            found.append(torch.autograd.grad(y.square().sum(), [leaves[n] for n in asked]) if asked else [])
        for mine, exact in zip(*found, strict=True):
            close("gradient", mine, exact, node.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("on_load", [True, False])
def test_upsampled_inputs_beside_the_rest(monkeypatch, on_load, layout):
    monkeypatch.setattr(conv_norm_act, "ON_LOAD_PIXELS", 2**14 if on_load else 0)
    config.install({})  # forgets plans
    for kernel, stride in ((1, 1), (1, 2), (3, 2)):
        options = {"factors": (1, 2), "sides": (6, 8), "residual": kernel == 1 and stride == 1 and 0}
        check(Node(kernel=kernel, stride=stride, layout=layout, dilation=kernel // 2 + 1, **options))
        check(Node(kernel=kernel, stride=stride, layout=layout, dtype=torch.float32, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_library_takes_what_no_kernel_does(layout):
    for training, dtype in ((True, torch.float64), (False, torch.float32)):
        options = {"layout": layout, "training": training, "dtype": dtype}
        with launch.count() as names:
            check(Node(kernel=3, channels=(8, 4), groups=4, residual=True, **options))
            check(Node(kernel=5, sides=(7, 6), stride=2, **options))
            check(Node(kernel=7, channels=(3,), factors=(1,), sides=(8, 9), stride=2, **options))
            check(Node(kernel=3, channels=(4, 4), factors=(1, 2), sides=(4, 6), groups=8, residual=True, **options))
            check(Node(kernel=1, channels=(8, 8), groups=2, residual=1, **options))
        assert not {"stage_kernel", "inference_kernel", "weight_kernel", "dx_kernel", "fused_kernel"} & set(names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_library_takes_what_it_does_better(monkeypatch, layout):
    """As on a GPU whose architecture was looked at: the products of wide nodes' backward, and 3 x 3 convolutions."""
    monkeypatch.setattr(library, "DEVICE", "cpu")
    monkeypatch.setattr(library, "WIDE", 0)
    config.install({})  # forgets plans
    modes = ((1, False, True), (1, 1, True), (1, True, False), (3, 0, True), (3, True, False))
    for (kernel, residual, training), split in itertools.product(modes, (False, True)):
        with monkeypatch.context() as patch, launch.count() as names:
            if split:
                patch.setattr(config, "fits_fused", lambda *args: False)
            options = {"channels": (8, 8), "layout": layout, "residual": residual, "training": training}
            check(Node(kernel=kernel, dtype=torch.float16, **options))
        assert not {"weight_kernel", "dx_kernel", "fused_kernel"} & set(names)
        assert ("stage_kernel" in names) == (kernel == 1)
    config.install({})


def test_launches():
    node = Node(kernel=3, stride=2, residual=True, training=False, dtype=torch.float32)
    with torch.no_grad(), launch.count() as names:
        node.infer(node.leaves, node.buffers)
    assert names == ["inference_kernel"]
    node = Node(kernel=1, channels=(8, 8), residual=1, dtype=torch.float32)
    leaves = {name: t.requires_grad_() for name, t in node.leaves.items()}
    with launch.count() as names:
        node.call(leaves, node.buffers).sum().backward()
    assert names[:3] == ["stage_kernel", "finalise_kernel", "tail_kernel"]
    assert names[3:6] == ["reduce_kernel", "reduce_sum_kernel", "fused_kernel"]


@pytest.mark.parametrize("training", [False, True])
def test_every_input_upsampled_on_the_way(monkeypatch, training):
    """No plain input, and whole tiles, which nothing masks."""
    monkeypatch.setattr(conv_norm_act, "ON_LOAD_PIXELS", 2**14)
    options = {"out_channels": 16, "kernel": 3, "training": training}
    check(Node(channels=(16,), factors=(2,), sides=(8, 8), **options))
    check(Node(channels=(16, 16), factors=(2, 2), sides=(8, 8), **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_without_channels(layout):
    for channels in ((8, 0), (0, 8, 0, 5)):
        for kernel, training in ((1, False), (1, True), (3, True)):
            check(
                Node(channels=channels, factors=(1,) * len(channels), kernel=kernel, training=training, layout=layout)
            )


def test_what_is_no_pixel_adds_nothing():
    """Beyond the last pixel dz is none of a map's, and may not fit half precision: times nothing it would be NaN."""
    x, dy = torch.randn(1, 16, 1, 33).half(), (torch.randn(1, 16, 1, 33) * 3e3).half()
    z = (torch.randn(1, 16, 1, 33) + 300).half()
    weight, v = torch.randn(16, 16, 1, 1).half(), torch.ones(16)
    mean, var = z.float().mean((0, 2, 3)), z.float().var((0, 2, 3), correction=0)
    x_hat = (z.float() - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    sums = dy.float().sum((0, 2, 3)), (dy.float() * x_hat).sum((0, 2, 3))
    _, _, dw, *_ = conv_norm_act_backward.conv_norm_act_backward(
        dy, [x], [], weight, None, z, mean, var, v, v, *sums, [1], 1, 1, 1, -1, 33, 1e-5, "identity", 0.0,
        [True], [], True, False,
    )  # fmt: skip
    dz = dy.float() - (sums[0] / 33)[:, None, None] - x_hat * (sums[1] / 33)[:, None, None]
    dz /= (var[:, None, None] + 1e-5).sqrt()
    expected = torch.einsum("nchw,nkhw->ck", dz, x.float())
    torch.testing.assert_close(dw[:, :, 0, 0].float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_a_grid_of_many_tiles_stays_within_a_launch():
    x, v = torch.empty(512, 16, 512, 512, dtype=torch.bfloat16, device="meta"), torch.empty(16, device="meta")
    with launch.record() as launches:
        tail.tail(x.to(memory_format=torch.channels_last), v, v, v, v, None, 1e-5, "relu", 0.0)
    assert launches[0].grid[1] <= 65535


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values", [0, 2**20])
def test_blocks_of_one_pass_are_a_program_each_or_one(monkeypatch, layout, values):
    monkeypatch.setattr(config, "fused_values", lambda arch: values)
    with launch.count() as names:
        for residual in (0, False):
            check(Node(kernel=1, channels=(16, 40), out_channels=16, residual=residual, layout=layout))
    assert "fused_kernel" in names


def test_the_library_adds_in_a_fixed_order(monkeypatch):
    """Its convolutions' gradients too, whatever the caller's flag says, which it finds as it was."""
    seen = []
    backward = torch.ops.aten.convolution_backward

    def noted(*args):
        seen.append(torch._C._get_cudnn_deterministic())
        return backward(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", noted)
    check(Node(channels=(8, 4), kernel=3))
    assert seen
    assert all(seen)
    assert not torch._C._get_cudnn_deterministic()


def test_one_input_as_every_layout_of_a_weight_has_it():
    """A plan must not serve a call whose weight lies otherwise, or that upsamples at another place."""
    node = Node(channels=(8, 8), training=False)
    for weight in (node.leaves["weight"], node.leaves["weight"].contiguous(memory_format=torch.channels_last)):
        check(node, node.leaves | {"weight": weight})
    for factors in ((1, 2), (2, 1)):
        check(Node(channels=(8, 8), factors=factors, sides=(4, 6), training=False))


def test_empty_batches():
    for kernel, groups in ((1, 1), (3, 1), (3, 2)):
        node = Node(channels=(8, 8), kernel=kernel, groups=groups, residual=kernel == 1 or 1, training=False)
        leaves = {n: t[:0] if n[0] == "x" or n == "residual" else t for n, t in node.leaves.items()}
        with torch.no_grad():
            assert node.infer(leaves, node.buffers).numel() == 0
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        grads = torch.autograd.grad(node.call(leaves, node.buffers).sum(), list(leaves.values()))
        assert all(g.abs().sum() == 0 for g in grads)
