"""Necks as code bases have them, each a shape of ladder and a shape of unit: what ``bench necks`` times by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from dla_fast.bench import neck_units as units
from dla_fast.bench.ladders import (
    DetectorNeck,
    Ladder,
    ListsIDAUp,
    PairDLAUp,
    PairIDAUp,
    RangeIDAUp,
    ReturningDLAUp,
    ReturningIDAUp,
)

# dla34's levels from stride 4 on.
CHANNELS = (64, 128, 256, 512)

# Each shape of ladder, as ``ladder(out, channels, factors)``.
LADDERS: dict[str, Ladder] = {
    "original": PairIDAUp,
    "plain": RangeIDAUp,
    "deformable": partial(RangeIDAUp, unit=units.PackedNode),
    "offset": partial(RangeIDAUp, unit=units.OffsetNode),
    "convbnrelu": partial(ListsIDAUp, unit=units.ConvBnRelu, up=nn.ConvTranspose2d),
    "wrapped": partial(ReturningIDAUp, unit=units.Wrapped),
    "normfirst": partial(ListsIDAUp, unit=units.NormFirst),
    "convmodule": partial(ListsIDAUp, unit=units.ConvModule),
    "global": partial(RangeIDAUp, unit=units.GlobalNode),
    "returning": partial(ReturningIDAUp, unit=units.sequential),
    "returning_add": partial(ReturningIDAUp, unit=units.sequential, merge="add"),
}
_NECKS: dict[str, Callable[[Sequence[int], Ladder], nn.Module]] = {
    "original": PairDLAUp,
    "wrapped": ReturningDLAUp,
    "returning": ReturningDLAUp,
    "returning_add": ReturningDLAUp,
}
NECKS = tuple(LADDERS)


def make(name: str, channels: Sequence[int] = CHANNELS) -> nn.Module:
    """A neck: from maps (N, C_i, H / 2^i, W / 2^i), highest resolution first, to (N, C_0, H, W).

    Args:
        name: one of :data:`NECKS`.
        channels: of the levels, highest resolution first.

    Raises:
        KeyError: another name.
    """
    return _NECKS.get(name, DetectorNeck)(channels, LADDERS[name])
