"""Cases of what is not finite, which stands where it does in PyTorch: in outputs, all gradients, running statistics.

A value of an input or of the residual is NaN or infinite. The loss looks at what becomes of it, or does not: then its
gradient is zero there, and with frozen statistics next to nothing else is touched.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_fast import functional, use_backend

VALUES = (float("nan"), float("inf"), -float("inf"))
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "identity": lambda x: x,
    "silu": F.silu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "hardswish": F.hardswish,
}
LAYOUTS = (torch.channels_last, torch.contiguous_format)
# Kernel, stride, dilation, groups, residual, and by what the second input is upsampled.
GEOMETRIES: dict[str, tuple[int, int, int, int, int | str | None, int]] = {
    "aggregate": (1, 1, 1, 1, None, 1),
    "aggregate-input": (1, 1, 1, 1, 0, 1),
    "aggregate-tensor": (1, 1, 1, 1, "tensor", 1),
    "merge": (3, 1, 1, 1, 0, 2),
    "merge1x1": (1, 1, 1, 1, None, 2),
    "conv3": (3, 1, 1, 1, "tensor", 1),
    "stride": (3, 2, 1, 1, None, 1),
    "stride1x1": (1, 2, 1, 1, "tensor", 1),
    "dilation": (3, 1, 2, 1, 0, 1),
    "groups": (3, 1, 1, 2, "tensor", 1),
}
C, H, W = 8, 6, 8

Run = Callable[[dict[str, Tensor], list[Tensor]], Tensor]


def kinds(t: Tensor) -> Tensor:
    """0 where a value is finite, 1 where it is NaN, 2 and 3 where it is either infinity."""
    return t.isnan() + 2 * (t == float("inf")) + 3 * (t == -float("inf"))


def seen(run: Run, leaves: dict[str, Tensor], running: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Kinds of all values that a call and its backward give, and of those that it gives without gradients."""
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    after = [t.clone() for t in running]
    y = run(leaves, after)
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    with torch.no_grad():
        inferred = run(leaves, [t.clone() for t in running])
    found |= {"y": y, "inferred": inferred} | {f"running {i}": t for i, t in enumerate(after)}
    return {name: kinds(t.detach()) for name, t in found.items()}


def check(served: str, mine: Run, stock: Run, leaves: dict[str, Tensor], running: list[Tensor], dy: Tensor) -> None:
    # PyTorch's in float64: with less, what it makes of a NaN depends on how its convolutions multiply.
    wide = torch.float64
    expected = seen(stock, {k: t.to(wide) for k, t in leaves.items()}, [t.to(wide) for t in running], dy.to(wide))
    with use_backend(served):
        found = seen(mine, leaves, running, dy)
    for name, want in expected.items():
        assert torch.equal(found[name], want), f"{name}: {found[name].unique(return_counts=True)}, not " + str(
            want.unique(return_counts=True)
        )


def drawn(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, layout: torch.memory_format) -> dict[str, Tensor]:
    found = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return {name: t.contiguous(memory_format=layout) if t.dim() == 4 else t for name, t in found.items()}


def gradient(stock: Run, leaves: dict[str, Tensor], running: list[Tensor], blind: bool) -> Tensor:
    """Of a loss that looks at all pixels, or only at those that are finite in every channel.

    It lies as the output does: of two layouts PyTorch takes values one by one, where hardswish has no gradient of NaN.
    """
    with torch.no_grad():
        y = stock(leaves, [t.clone() for t in running])
    found = y.isfinite().all(1, keepdim=True).expand_as(y) if blind else torch.ones_like(y)
    return torch.empty_like(y).copy_(found)


def cases(keep: int, wheres: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Every ``keep``-th of all."""
    return itertools.islice(
        itertools.product(LAYOUTS, ACTS, VALUES, (False, True), wheres, (True, False)), None, None, keep
    )


def of_a_node(served: str, dtype: torch.dtype, geometry: str, keep: int = 1) -> None:
    kernel, stride, dilation, groups, residual, factor = GEOMETRIES[geometry]
    side = (-(-H // stride), -(-W // stride))
    shapes = {
        "x0": (2, C, H, W), "x1": (2, C, H // factor, W // factor), "weight": (C, 2 * C // groups, kernel, kernel),
        "gamma": (C,), "beta": (C,), "bias": (C,),
    }  # fmt: skip
    shapes |= {"added": (2, C, *side)} if residual == "tensor" else {}
    shapes |= {"up": (C, 1, 2 * factor, 2 * factor)} if factor > 1 else {}
    wheres = ("x0", "x1", "added") if residual == "tensor" else ("x0", "x1")
    for layout, act, value, training, where, blind in cases(keep, wheres):
        leaves = drawn(shapes, dtype, layout)
        running = [torch.randn(C).to(dtype), torch.rand(C).to(dtype) + 0.5]

        def stock(t: dict[str, Tensor], stats: list[Tensor], training: bool = training, act: str = act) -> Tensor:
            x1 = t["x1"]
            if factor > 1:
                # In float32 it may make NaN of infinities, as the layout of the weight has it.
                x1 = F.conv_transpose2d(x1.double(), t["up"].double(), None, factor, factor // 2, 0, C).to(x1.dtype)
            padding = dilation * (kernel // 2)
            z = F.conv2d(torch.cat((t["x0"], x1), 1), t["weight"], t["bias"], stride, padding, dilation, groups)
            y = F.batch_norm(z, *stats, t["gamma"], t["beta"], training)
            return ACTS[act](y if residual is None else y + (t["x0"] if residual == 0 else t["added"]))

        def mine(t: dict[str, Tensor], stats: list[Tensor], training: bool = training, act: str = act) -> Tensor:
            return functional.conv_norm_act(
                [t["x0"], t["x1"]], t["weight"], t["gamma"], t["beta"], *stats, training=training,
                conv_bias=t["bias"], stride=stride, dilation=dilation, groups=groups, act=act,
                residual=t["added"] if residual == "tensor" else residual,
                upsample=[None, (t["up"], factor)] if factor > 1 else None,
            )  # fmt: skip

        leaves[where][1, 3, 1, 1] = value
        dy = gradient(stock, leaves, running, blind)
        check(served, mine, stock, leaves, running, dy)


def of_a_norm(served: str, dtype: torch.dtype, size: tuple[int, int, int], keep: int = 1) -> None:
    n, h, w = size
    for layout, act, value, training, where, blind in cases(keep, ("x", "added")):
        leaves = drawn({"x": (n, C, h, w), "added": (n, C, h, w), "gamma": (C,), "beta": (C,)}, dtype, layout)
        running = [torch.randn(C).to(dtype), torch.rand(C).to(dtype) + 0.5]

        def stock(t: dict[str, Tensor], stats: list[Tensor], training: bool = training, act: str = act) -> Tensor:
            return ACTS[act](F.batch_norm(t["x"], *stats, t["gamma"], t["beta"], training) + t["added"])

        def mine(t: dict[str, Tensor], stats: list[Tensor], training: bool = training, act: str = act) -> Tensor:
            return functional.batch_norm_act(
                t["x"], t["gamma"], t["beta"], *stats, training=training, residual=t["added"], act=act
            )

        # In the second channel both infinities meet, or the one twice.
        leaves[where][0, 1, 0, 0] = leaves[where][1, 3, 1, 1] = value
        leaves[where][-1, 1, -1, -1] = float("inf")
        dy = gradient(stock, leaves, running, blind)
        check(served, mine, stock, leaves, running, dy)


def of_upsampling(served: str, dtype: torch.dtype, factor: int, keep: int = 1) -> None:
    """Not at the border: what a tap beyond it takes PyTorch has as NaN in one layout and not in the other."""
    height, width = (4 * factor + factor % 2 for _ in range(2))
    for layout, value, adds, blind in itertools.islice(
        itertools.product(LAYOUTS, VALUES, (True, False), (True, False)), None, None, keep
    ):
        leaves = drawn({"x": (2, C, 4, 4), "up": (C, 1, 2 * factor, 2 * factor)}, dtype, layout)
        leaves |= drawn({"skip": (2, C, height, width)}, dtype, layout) if adds else {}

        def stock(t: dict[str, Tensor], stats: list[Tensor], adds: bool = adds) -> Tensor:
            y = F.conv_transpose2d(t["x"], t["up"], None, factor, factor // 2, 0, C)
            return y + t["skip"] if adds else y

        def mine(t: dict[str, Tensor], stats: list[Tensor], adds: bool = adds) -> Tensor:
            x, up = t["x"], t["up"]
            return functional.upsample_add(x, t["skip"], up, factor) if adds else functional.upsample(x, up, factor)

        leaves["x"][1, 3, 1, 2] = value
        dy = gradient(stock, leaves, [], blind)
        check(served, mine, stock, leaves, [], dy)


def of_a_wide_node(served: str, dtype: torch.dtype, kernel: int, keep: int = 1) -> None:
    """As wide as what products serve that sum transformed values, or values in parts."""
    channels = 64
    shapes = {"x": (2, channels, 9, 16), "weight": (channels, channels, kernel, kernel), "gamma": (channels,)}
    for layout, act, value, training, _, blind in cases(keep, ("x",)):
        if act in ("silu", "leaky_relu"):
            continue
        leaves = drawn(shapes, dtype, layout)
        running = [torch.randn(channels).to(dtype), torch.rand(channels).to(dtype) + 0.5]

        def stock(t: dict[str, Tensor], stats: list[Tensor], training: bool = training, act: str = act) -> Tensor:
            z = F.conv2d(t["x"], t["weight"], None, 1, kernel // 2)
            return ACTS[act](F.batch_norm(z, *stats, t["gamma"], None, training))

        def mine(t: dict[str, Tensor], stats: list[Tensor], training: bool = training, act: str = act) -> Tensor:
            return functional.conv_norm_act([t["x"]], t["weight"], t["gamma"], None, *stats, training=training, act=act)

        leaves["x"][1, 3, 4, 5] = value
        dy = gradient(stock, leaves, running, blind)
        check(served, mine, stock, leaves, running, dy)
