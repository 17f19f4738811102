"""Operators of the learned upsampling, with and without the add, and their autograd formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dla_fast import checks, reference
from dla_fast.ops.autograd import by_reference, register_autograd, second_order
from dla_fast.ops.flops import register_flop_formula
from dla_fast.ops.layout import empty_like_layout, is_channels_last
from dla_fast.ops.saved import saved

# The kernels of a backend, and the differentiable operators over them.
SCHEMAS = (
    "upsample(Tensor x, Tensor weight, int factor) -> Tensor",
    "upsample_add(Tensor x, Tensor skip, Tensor weight, int factor) -> Tensor",
    "upsample_backward(Tensor dy, Tensor x, Tensor weight, int factor, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
)


def upsampled_empty(x: Tensor, factor: int) -> Tensor:
    """A new map of the size and layout that upsampling ``x`` gives."""
    sizes = (*x.shape[:2], checks.upsampled(x.shape[2], factor), checks.upsampled(x.shape[3], factor))
    return empty_like_layout(x, sizes, is_channels_last(x))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, factor: int, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor]:
    dx = empty_like_layout(x, x.shape, is_channels_last(x)) if need_dx else x.new_empty(0)
    return dx, weight.new_empty(weight.shape) if need_dw else weight.new_empty(0)


def upsample_flops(x_shape: Any, factor: int) -> int:
    """Four products for each value of the upsampled map."""
    return 8 * factor**2 * math.prod(x_shape)


def _backward_flops(
    dy_shape: Any, x_shape: Any, weight_shape: Any, factor: int, need_dx: bool, need_dw: bool, **kwargs: Any
) -> int:
    return (need_dx + need_dw) * upsample_flops(x_shape, factor)


class _Upsample:
    """The differentiable operator of one backend, with the map to add or without."""

    def __init__(self, namespace: Any, name: str) -> None:
        self.kernel = getattr(namespace, name).default
        self.upsample_backward = namespace.upsample_backward.default
        self.adds = name == "upsample_add"

    def forward(self, *args: Any) -> Tensor:
        y: Tensor = self.kernel(*args)
        return y

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.factor = inputs
        if self.adds:
            del tensors[1]
        ctx.save_for_backward(*tensors)

    def backward(self, ctx: Any, dy: Tensor, needed: list[bool]) -> list[Tensor | None]:
        need_dx, need_dw = needed[0], needed[-1]
        x, weight = saved(
            ctx,
            "upsample",
            (dy,),
            lambda: ("x", "weight"),
            lambda: {i for i, read in enumerate((need_dw, need_dx)) if not read},
        )
        dx: Tensor | None
        dw: Tensor | None
        if by_reference((dy,)):

            def run(x: Tensor, weight: Tensor) -> Tensor:
                return reference.upsample(x, weight, ctx.factor)

            dx, dw = second_order(run, (x, weight), (need_dx, need_dw), (dy,)) if need_dx or need_dw else (None, None)
        else:
            dx, dw = None, None
            if need_dx or need_dw:
                dx, dw = self.upsample_backward(dy, x, weight, ctx.factor, need_dx, need_dw)
        skip = [dy if needed[1] else None] if self.adds else []
        return [dx if need_dx else None, *skip, dw if need_dw else None]


def register(library: torch.library.Library, backend: str, key: str) -> dict[str, Callable[..., Any]]:
    """Register fakes, flop formulas and autograd for a backend's namespace."""
    namespace = getattr(torch.ops, f"dla_fast_{backend}")
    space = f"dla_fast_{backend}"
    torch.library.register_fake(f"{space}::upsample", lambda x, weight, factor: upsampled_empty(x, factor), lib=library)
    torch.library.register_fake(
        f"{space}::upsample_add", lambda x, skip, weight, factor: upsampled_empty(x, factor), lib=library
    )
    torch.library.register_fake(f"{space}::upsample_backward", _fake_backward, lib=library)

    @register_flop_formula(namespace.upsample)
    def _(x_shape: Any, weight_shape: Any, factor: int, *args: Any, **kwargs: Any) -> int:
        return upsample_flops(x_shape, factor)

    @register_flop_formula(namespace.upsample_add)
    def _(x_shape: Any, skip_shape: Any, weight_shape: Any, factor: int, *args: Any, **kwargs: Any) -> int:
        return upsample_flops(x_shape, factor) + math.prod(skip_shape)

    register_flop_formula(namespace.upsample_backward)(_backward_flops)
    eager = {}
    for name, tensors in (("upsample", 2), ("upsample_add", 3)):
        op = getattr(namespace, name).default
        eager[name] = register_autograd(library, op, _Upsample(namespace, name), differentiable=tensors)
    return eager
