"""Checkpoints in and out: the key layout of this package (timm's), that of the original code, and that of detectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from dla_fast.models.checkpoint import Checkpoint, listing, read
from dla_fast.models.dense import DLASeg
from dla_fast.models.dla import DLA
from dla_fast.models.layouts import ALL, LAYOUTS, ConvertedStateDict, Layout, convert, kind_of, prefix_of
from dla_fast.models.registry import create_model, list_models

Network = TypeVar("Network", DLA, DLASeg)

_UNKNOWN = ("error", "keep", "drop")
_SHOWN = 6


def _network(name: str, state: Mapping[str, Tensor]) -> DLA | DLASeg:
    """A network to compare keys with."""
    options: dict[str, Any] = {}
    if name in list_models(dense=True):
        # Whatever the number of classes is, the keys are the same.
        up = state.get("up.weight")
        options = {"num_classes": 1, "down_ratio": 2 if up is None else up.shape[-1] // 2}
    return create_model(name, device="meta", **options)


def _differences(state: Mapping[str, Tensor], model: DLA | DLASeg | str) -> str | None:
    """What ``state`` lacks of the model's parameters and what it has beside them."""
    network = _network(model, state) if isinstance(model, str) else model
    wanted = network.state_dict()
    # Counters are younger than the published checkpoints; batch norm starts them at zero.
    missing = [key for key in wanted if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({listing(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({listing(unexpected)})")
    return "; ".join(parts) or None


def _own(found: Checkpoint, unused: bool = False) -> ConvertedStateDict:
    """A checkpoint as the networks of this package have it, or the same with the layers that nothing uses.

    A detector's base may hold a head of its own, which nothing uses: that is left out.
    """
    prefix = prefix_of(found.state)
    return convert(found, Layout(prefix, ALL - {"head"} if prefix else ALL, unused), "the network", "keep")


def _checked(state_dict: Mapping[str, Any], model: DLA | DLASeg | str | None) -> tuple[Checkpoint, ConvertedStateDict]:
    """A checkpoint as read, and as the networks of this package have it, compared with what it has to fit."""
    found = read(state_dict)
    own = _own(found)
    differences = None if model is None else _differences(own, model)
    if differences is not None:
        raise ValueError(f"state_dict: keys do not fit the model: {differences}")
    return found, own


def convert_state_dict(state_dict: Mapping[str, Any], to: str, *, unknown: str = "error") -> ConvertedStateDict:
    """A checkpoint of a DLA network in another layout.

    =============================  ==========================  ============================  ==========================
    keys                           "timm"                      "original"                    "detector"
    =============================  ==========================  ============================  ==========================
    ``base_layer.``, ``level0.``…  themselves                  themselves; of segmentation   under ``base.``
                                                               under ``base.``
    ``fc.`` (classification)       itself                      as the levels                 under ``base.``
    ``project.`` that none uses    –                           there                         there
    ``dla_up.``                    –                           of segmentation               there
    ``fc.0.``, ``up.weight``       –                           of segmentation               –
    ``ida_up.``, heads             –                           –                             there
    =============================  ==========================  ============================  ==========================

    What the layout has no place for is dropped, as the report tells. Project layers that nothing uses become copies of
    the layer that their tree does use. There and back gives the same keys and tensors of all that both layouts have;
    of the unused layers, which timm's has not, the values are other ones.

    Args:
        state_dict: names to tensors, of any of the layouts, or what training scripts save around them, as for
            :func:`dla_fast.models.from_original`. It is not changed, and the tensors are not copied.
        to: "timm" (this package's too, of classification networks), "original" or "detector".
        unknown: keys that no layout has are an "error", or "keep" or "drop" them.

    Returns:
        An ordered dict for ``load_state_dict``, with the modules' versions where the checkpoint had them. Its
        ``report`` has ``renamed``, ``added``, ``dropped`` and ``reshaped``, by key, and prints as text.

    Raises:
        ValueError: another layout, no DLA network's keys, unknown keys, or a ``project`` layer that is there in part.
        TypeError: not a mapping, or something else than tensors among the parameters.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to: expected one of {', '.join(map(repr, LAYOUTS))}, got {to!r}")
    if unknown not in _UNKNOWN:
        raise ValueError(f"unknown: expected one of {', '.join(map(repr, _UNKNOWN))}, got {unknown!r}")
    found = read(state_dict)
    return convert(found, LAYOUTS[to](kind_of(found.state)), f"the layout {to!r}", unknown)


def from_original(state_dict: Mapping[str, Any], model: DLA | DLASeg | str | None = None) -> ConvertedStateDict:
    """A checkpoint of the original code in this package's layout, which for classification networks is timm's.

    Drops the ``project`` layers that are never used and views a 2-D ``fc.weight`` as a 1x1 convolution. A checkpoint
    that has the layout already comes out the same. Values are not copied.

    Args:
        state_dict: names to tensors, or what training scripts save around them: a mapping that has them under
            ``state_dict``, ``model``, ``model_state_dict``, ``model_state``, ``net``, ``network`` or ``module``, or,
            where none of these holds a network, their moving average under ``state_dict_ema``, ``model_ema`` or
            ``ema``; within each other too. Prefixes ``module.``, ``_orig_mod.`` and ``model.`` are stripped.
        model: the network, or its name, that the keys have to fit; None checks nothing.

    Raises:
        ValueError: no DLA network's keys, or keys missing or unexpected.
        TypeError: not a mapping, or something else than tensors among the parameters.
    """
    return _checked(state_dict, model)[1]


def to_original(state_dict: Mapping[str, Any], model: DLA | DLASeg | str | None = None) -> ConvertedStateDict:
    """A checkpoint in the original code's layout, which loads there with ``strict=True``.

    The ``project`` layers that the original never uses become copies of the one that its tree does use, at the end of
    the tree's left edge: the shapes agree, and so do dtype and device. Other values are not copied. A checkpoint that
    has the layout already comes out the same.

    Args:
        state_dict: as for :func:`from_original`.
        model: as for :func:`from_original`.

    Raises:
        ValueError: as for :func:`from_original`, or a ``project`` layer that is there in part.
        TypeError: not a mapping of names to tensors.
    """
    return _own(_checked(state_dict, model)[0], unused=True)


def load_state_dict(model: Network, state_dict: Mapping[str, Any], strict: bool = True) -> Network:
    """Load a checkpoint of either layout into a network.

    Args:
        model: as from :func:`dla_fast.models.create_model`; written only if the checkpoint fits.
        state_dict: as for :func:`from_original`.
        strict: raise for keys that are missing or unexpected; otherwise those are left alone.

    Returns:
        ``model``.

    Raises:
        ValueError: keys or shapes that do not fit.
        TypeError: not a mapping of names to tensors.
    """
    state = from_original(state_dict, model if strict else None)
    own = model.state_dict()
    wrong = [
        f"{key}: expected {tuple(own[key].shape)}, got {tuple(value.shape)}"
        for key, value in state.items()
        if key in own and own[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"state_dict: shapes do not fit the model: {'; '.join(wrong[:_SHOWN])}{more}")
    # Without the modules' versions batch norm starts counters that a checkpoint lacks at zero.
    model.load_state_dict(dict(state), strict=strict)
    return model
