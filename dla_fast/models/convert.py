"""Checkpoints in and out: the key layout of this package (timm's) and that of the original code.

They differ in one thing. The original gives every tree whose channels change a ``project`` layer, also trees deeper
than one level, where it is computed and never used; here and in timm those are absent. A dense-prediction network's
checkpoint has its classification network under ``base.``; the rest of its keys are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from dla_fast.models.dense import DLASeg
from dla_fast.models.dla import DLA
from dla_fast.models.registry import create_model, list_models

Network = TypeVar("Network", DLA, DLASeg)

_PROJECT = ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
_TOP = {name: i for i, name in enumerate(("base_layer", *(f"level{i}" for i in range(6)), "fc"))}
_SHOWN = 6
_BASE = "base."
# What every network has, a dense-prediction network under its base.
_MARKS = ("base_layer.0.weight", f"{_BASE}base_layer.0.weight")
# Where training scripts put the parameters, the plain ones before their moving averages: timm's and the original code's
# state_dict, torchvision's model and model_ema, the names of PyTorch's tutorials, DeepSpeed's module, and so on.
_WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema",
)
_PREFIXES = ("module.", "_orig_mod.", "model.")


def _listing(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _short(key: str) -> str:
    """A key without what wrappers of modules put before it: DataParallel, torch.compile, Lightning."""
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    # torch.compile of a part puts its own amid the key.
    return key.replace("._orig_mod.", ".")


def _parameters(found: Mapping[Any, Any]) -> Mapping[Any, Any] | None:
    """The names and tensors of a network, themselves or within what a training script saved around them."""
    if any(isinstance(key, str) and _short(key) in _MARKS for key in found):
        return found
    # By what is in it, since {"model": ...} may as well be the options that the network was made with.
    inner = (found[name] for name in _WRAPPERS if isinstance(found.get(name), Mapping))
    return next((state for state in map(_parameters, inner) if state is not None), None)


def _described(found: Mapping[Any, Any]) -> str:
    """What a mapping holds, the mappings in it with their own first keys."""
    parts = []
    for key, value in list(found.items())[:_SHOWN]:
        kind = type(value).__name__
        if isinstance(value, Mapping):
            kind = f"{kind} of {_listing(map(str, value)) or 'nothing'}"
        parts.append(f"{key} ({kind})")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(parts) + more


def _read(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters of a checkpoint: unwrapped, without prefixes, the head as a 1x1 convolution."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}")
    parameters = _parameters(state_dict)
    if parameters is None:
        raise ValueError(
            f"state_dict: missing {_MARKS[0]}, so this is no DLA network, neither itself nor under "
            f"{', '.join(_WRAPPERS)}; found {_described(state_dict) or 'none at all'}"
        )
    state: dict[str, Tensor] = {}
    for key, value in parameters.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected names of parameters, got {key!r}")
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{key!r}]: expected a Tensor, got {type(value).__name__}")
        short = _short(key)
        if short in state:
            raise ValueError(f"state_dict: {short!r} is there twice, with different prefixes of {', '.join(_PREFIXES)}")
        state[short] = value[:, :, None, None] if short == "fc.weight" and value.dim() == 2 else value
    # AveragedModel counts beside the network that it holds.
    state.pop("n_averaged", None)
    return state


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """The classification network's part of a checkpoint, what a dense-prediction network has besides, and the prefix.

    A detector's base may hold a head of its own, which nothing uses: that is left out.
    """
    if _MARKS[0] in state:
        return state, {}, ""
    base = {key.removeprefix(_BASE): value for key, value in state.items() if key.startswith(_BASE)}
    base = {key: value for key, value in base.items() if not key.startswith("fc.")}
    return base, {key: value for key, value in state.items() if not key.startswith(_BASE)}, _BASE


def _join(base: Mapping[str, Tensor], rest: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {**{prefix + key: value for key, value in base.items()}, **rest}


def _network(name: str, state: Mapping[str, Tensor]) -> DLA | DLASeg:
    """A network to compare keys with."""
    options: dict[str, Any] = {}
    if name in list_models(dense=True):
        # Whatever the number of classes is, the keys are the same.
        up = state.get("up.weight")
        options = {"num_classes": 1, "down_ratio": 2 if up is None else up.shape[-1] // 2}
    return create_model(name, device="meta", **options)


def _deep_trees(state: Mapping[str, Tensor]) -> set[str]:
    """Names of the trees deeper than one level: those above a tree that holds a root."""
    deep = set()
    for key in state:
        tree, found, _ = key.partition(".root.conv.weight")
        while found and "." in tree:
            tree = tree.rpartition(".")[0]
            deep.add(tree)
    return deep


def _ordered(state: dict[str, Tensor], project: int) -> dict[str, Tensor]:
    """``state`` in the order in which the networks register their layers; ``project`` comes first or last in a tree."""
    rank = {**_TOP, "tree1": 0, "tree2": 1, "root": 2, "project": project}

    def path(key: str) -> list[int]:
        parts = key.split(".")
        return [rank[part] for part in parts if part in rank] if parts[0] in _TOP else [len(_TOP)]

    return dict(sorted(state.items(), key=lambda item: path(item[0])))


def _differences(state: Mapping[str, Tensor], model: DLA | DLASeg | str) -> str | None:
    """What ``state`` lacks of the model's parameters and what it has beside them."""
    network = _network(model, state) if isinstance(model, str) else model
    wanted = network.state_dict()
    # Counters are younger than the published checkpoints; batch norm starts them at zero.
    missing = [key for key in wanted if key not in state and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_listing(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_listing(unexpected)})")
    return "; ".join(parts) or None


def _check(state: Mapping[str, Tensor], model: DLA | DLASeg | str | None) -> None:
    differences = None if model is None else _differences(state, model)
    if differences is not None:
        raise ValueError(f"state_dict: keys do not fit the model: {differences}")


def from_original(state_dict: Mapping[str, Any], model: DLA | DLASeg | str | None = None) -> dict[str, Tensor]:
    """A checkpoint of the original code in this package's and timm's layout.

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
    state, rest, prefix = _split(_read(state_dict))
    deep = _deep_trees(state)
    state = {key: value for key, value in state.items() if key.partition(".project.")[0] not in deep}
    _check(_join(state, rest, prefix), model)
    return _join(_ordered(state, project=-1), rest, prefix)


def to_original(state_dict: Mapping[str, Any], model: DLA | DLASeg | str | None = None) -> dict[str, Tensor]:
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
    state, rest, prefix = _split(_read(state_dict))
    deep = _deep_trees(state)
    used_keys = {key: value for key, value in state.items() if key.partition(".project.")[0] not in deep}
    _check(_join(used_keys, rest, prefix), model)
    for tree in deep:
        used = tree
        while used in deep:
            used += ".tree1"
        layer = {key: value for key, value in state.items() if key.startswith(f"{used}.project.")}
        missing = [f"{used}.project.{name}" for name in _PROJECT if f"{used}.project.{name}" not in layer]
        if layer and missing:
            raise ValueError(f"state_dict: missing {_listing(missing)}")
        for key, value in layer.items():
            state.setdefault(tree + key.removeprefix(used), value.clone())
    return _join(_ordered(state, project=3), rest, prefix)


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
    model.load_state_dict(state, strict=strict)
    return model
