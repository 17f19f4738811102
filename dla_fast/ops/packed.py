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
# Call(weight, packed, way, scale, shift, factors, stride, dilation, groups, residual_input, added_input, act, slope):
# how a kind of call that was checked once is served.
Call: Callable[..., Any] = _function("PackedCall")
# run(call, xs, up_weights, residual): act(scale * conv(cat(xs)) + shift + residual).
run: Callable[..., Tensor] = _function("conv_norm_act_packed")
# unchanged(modules, facts): whether facts of dla_fast/nn/facts.py hold of modules.
unchanged: Callable[[tuple[Any, ...], tuple[Any, ...]], bool] = _function("unchanged")
# kind_of_call(mark, tensors, xs, residual): a number of a call that reads tensors of that fingerprint, or 0.
kind_of_call: Callable[..., int] = _function("kind_of_call")
# recall(modules, facts, units, xs, residual): the output of units, one after another, of calls whose kind is known, or
# None.
recall: Callable[..., Tensor | None] = _function("recall")
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
