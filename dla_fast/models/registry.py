"""The networks by name: ten that classify, six that predict densely."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dla_fast.models.dense import DLASeg
from dla_fast.models.dla import DLA
from dla_fast.nn import BasicBlock, Bottleneck, SplitBottleneck
from dla_fast.nn.memory import check_memory, set_memory
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


# Dense prediction, and the network each stands on.
_DENSE = {f"{base}up": base for base in ("dla34", "dla60", "dla102", "dla169", "dla60x", "dla102x")}


_OPTIONS = ("num_classes", "in_chans", "features_only", "output_stride", "drop_rate", "device", "dtype")
_DENSE_OPTIONS = ("num_classes", "classes", "down_ratio", "in_chans", "device", "dtype")


def list_models(dense: bool | None = None) -> list[str]:
    """The names that :func:`create_model` knows.

    Args:
        dense: True for the dense-prediction networks alone, False for the classification networks, None for all.
    """
    return [*(_VARIANTS if dense is not True else ()), *(_DENSE if dense is not False else ())]


def create_model(name: str, *, memory: str = "default", **kwargs: Any) -> DLA | DLASeg:
    """Build a DLA network with random weights.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), table 1. Load a checkpoint with
    :func:`dla_fast.models.load_state_dict`.

    Args:
        name: one of :func:`list_models`.
        memory: "default" keeps for the backward pass what makes it fastest. "low" keeps less, and forms again in the
            backward pass the outputs of nodes, ladders and blocks, and where a pooling's maxima lie.
        **kwargs: ``num_classes``, ``in_chans``, ``features_only``, ``output_stride``, ``drop_rate``, ``device``,
            ``dtype``, as in :class:`DLA`; for a dense-prediction network ``num_classes`` (or ``classes``),
            ``down_ratio``, ``in_chans``, ``device`` and ``dtype``, as in :class:`DLASeg`.

    Raises:
        ValueError: an unknown name, or an option out of its range.
        TypeError: an option that the network does not have, or one given under both of its names.
    """
    check_memory(memory)
    model = _create(name, kwargs)
    set_memory(model, memory)
    return model


def _create(name: str, kwargs: dict[str, Any]) -> DLA | DLASeg:
    if name in _DENSE:
        _check_options(name, kwargs, _DENSE_OPTIONS)
        common = {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
        images = {"in_chans": kwargs.pop("in_chans")} if "in_chans" in kwargs else {}
        return DLASeg(_classifier(_DENSE[name], features_only=True, **images, **common), **kwargs)
    if name not in _VARIANTS:
        close = difflib.get_close_matches(str(name).lower(), list_models(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"name: unknown model {name!r}; {hint}expected one of {', '.join(list_models())}")
    _check_options(name, kwargs, _OPTIONS)
    return _classifier(name, **kwargs)


def _check_options(name: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    for option in given:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"{option}: {name} has no such option; {hint}expected one of {', '.join(known)}")


def _classifier(name: str, **kwargs: Any) -> DLA:
    variant = _VARIANTS[name]
    return DLA(variant.levels, variant.channels, variant.block, residual_root=variant.residual_root, **kwargs)
