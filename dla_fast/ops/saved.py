"""What a forward pass has saved, where something of it was edited in place before the backward pass.

PyTorch's own operators copy a concatenation and keep outputs, so that a child, a residual or a norm's bias may be
edited once they have been used. Here they are read again in the backward pass. An edit of what that pass does not need
is let through: no weight's gradient is wanted, say, or there is no activation whose kink has to be found. Of any other
a RuntimeError tells, and never is a gradient made of edited values. A second derivative needs everything. Writes past
autograd's version counters (``.data``, NumPy) are not noticed, as in :func:`dla_fast.ops.ending.recall`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from dla_fast.ops.autograd import by_reference


def saved(
    ctx: Any,
    op: str,
    grads: Sequence[Tensor | None],
    names: Callable[[], Sequence[str]],
    spared: Callable[[], Collection[int]],
) -> Sequence[Any]:
    """``ctx.saved_tensors``; those whose values do not matter as they are now.

    Args:
        ctx: of a backward pass.
        op: what was called.
        grads: what came back; the reference, where it has to serve them, reads everything.
        names: of the tensors, in their order, as whoever called it knows them.
        spared: the places of those that this backward pass does not read the values of.

    Raises:
        RuntimeError: one that is read was edited in place since; it is named.
    """
    try:
        found: Sequence[Any] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return _one_by_one(ctx, op, names(), () if by_reference(grads) else spared(), error)
    return found


def _one_by_one(ctx: Any, op: str, names: Sequence[str], spared: Collection[int], error: RuntimeError) -> list[Any]:
    found: list[Any] = []
    edited: list[str] = []
    for i, raw in enumerate(ctx._raw_saved_tensors):
        if not hasattr(raw, "unpack"):
            edited.append("an argument")
            break
        try:
            found.append(raw.unpack())
        except RuntimeError:
            found.append(raw.data)
            if i not in spared:
                edited.append(f"{names[i]} {tuple(raw.data.shape)}")
    if edited:
        raise RuntimeError(
            f"{op}: {', '.join(edited)} was edited in place between the forward and the backward pass, which needs the "
            "values that the forward pass has read: edit a clone of it, or edit it after the backward pass, or leave "
            f"the module unswapped (dla_fast.unswap_, or filter_fn of swap_). PyTorch says: {error}"
        ) from None
    return found


def unit_names(inputs: int, ups: int, weight: str = "weight") -> list[str]:
    """The tensors of a unit in the order in which they are saved."""
    return [
        *(f"xs[{i}]" for i in range(inputs)), *(f"an up-weight ({i})" for i in range(ups)), weight, "conv_bias",
        "residual", "bn_weight", "bn_bias",
    ]  # fmt: skip


def spared_of_unit(
    needed: Sequence[bool], factors: Sequence[int], ups: int, residual_input: int, plain: bool, through: int = -1
) -> set[int]:
    """The places of a unit's tensors that first gradients are not made of.

    Args:
        needed: whose gradients are wanted, in the order of :func:`unit_names`.
        factors: of the inputs.
        ups: how many are upsampled.
        residual_input: the input that is added, or -1.
        plain: the activation has no kink and no curve: it is the identity.
        through: the input that is formed on load, or -1.
    """
    n = len(factors)
    at = n + ups
    found = {at + 1}
    if not needed[at]:
        found |= {
            i for i, factor in enumerate(factors) if factor == 1 and i != through and (plain or i != residual_input)
        }
    if not any(needed[:at]) and through < 0:
        found.add(at)
    return found | {at + 2, at + 4} if plain else found
