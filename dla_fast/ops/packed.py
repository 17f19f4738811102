"""A unit's inference from a norm that was folded and a weight that was packed before: the CPU's functions for it.

They are called for plain tensors, in inference, where nobody watches operators, and cost less as functions of the
extension than as operators. csrc/cpu/operators/packed.h and fingerprint.h say what they do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_fast._extension import STATUS


def _function(name: str) -> Any:
    """A function of the extension; where there is no extension one that says why."""

    def missing(*args: Any) -> Any:
        raise RuntimeError(f"{name}: {STATUS.reason or 'the C++ extension is older than its sources; rebuild it'}")

    return getattr(importlib.import_module("dla_fast._C"), name, missing) if STATUS.loaded else missing


# fingerprint(tensors): a number of where tensors lie, what they are and what is in them; 0 where there is none.
fingerprint: Callable[[Sequence[Tensor | None]], int] = _function("fingerprint")
# way_of(xs, up_weights, weight, factors, stride, dilation, groups, foldable): which of the CPU's products serves a
# call, or :data:`FOLDED`.
way_of: Callable[..., int] = _function("conv_norm_act_way")
# pack(weight, in_channels, way): the weight as that product reads it; opaque.
pack: Callable[[Tensor, Sequence[int], int], Tensor] = _function("conv_norm_act_pack")
# run(xs, up_weights, weight, packed, way, scale, shift, residual, factors, stride, dilation, groups, residual_input,
# act, slope): act(scale * conv(cat(xs)) + shift + residual).
run: Callable[..., Tensor] = _function("conv_norm_act_packed")
# release_maps(): free the memory that packed calls keep for their maps; there is none without the extension.
release_maps: Callable[[], None] = _function("release_maps") if STATUS.loaded else lambda: None


# The library's convolution with the norm folded into it, as a way.
FOLDED = -2


def folds(act: str) -> bool:
    """Whether an activation may follow the library's convolution: one that a pass in place costs little."""
    return act in ("relu", "identity")


def fold(x: Tensor, weight: Tensor, scale: Tensor, stride: int, dilation: int, groups: int) -> Tensor:
    """The weight with the norm's scale in it, in the library's blocks for inputs like ``x``; others it takes too."""
    scaled = (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype).contiguous(memory_format=torch.channels_last)
    padding = dilation * (weight.shape[2] // 2)
    blocked: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        scaled, [padding] * 2, [stride] * 2, [dilation] * 2, groups, list(x.shape)
    )
    return blocked


def run_folded(
    x: Tensor,
    blocked: Tensor,
    kernel: int,
    shift: Tensor,
    added: Tensor | None,
    stride: int,
    dilation: int,
    groups: int,
    act: str,
) -> Tensor:
    """``act(conv(x) + shift + added)`` with a weight of :func:`fold`."""
    mkldnn, geometry = torch.ops.mkldnn, ([dilation * (kernel // 2)] * 2, [stride] * 2, [dilation] * 2, groups)
    # The activation comes by itself: the library's own makes zeros of NaN.
    if added is None:
        y: Tensor = mkldnn._convolution_pointwise.default(x, blocked, shift, *geometry, "none", [], "")
    else:
        # Sums take a bias of the inputs' dtype alone.
        added = added.contiguous(memory_format=torch.channels_last)
        y = mkldnn._convolution_pointwise.binary(
            x, added, blocked, shift.to(x.dtype), *geometry, "add", 1.0, None, [], ""
        )
    return y.relu_() if act == "relu" else y
