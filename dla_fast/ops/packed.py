"""A unit's inference from a norm that was folded and a weight that was packed before: the CPU's functions for it.

They are called for plain tensors, in inference, where nobody watches operators, and cost less as functions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dla_fast._extension import STATUS

if STATUS.loaded:
    from dla_fast._C import conv_norm_act_pack as pack
    from dla_fast._C import conv_norm_act_packed as run
    from dla_fast._C import conv_norm_act_way as way_of
    from dla_fast._C import fingerprint, release_maps
else:

    def fingerprint(tensors: Sequence[Tensor | None]) -> int:
        """A number of where tensors lie, what they are and what is in them, as csrc/cpu/operators/fingerprint.h says.

        Zero where there is none.
        """
        return 0

    def way_of(
        xs: Sequence[Tensor],
        up_weights: Sequence[Tensor],
        weight: Tensor,
        factors: Sequence[int],
        stride: int,
        dilation: int,
        groups: int,
    ) -> int:
        """Which of the CPU's products serves a call, by its shapes, layouts and dtype."""
        raise NotImplementedError(STATUS.reason)

    def pack(weight: Tensor, in_channels: Sequence[int], way: int) -> Tensor:
        """The weight as a product reads it; opaque."""
        raise NotImplementedError(STATUS.reason)

    def run(
        xs: Sequence[Tensor],
        up_weights: Sequence[Tensor],
        weight: Tensor,
        packed: Tensor,
        way: int,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        factors: Sequence[int],
        stride: int,
        dilation: int,
        groups: int,
        residual_input: int,
        act: str,
        slope: float,
    ) -> Tensor:
        """``act(scale * conv(cat(xs)) + shift + residual)``."""
        raise NotImplementedError(STATUS.reason)

    def release_maps() -> None:
        """Free the memory that packed calls keep for their maps."""


__all__ = ["fingerprint", "pack", "release_maps", "run", "way_of"]
