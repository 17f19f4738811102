"""What every call of a swapped module asks before it leaves its children out: whether eager would do the same thing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast import backend
from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_frozen, is_observed, is_plain, parameter
from dla_fast.nn.batch_norm_act import run_batch_norm_act
from dla_fast.nn.unit import run_deferred, run_unit
from dla_fast.ops.ending import Ending
from dla_fast.reference.activation import ActSpec

# Everything else (fx proxies, DTensor, quantized weights) has rules of its own.
PLAIN = (Tensor, nn.Parameter)
_ACTS: dict[type, ActSpec] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity", nn.Hardswish: "hardswish"}
_HALF = (torch.float16, torch.bfloat16)


def undisturbed() -> bool:
    """Whether nobody is about who has to see the children: global module hooks, tracing, export."""
    return not (nn.modules.module._has_any_global_hook() or torch.jit.is_tracing() or backend.is_exporting())


def fused_act(module: nn.Module) -> ActSpec | None:
    """The activation a module computes, or None when no kernel ends with it."""
    if type(module) is nn.LeakyReLU:
        return ("leaky_relu", module.negative_slope)
    return _ACTS.get(type(module))


def are_unit(conv: Any, bn: Any) -> bool:
    """Whether two children are a convolution and a batch norm themselves, and nobody watches their calls."""
    return conv is not None and bn is not None and is_conv(conv) and is_norm(bn)


def is_conv(conv: nn.Module) -> bool:
    """Whether a child is a convolution in effect, and nobody watches its calls."""
    return isinstance(conv, nn.Conv2d) and stock.kind(conv) == "conv" and not is_observed(conv)


def is_norm(bn: nn.Module) -> bool:
    """Whether a child is a norm and nothing besides, and nobody watches its calls."""
    return is_plain(bn) and stock.kind(bn) not in stock.NORM_ACTS


def is_act(act: Any) -> bool:
    """Whether a child is an activation that kernels end with, and nobody watches its calls."""
    return act is not None and fused_act(act) is not None and not is_observed(act)


def unit_dtype(xs: Sequence[Tensor], conv: Any, bn: Any) -> torch.dtype | None:
    """The dtype of ``bn(conv(cat(xs)))`` where eager, too, computes in one dtype throughout; None where it does not.

    None also for inputs and weights that are not plain four-dimensional tensors with values.
    """
    weight, bias = parameter(conv, "weight"), parameter(conv, "bias")
    if type(xs[0]) not in PLAIN or type(weight) not in PLAIN or weight.is_meta:
        return None
    dtype: torch.dtype = xs[0].dtype
    for x in xs:
        if type(x) not in PLAIN or x.dtype != dtype or x.dim() != 4:
            return None
    device = xs[0].device.type
    if torch.is_autocast_enabled(device):
        # Autocast leaves float64 alone.
        if dtype == torch.float64 or weight.dtype == torch.float64:
            return None
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        return None
    return dtype if norm_fits(bn, dtype) else None


def norm_fits(bn: nn.Module, dtype: torch.dtype) -> bool:
    """Whether eager, too, gives a map of ``dtype`` for one."""
    buffers = bn._buffers
    # A norm's vectors may be float32 beside half-precision activations; by four buffers that gives float32.
    wider = torch.float32 if dtype in _HALF and not is_frozen(bn) else dtype
    for t in (
        parameter(bn, "weight"), parameter(bn, "bias"), buffers.get("running_mean"), buffers.get("running_var")
    ):  # fmt: skip
        if t is not None and t.dtype != dtype and t.dtype != wider:
            return False
    return True


def fits(x: Any, conv: nn.Module | None, bn: nn.Module) -> bool:
    """Whether a fused call answers as a unit of one input, or without ``conv`` as its norm and activation alone."""
    if conv is not None:
        return unit_dtype((x,), conv, bn) is not None
    return type(x) in PLAIN and x.dim() == 4 and not x.is_meta and norm_fits(bn, x.dtype)


def run_tail_on(name: str, x: Tensor, bn: nn.Module, act: ActSpec) -> Tensor:
    """A norm and the activation behind it, on the backend of :func:`run_unit_on`."""
    with contextlib.nullcontext() if name in ("auto", backend.selected()) else backend.use_backend(name):
        return run_batch_norm_act(x, bn, act=act)


def run_deferred_on(
    name: str, xs: Sequence[Tensor | Ending], conv: nn.Module, bn: nn.Module, **options: Any
) -> Tensor | Ending:
    """:func:`dla_fast.nn.unit.run_deferred` on the backend of :func:`run_unit_on`."""
    if name in ("auto", backend.selected()):
        return run_deferred(xs, conv, bn, **options)
    with backend.use_backend(name):
        return run_deferred(xs, conv, bn, **options)


def run_unit_on(name: str, xs: Sequence[Tensor | Ending], conv: nn.Module, bn: nn.Module, **options: Any) -> Tensor:
    """:func:`dla_fast.nn.unit.run_unit` on the backend a module is forced to, or on the one in force for "auto"."""
    if name in ("auto", backend.selected()):
        return run_unit(xs, conv, bn, **options)
    with backend.use_backend(name):
        return run_unit(xs, conv, bn, **options)
