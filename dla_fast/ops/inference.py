"""Inference tensors among the arguments of a unit that is to be differentiated.

What :func:`torch.inference_mode` has made cannot be saved for a backward pass. PyTorch's own operators save the
concatenation, the convolution's weight and the norm's, and neither the maps that are concatenated nor what is added:
those may be inference tensors there, of a backbone that is frozen say, and are copied here. Others raise, before a
running statistic is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dla_fast.ops.autograd import requires_grad


def _any(tensors: Sequence[Tensor | None]) -> bool:
    # A loop, not any(): this runs on every call that is to be differentiated.
    for t in tensors:  # noqa: SIM110
        if t is not None and t.is_inference():
            return True
    return False


def saveable(
    xs: list[Tensor],
    up_weights: list[Tensor],
    weight: Tensor | None,
    conv_bias: Tensor | None,
    added: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    factors: Sequence[int],
    batches: Tensor | None,
) -> tuple[Any, ...]:
    """The tensors of a unit as they were given, those of inference copied.

    Args:
        weight: of the convolution, None where there is none.
        batches: the norm's counter; PyTorch counts a batch before the norm refuses its own weight.

    The others are as in :class:`dla_fast.arguments.Checked` and :class:`dla_fast.reference.norm.Norm`.

    Raises:
        RuntimeError: an inference tensor is one that PyTorch would save: a single or an upsampled input, a weight.
    """
    flat = (*xs, *up_weights, weight, conv_bias, added, bn_weight, bn_bias)
    if not _any(flat) or not requires_grad(flat):
        return xs, up_weights, weight, conv_bias, added, bn_weight, bn_bias
    n, m = len(xs), len(up_weights)
    ups = iter(up_weights)
    for i, (x, factor) in enumerate(zip(xs, factors, strict=True)):
        if factor > 1:
            up = next(ups)
            _check((x, up), {f"xs[{i}]": x, f"the up-weight of xs[{i}]": up})
    convolved = (*xs, *up_weights, weight, conv_bias)
    normed = (*convolved, bn_weight, bn_bias)
    if weight is not None:
        alone = {"xs[0]": xs[0]} if n == 1 and m == 0 else {}
        _check(convolved, {**alone, "weight": weight})
        _check(normed, {"bn_weight": bn_weight}, batches)
    else:
        _check(normed, {"x": xs[0], "bn_weight": bn_weight}, batches)
    fresh = [t.clone() if t is not None and t.is_inference() else t for t in flat]
    return fresh[:n], fresh[n : n + m], *fresh[n + m :]


def _check(reads: Sequence[Tensor | None], saved: Mapping[str, Tensor | None], batches: Tensor | None = None) -> None:
    """What an operator that is differentiable in ``reads`` would save is no inference tensor."""
    if not requires_grad(reads):
        return
    for name, t in saved.items():
        if t is not None and t.is_inference():
            if batches is not None:
                batches.add_(1)
            raise RuntimeError(
                f"{name}: an inference tensor cannot be saved for the backward pass; clone it outside of "
                "torch.inference_mode(), or make it there"
            )
