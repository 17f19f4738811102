"""The ten classification networks by name."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from typing import Any

from dla_fast.models.dla import DLA
from dla_fast.nn import BasicBlock, Bottleneck, SplitBottleneck
from dla_fast.nn.tree import BlockFactory


@dataclass(frozen=True)
class _Variant:
    levels: tuple[int, ...]
    channels: tuple[int, ...]
    block: BlockFactory
    residual_root: bool = False


_COMPACT = (16, 32, 64, 64, 128, 256)
_WIDE = (16, 32, 128, 256, 512, 1024)
_SPLIT_64 = functools.partial(SplitBottleneck, cardinality=64)

# Table 1 of the paper.
_VARIANTS = {
    "dla34": _Variant((1, 1, 1, 2, 2, 1), (16, 32, 64, 128, 256, 512), BasicBlock),
    "dla46_c": _Variant((1, 1, 1, 2, 2, 1), _COMPACT, Bottleneck),
    "dla46x_c": _Variant((1, 1, 1, 2, 2, 1), _COMPACT, SplitBottleneck),
    "dla60x_c": _Variant((1, 1, 1, 2, 3, 1), _COMPACT, SplitBottleneck),
    "dla60": _Variant((1, 1, 1, 2, 3, 1), _WIDE, Bottleneck),
    "dla60x": _Variant((1, 1, 1, 2, 3, 1), _WIDE, SplitBottleneck),
    "dla102": _Variant((1, 1, 1, 3, 4, 1), _WIDE, Bottleneck, residual_root=True),
    "dla102x": _Variant((1, 1, 1, 3, 4, 1), _WIDE, SplitBottleneck, residual_root=True),
    "dla102x2": _Variant((1, 1, 1, 3, 4, 1), _WIDE, _SPLIT_64, residual_root=True),
    "dla169": _Variant((1, 1, 2, 3, 5, 1), _WIDE, Bottleneck, residual_root=True),
}


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return list(_VARIANTS)


def create_model(name: str, **kwargs: Any) -> DLA:
    """Build a DLA network with random weights.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), table 1. Load a checkpoint with
    :func:`dla_fast.models.load_state_dict`.

    Args:
        name: one of :func:`list_models`.
        **kwargs: ``num_classes``, ``in_chans``, ``features_only``, ``output_stride``, ``drop_rate``, ``device``,
            ``dtype``, as in :class:`DLA`.

    Raises:
        ValueError: an unknown name, or an option out of its range.
        TypeError: an option that :class:`DLA` does not have.
    """
    variant = _VARIANTS.get(name)
    if variant is None:
        close = difflib.get_close_matches(str(name), _VARIANTS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"name: unknown model {name!r}; {hint}expected one of {', '.join(_VARIANTS)}")
    return DLA(variant.levels, variant.channels, variant.block, residual_root=variant.residual_root, **kwargs)
