"""A node one of whose inputs is z of the unit before, against the node on y as the tail forms it: test_triton.py
starts this file."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from interpreted_node import LAYOUTS, OPS, TOLERANCE
from interpreted_strides import MAPS, given
from torch import Tensor
from torch._subclasses import FakeTensorMode

import dla_fast
from dla_fast.kernels import config, launch, library
from dla_fast.nn import BasicBlock, Bottleneck, Tree
from dla_fast.nn.memory import MEMORY, set_memory
from dla_fast.ops.layout import accumulation_dtype

ACTS = ("identity", "relu", "leaky_relu", "silu", "hardswish")
EPS, SLOPE, MOMENTUM = 1e-5, 0.1, 0.1


@dataclass
class Chain:
    """A node and what it is given; input ``index`` is z, with a norm."""

    channels: tuple[int, ...] = (24, 5)
    out_channels: int = 17
    index: int = 0
    residual: bool = True
    act: str = "silu"
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    factors: tuple[int, ...] | None = None
    sides: tuple[int, int] = (5, 7)
    images: int = 2
    dtype: torch.dtype = torch.float64
    layout: str = "channels_last"
    affine: bool = True
    added: int | bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.channels) + self.index)
        acc = accumulation_dtype(self.dtype)

        def draw(*sizes: int, dtype: torch.dtype = self.dtype) -> Tensor:
            t = torch.randn(sizes, dtype=torch.float64, generator=generator).to(dtype)
            return t.contiguous(memory_format=LAYOUTS[self.layout]) if len(sizes) == 4 else t

        n, c, factors = self.out_channels, self.channels[self.index], self.factors or (1,) * len(self.channels)
        low = [[s // f for s in self.sides] for f in factors]
        self.xs = [draw(self.images, size, *sides) for size, sides in zip(self.channels, low, strict=True)]
        self.ups = [draw(size, 1, 2 * f, 2 * f) for size, f in zip(self.channels, factors, strict=True) if f > 1]
        depth = sum(self.channels) // self.groups
        self.weight = draw(n, depth, self.kernel, self.kernel) / (self.kernel * depth**0.5)
        self.norm = [draw(c, dtype=acc), draw(c, dtype=acc).square() + 0.5]
        self.norm += [draw(c), draw(c)] if self.affine else [None, None]
        self.of_input = draw(*self.xs[self.index].shape) if self.residual else None
        out = [(s - 1) // self.stride + 1 for s in self.sides]
        self.z, self.dy = draw(self.images, n, *out), draw(self.images, n, *out)
        # A node's own residual: of its own, or an input.
        self.own = draw(self.images, n, *out) if self.added is True else None
        self.own_norm = [draw(n, dtype=acc), draw(n, dtype=acc).square() + 0.5, draw(n), draw(n)]
        self.sums = [None, None] if self.frozen else [draw(n, dtype=acc), draw(n, dtype=acc)]
        self.geometry = (list(factors), self.stride, 1, self.groups)

    def prologue(self) -> tuple[Any, ...]:
        return (self.index, self.of_input, *self.norm, EPS, self.act, SLOPE)

    def formed(self) -> list[Tensor]:
        """The inputs, y in the place of z."""
        y = OPS.tail(self.xs[self.index], *self.norm, self.of_input, EPS, self.act, SLOPE)
        return [y if i == self.index else x for i, x in enumerate(self.xs)]

    def stage(self, xs: list[Tensor], *pre: Any) -> tuple[Tensor, ...]:
        bias, running = self.own_norm[2], [torch.zeros(self.out_channels), torch.ones(self.out_channels)]
        made = OPS.conv_norm_act_stage(xs, self.ups, self.weight, bias, *running, *self.geometry, MOMENTUM, True, *pre)
        return (*made, *running)

    def backward(self, xs: list[Tensor], *pre: Any, wanted: Any = None) -> Any:
        need_dx, need_dup, need_dw, need_own = wanted or ([True] * len(xs), [True] * len(self.ups), True, False)
        index = -1 if isinstance(self.added, bool) else self.added
        return OPS.conv_norm_act_backward(
            self.dy, xs, self.ups, self.weight, self.own, self.z, *self.own_norm, *self.sums, *self.geometry, index,
            self.z.numel() // self.out_channels, EPS, "silu", 0.0, need_dx, need_dup, need_dw, need_own, *pre,
        )  # fmt: skip

    def expected(self, through: bool, **more: Any) -> list[Tensor]:
        """The gradients of the node on y, that of y taken back through the norm's activation by the tail."""
        dxs, dups, dw, dresidual, _ = self.backward(self.formed(), **more)
        dxs, sums = list(dxs), []
        if through:
            z, options = self.xs[self.index], (EPS, self.act, SLOPE)
            norm = (dxs[self.index], z, *self.norm, self.of_input)
            sums = OPS.tail_backward_reduce(*norm, *options)
            dxs[self.index] = OPS.tail_backward_apply(*norm, None, None, 0, *options, True)[1]
        return [*dxs, *dups, dw, dresidual, *sums]


both = pytest.mark.parametrize("ways", ["chosen", "on load"], indirect=True)


@pytest.fixture(autouse=True)
def ways(request, monkeypatch):
    """With everything on load that can be; of tests with :data:`both` also as it is chosen."""
    way = getattr(request, "param", "on load")
    if way == "on load":
        monkeypatch.setattr(config, "forms_in_backward", lambda *args: True)
        monkeypatch.setattr(config, "passes_back", lambda *args: True)
    return way


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for part in found for t in flat(part)]


def close(mine: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    assert len(mine) == len(exact)
    for i, (a, b) in enumerate(zip(mine, exact, strict=True)):
        assert a.shape == b.shape, i
        assert a.dtype == b.dtype, i
        # Of one value there is no unbiased variance.
        assert torch.equal(a.isnan(), b.isnan()), i
        a, b = a.nan_to_num(), b.nan_to_num()
        error = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-3)
        assert error < TOLERANCE[dtype], f"{i}: {error:.1e}"


def check(chain: Chain, ways: tuple[bool, ...] = (True, False)) -> list[str]:
    """Forward and backward against the node on y; the kernels that ran for z."""
    with launch.count() as names:
        made = chain.stage(chain.xs, *chain.prologue())
    close(list(made), list(chain.stage(chain.formed())), chain.dtype)
    for through in ways:
        with launch.count() as found:
            mine = flat(chain.backward(chain.xs, *chain.prologue(), through))
        close(mine, chain.expected(through), chain.dtype)
        names += found
    return names


ON_LOAD = {"coefficients_kernel", "stage_kernel"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_any_input_is_normalised_on_load(residual, dtype, layout):
    """One input to four, channels that fill blocks and that do not, an odd number of pixels."""
    for channels in ((32,), (24, 5), (8, 16, 8, 3)):
        for index in range(len(channels)):
            options = {"residual": residual, "dtype": dtype, "layout": layout, "sides": (3, 5)}
            names = check(Chain(channels, index=index, **options), ways=(True,) if index % 2 else (True, False))
            assert set(names) >= ON_LOAD
            assert "tail_kernel" not in names


@both
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("act", ACTS)
def test_every_activation(monkeypatch, act, split, ways):
    """With every kernel of the backward."""
    if split:
        monkeypatch.setattr(config, "fits_fused", lambda *args: False)
    for dtype, residual in itertools.product((torch.float32, torch.float16), (True, False)):
        chain = Chain((24, 16), index=residual, residual=residual, act=act, dtype=dtype, affine=residual)
        names = check(chain)
        assert {"dx_kernel", "weight_kernel"} <= set(names) if split else "fused_kernel" in names
        if ways == "on load":
            assert not {"tail_kernel", "reduce_kernel"} & set(names)
        else:
            # By a pass of its own: y before all gradients at once, and the way back.
            assert ("tail_kernel" in names) == (not split)
            assert names.count("reduce_kernel") == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sides, images", [((1, 1), 1), ((1, 1), 3), ((8, 16), 1), ((1, 67), 1)])
@pytest.mark.parametrize("split", [False, True])
def test_few_pixels_and_whole_tiles(monkeypatch, split, sides, images, layout):
    if split:
        monkeypatch.setattr(config, "fits_fused", lambda *args: False)
    for channels, dtype in (((32, 32), torch.float16), ((9,), torch.float64)):
        out = 32 if len(channels) == 2 else 5
        check(Chain(channels, out, dtype=dtype, sides=sides, images=images, layout=layout))


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", [False, True])
def test_beside_a_residual_of_the_node(monkeypatch, split, layout, ways):
    """Which is an input, another or this one, or a tensor of its own; and with frozen statistics."""
    if split:
        monkeypatch.setattr(config, "fits_fused", lambda *args: False)
    for index, added in itertools.product((0, 1, 2), (0, 2, True)):
        chain = Chain((17, 8, 17), index=index, added=added, layout=layout, frozen=index == 1, sides=(3, 5))
        names = check(chain, ways=(True,))
        # The tail reads what it adds.
        if ways == "on load":
            assert ("tail_kernel" in names) == (index == added and added is not True)


@both
@pytest.mark.parametrize("through", [True, False])
def test_what_is_wanted_alone(through):
    for index in (0, 1):
        chain = Chain((24, 16), index=index, dtype=torch.float32)
        one = [i == index for i in range(2)]
        for need_dx, need_dw in ((one, False), (one, True), ([True, True], False), ([False, False], True)):
            if through and not need_dx[index]:
                continue
            wanted = (need_dx, [], need_dw, False)
            mine = flat(chain.backward(chain.xs, *chain.prologue(), through, wanted=wanted))
            close(mine, chain.expected(through, wanted=wanted), chain.dtype)
        with launch.count() as names:
            chain.backward(chain.xs, *chain.prologue(), False, wanted=([True, True], [], False, False))
        # The gradient of y does not ask what y is.
        assert not {"tail_kernel", "coefficients_kernel"} & set(names)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_nodes_have_a_pass_before_them(layout):
    options: tuple[dict[str, Any], ...] = (
        {"kernel": 3},
        {"stride": 2},
        {"kernel": 3, "stride": 2},
        {"groups": 2, "channels": (8, 16), "out_channels": 8},
        {"factors": (2, 1), "sides": (4, 6)},
        {"kernel": 3, "factors": (1, 2), "sides": (4, 6)},
    )
    for one, dtype in zip(options, itertools.cycle((torch.float64, torch.float32, torch.float16)), strict=False):
        names = check(Chain(**one, dtype=dtype, layout=layout))
        assert "tail_kernel" in names
        assert names.count("reduce_kernel") == 1
        assert "coefficients_kernel" not in names
        assert "apply_kernel" not in names or one.get("kernel", 1) == 3 or "stride" in one or "groups" in one


def test_beside_an_input_that_is_upsampled_on_the_way():
    for index in (0, 1):
        check(Chain((8, 6, 5), index=index, factors=(1, 1, 2), sides=(4, 6)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_library_takes_y(monkeypatch, layout):
    """The products of a wide node's backward, as on a GPU whose architecture was looked at."""
    monkeypatch.setattr(library, "DEVICE", "cpu")
    monkeypatch.setattr(library, "WIDE", 0)
    config.install({})  # forgets plans
    names = check(Chain((24, 8), dtype=torch.float16, layout=layout))
    assert names.count("coefficients_kernel") == 1
    assert names.count("tail_kernel") == 2
    assert names.count("reduce_kernel") == 1
    config.install({})


@both
def test_launches():
    chain = Chain((16,), 16, dtype=torch.float32, act="relu")
    with launch.count() as names:
        chain.stage(chain.xs, *chain.prologue())
    assert names == ["coefficients_kernel", "stage_kernel", "finalise_kernel"]
    with launch.count() as names:
        chain.backward(chain.xs, *chain.prologue(), True)
    assert [n for n in names if n != "weight_sum_kernel"] == [
        "coefficients_kernel",
        "fused_kernel",
        "reduce_sum_kernel",
    ]


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_same_bits_every_time(kernel):
    chain = Chain((24, 16), kernel=kernel, dtype=torch.float32, sides=(17, 19))
    once, again = (
        [*chain.stage(chain.xs, *chain.prologue()), *flat(chain.backward(chain.xs, *chain.prologue(), True))]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_strides_of_every_kind(kernel, layout):
    """What dense arguments give, with the strides that the fakes promise."""
    chain = Chain((8, 6), 9, kernel=kernel, sides=(4, 3), layout=layout)
    dense = [*chain.stage(chain.xs, *chain.prologue()), *chain.expected(True)]
    for way in MAPS:
        changed = Chain((8, 6), 9, kernel=kernel, sides=(4, 3), layout=layout)
        for name, value in list(vars(changed).items()):
            if isinstance(value, Tensor):
                setattr(changed, name, given(value, way))
            elif isinstance(value, list) and name != "ups":
                setattr(changed, name, [given(t, way) for t in value])
        results = [*changed.stage(changed.xs, *changed.prologue())]
        results += flat(changed.backward(changed.xs, *changed.prologue(), True))
        close(results, dense, torch.float64)
        strides = [(t.shape, t.stride()) for t in results]
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            for name, value in list(vars(changed).items()):
                if isinstance(value, Tensor):
                    setattr(changed, name, mode.from_tensor(value))
                elif isinstance(value, list):
                    setattr(changed, name, [None if t is None else mode.from_tensor(t) for t in value])
            promised = [*changed.stage(changed.xs, *changed.prologue())]
            promised += flat(changed.backward(changed.xs, *changed.prologue(), True))
            assert strides == [(t.shape, t.stride()) for t in promised], way


def test_no_pixels():
    for kernel in (1, 3):
        chain = Chain((8, 8), 8, images=0, kernel=kernel)
        check(chain)
        *_, one, other = flat(chain.backward(chain.xs, *chain.prologue(), True))
        assert one.abs().sum() == other.abs().sum() == 0


def test_what_is_no_pixel_adds_nothing():
    """Beyond the last pixel y is not what the norm would make of zero, which half precision does not hold."""
    for split in (False, True):
        chain = Chain((16,), 16, residual=False, act="identity", dtype=torch.float16, sides=(1, 33), images=1)
        chain.xs = [(30000 + 16 * x.round()).half() for x in chain.xs]
        chain.norm = [torch.full((16,), 3e4), torch.full((16,), 0.1), None, None]
        assert torch.isinf(OPS.tail(torch.zeros_like(chain.xs[0]), *chain.norm, None, EPS, "identity", 0.0)).all()
        with pytest.MonkeyPatch.context() as patch:
            if split:
                patch.setattr(config, "fits_fused", lambda *args: False)
            check(chain)
        assert all(t.isfinite().all() for t in flat(chain.backward(chain.xs, *chain.prologue(), True)))


@pytest.mark.parametrize("through", [True, False])
def test_what_is_carried_is_added_to_the_first_gradient(through):
    chain = Chain((8, 8), index=1)
    (dx, other), *_ = chain.backward(chain.xs, *chain.prologue(), through, None)
    carried = torch.randn_like(dx)
    (found, same), *_ = chain.backward(chain.xs, *chain.prologue(), through, carried)
    torch.testing.assert_close(found, dx + carried)
    assert torch.equal(other, same)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_leaf_tree_trains_as_the_reference(block, memory):
    torch.manual_seed(0)
    tree = Tree(1, block, 4, 8, 2, level_root=True).double()
    set_memory(tree, memory)
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64, requires_grad=True)

    def found(name):
        module = copy.deepcopy(tree)
        with dla_fast.use_backend(name):
            y = module(x)
            return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()]), *module.buffers()]

    for a, e in zip(found("triton"), found("reference"), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
