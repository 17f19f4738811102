"""Operators of the normalisation tail: moments, tail, and its backward in two steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dla_fast.ops.flops import register_flop_formula
from dla_fast.ops.layout import accumulation_dtype, empty_like_layout, is_channels_last

# mean and var travel in the accumulation dtype; var is the biased variance, without eps. mean is that of z, so with
# frozen statistics and a convolution bias it is the running mean less that bias.
_NORM = "Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, Tensor? residual"
_OPTIONS = "float eps, str act, float slope"

SCHEMAS = (
    "moments(Tensor z, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum) -> (Tensor, Tensor)",
    f"tail(Tensor z, {_NORM}, {_OPTIONS}) -> Tensor",
    f"tail_backward_reduce(Tensor dy, Tensor z, {_NORM}, {_OPTIONS}) -> (Tensor, Tensor)",
    f"tail_backward_apply(Tensor dy, Tensor z, {_NORM}, Tensor? sum_dy, Tensor? sum_dy_xhat, SymInt count, {_OPTIONS}, "
    "bool residual_grad) -> (Tensor, Tensor)",
)

# Flops per value of z: the multiply-adds of the formulas in csrc/cpu/kernels.h, an activation counted as one.
_FLOPS = {"moments": 4, "tail": 5, "tail_backward_reduce": 9, "tail_backward_apply": 11}


def _statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(z.dtype)
    return z.new_empty(z.shape[1], dtype=dtype), z.new_empty(z.shape[1], dtype=dtype)


def _like(z: Tensor) -> Tensor:
    return empty_like_layout(z, z.shape, is_channels_last(z))


def _fake_moments(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _statistics(z)


def _fake_tail(z: Tensor, *rest: Any) -> Tensor:
    return _like(z)


def _fake_reduce(dy: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _statistics(z)


def _fake_apply(dy: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    residual_grad = rest[-1]
    return _like(z), _like(z) if residual_grad else z.new_empty(0)


_FAKES: dict[str, Callable[..., Any]] = {
    "moments": _fake_moments,
    "tail": _fake_tail,
    "tail_backward_reduce": _fake_reduce,
    "tail_backward_apply": _fake_apply,
}


def register(library: torch.library.Library, backend: str, key: str) -> dict[str, Callable[..., Any]]:
    """Register fakes and flop formulas for a backend's namespace; nothing here is differentiable on its own."""
    namespace = getattr(torch.ops, f"dla_fast_{backend}")
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"dla_fast_{backend}::{name}", fake, lib=library)
        which = 0 if name in ("moments", "tail") else 1

        def flops(*shapes: Any, _which: int = which, _per_value: int = _FLOPS[name], **kwargs: Any) -> int:
            return _per_value * math.prod(shapes[_which])

        register_flop_formula(getattr(namespace, name))(flops)
    return {}
