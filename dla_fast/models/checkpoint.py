"""What a training script saved, read down to the names and tensors of a DLA network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_SHOWN = 6
BASE = "base."
# What every network has, a dense-prediction network under its base.
MARKS = ("base_layer.0.weight", f"{BASE}base_layer.0.weight")
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


def listing(keys: Iterable[str], shown: int = _SHOWN) -> str:
    """The first of the keys, and how many more there are."""
    names = sorted(keys)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def short(key: str) -> str:
    """A key without what wrappers of modules put before it: DataParallel, torch.compile, Lightning."""
    while key.startswith(_PREFIXES):
        key = key.partition(".")[2]
    # torch.compile of a part puts its own amid the key.
    return key.replace("._orig_mod.", ".")


def _parameters(found: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], str] | None:
    """The names and tensors of a network, themselves or within what a training script saved around them; and where."""
    if any(isinstance(key, str) and short(key) in MARKS for key in found):
        return found, ""
    # By what is in it, since {"model": ...} may as well be the options that the network was made with.
    for name in _WRAPPERS:
        inner = _parameters(found[name]) if isinstance(found.get(name), Mapping) else None
        if inner is not None:
            return inner[0], f"{name}.{inner[1]}".rstrip(".")
    return None


def _described(found: Mapping[Any, Any]) -> str:
    """What a mapping holds, the mappings in it with their own first keys."""
    parts = []
    for key, value in list(found.items())[:_SHOWN]:
        kind = type(value).__name__
        if isinstance(value, Mapping):
            kind = f"{kind} of {listing(map(str, value)) or 'nothing'}"
        parts.append(f"{key} ({kind})")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(parts) + more


@dataclass(frozen=True)
class Checkpoint:
    """The parameters of a checkpoint.

    Attributes:
        state: tensors by key, without wrappers' prefixes; the head's weight as that of a 1x1 convolution.
        names: the keys as they were.
        shapes: of the tensors that were of another shape.
        dropped: by name, why it is not in ``state``.
        metadata: what ``state_dict()`` knows of the modules' versions, by the modules' names as they were, if anything.
        within: where the parameters were.
    """

    state: dict[str, Tensor]
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dropped: dict[str, str]
    metadata: Mapping[str, Any] | None
    within: str


def read(state_dict: Mapping[str, Any]) -> Checkpoint:
    """The parameters of a checkpoint; nothing is copied, and nothing of it changes.

    Raises:
        ValueError: no DLA network's keys.
        TypeError: not a mapping, or something else than tensors among the parameters.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}")
    found = _parameters(state_dict)
    if found is None:
        raise ValueError(
            f"state_dict: missing {MARKS[0]}, so this is no DLA network, neither itself nor under "
            f"{', '.join(_WRAPPERS)}; found {_described(state_dict) or 'none at all'}"
        )
    parameters, within = found
    result = Checkpoint({}, {}, {}, {}, getattr(parameters, "_metadata", None), within)
    for key, value in parameters.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict: expected names of parameters, got {key!r}")
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict[{key!r}]: expected a Tensor, got {type(value).__name__}")
        name = short(key)
        if name in result.state:
            raise ValueError(f"state_dict: {name!r} is there twice, with different prefixes of {', '.join(_PREFIXES)}")
        if name == "n_averaged":
            result.dropped[key] = "AveragedModel's count, beside the network"
            continue
        if name in ("fc.weight", f"{BASE}fc.weight") and value.dim() == 2:
            result.shapes[name] = tuple(value.shape)
            value = value[:, :, None, None]
        result.state[name], result.names[name] = value, key
    return result
