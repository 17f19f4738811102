"""Weights from a file or from the web into a model, whatever layout each has."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

from dla_fast.models import download
from dla_fast.models.checkpoint import MARKS, Checkpoint, listing, read, short
from dla_fast.models.layouts import ALL, Layout, Report, convert, deep_trees, is_unused, part_of, prefix_of

# The original authors' files for ImageNet, <name>-<hash>.pth: the first digits of each one's SHA-256.
PUBLISHED = {
    "dla34": "ba72cf86",
    "dla46_c": "2bfd52c3",
    "dla46x_c": "d761bae7",
    "dla60x_c": "b870c45c",
    "dla60": "24839fc4",
    "dla60x": "d15cacda",
    "dla102": "d94d9790",
    "dla102x": "ad62be81",
    "dla102x2": "262837b6",
    "dla169": "0914e092",
}
_HEADS = ("error", "drop")
_HASH = re.compile(r"[0-9a-fA-F]{8,64}")
_COUNTER = ".num_batches_tracked"


@dataclass
class LoadReport(Report):
    """What :func:`load_pretrained` did; the checkpoint's keys are the old ones, the model's the new.

    Attributes:
        source: the file.
        loaded: the model's keys that have the checkpoint's values now.
        kept: the model's keys that have their own values still, each with the reason.
    """

    source: str = ""
    loaded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = f"{self.source}: {len(self.loaded)} loaded, {len(self.kept)} kept, {len(self.dropped)} dropped"
        return "\n".join([counts, *self.lines(), *(f"kept {key}: {why}" for key, why in self.kept.items())])


def load_pretrained(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    head: str = "error",
    sha256: str | bool = True,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LoadReport:
    """Load a checkpoint into a DLA network: all of it, or, where anything does not fit, nothing.

    The checkpoint may have any layout and anything around it that :func:`dla_fast.convert_state_dict` knows. So may the
    model: of this package, timm's, the original's, a detector; swapped, compiled, under DataParallel. It may be a
    classification network's for the network under a detector or a segmenter, and the other way round. Of a file nothing
    but tensors and plain containers is read (``weights_only``).

    Args:
        model: the network; its parameters' dtypes, devices and memory formats stay.
        source: a file (``.safetensors`` with that package, else as ``torch.save`` writes it), a URL of http or https,
            or the name of a network whose published file, as ``dla34-ba72cf86.pth``, lies in ``folder``.
        head: what is past the network and its neck (``fc``, a segmenter's scores, a detector's heads), and a neck of
            which the checkpoint has nothing, have to fit as well ("error"), or stay the model's own where they do not
            ("drop"). What only the checkpoint has is left out.
        sha256: True compares a fetched file with the digits in its name, as in ``model-0a1b2c3d.pth``, and a published
            file with its hash; a string of 8 to 64 digits is what any file is compared with; False compares nothing.
        folder: where files from the web are kept; None for torch.hub's ``checkpoints``.
        progress: a bar while a file is fetched. What broke off goes on at the next call.

    Returns:
        What was loaded, renamed, dropped and kept, by key; ``print(report)`` shows it.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be fetched; the message says where to put it by hand.
        ValueError: another hash, no checkpoint, no DLA network, keys or shapes that do not fit, or an option.
        ImportError: a ``.safetensors`` file without safetensors.
    """
    if head not in _HEADS:
        raise ValueError(f"head: expected 'error' or 'drop', got {head!r}")
    if isinstance(sha256, str) and not _HASH.fullmatch(sha256):
        raise ValueError(f"sha256: expected 8 to 64 hexadecimal digits, True or False, got {sha256!r}")
    # An AveragedModel's count is no network's, here as in checkpoints.
    own = {key: value for key, value in model.state_dict().items() if short(key) != "n_averaged"}
    if not {short(key) for key in own} & set(MARKS):
        part = next((key.removesuffix(f".{MARKS[0]}") for key in own if key.endswith(f".{MARKS[0]}")), None)
        hint = f"; model.{part} is one" if part is not None else ""
        raise ValueError(f"model: expected a DLA network, with a parameter {' or '.join(MARKS)}{hint}")
    if any(value.is_meta for value in own.values() if isinstance(value, Tensor)):
        raise ValueError("model: its parameters are on the meta device; model.to_empty(device=...) gives them memory")
    path = _located(source, sha256, Path(folder).expanduser() if folder is not None else None, progress)
    # What came without a hash may have come in part, and is in the cache now.
    again = "; delete it, and the next call fetches it" if str(source).startswith(("http://", "https://")) else ""
    try:
        contents = _contents(path)
        again = ""
        state, report = _fitted(read(contents), own, head)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}{again}") from error
    report.source = str(path)
    # A plain dict: with the modules' versions batch norms would ask for counters that old checkpoints lack.
    model.load_state_dict(state, strict=False)
    return report


def _located(source: str | os.PathLike[str], sha256: str | bool, folder: Path | None, progress: bool) -> Path:
    """The file, fetched where it is on the web, and compared with its hash."""
    folder = Path(torch.hub.get_dir()) / "checkpoints" if folder is None else folder
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: expected a path, a URL or a name, got {type(source).__name__}")
    text = os.fspath(source)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme in ("http", "https"):
        name = Path(urlsplit(text).path).name
        expected = sha256 if isinstance(sha256, str) else download.hash_in_name(name) if sha256 else None
        return download.fetch(text, folder, expected=expected, progress=progress)
    if scheme not in ("", "file"):
        raise ValueError(f"source: expected a path or a URL of http or https, got {text}")
    path = Path(url2pathname(urlsplit(text).path) if scheme else text).expanduser()
    if text in PUBLISHED:
        path = folder / f"{text}-{PUBLISHED[text]}.pth"
        if not path.exists():
            raise FileNotFoundError(
                f"{text}: its published file is not at {path}; put it there, or give the URL of {path.name} instead"
            )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a folder, no file' if path.is_dir() else 'no such file'}")
    # The name of a file of one's own may end in a date that looks like a hash.
    published = path.name in {f"{name}-{digits}.pth" for name, digits in PUBLISHED.items()}
    expected = sha256 if isinstance(sha256, str) else download.hash_in_name(path.name) if sha256 and published else None
    if expected is not None:
        download.check_hash(path, expected, remove=False)
    return path


def _contents(path: Path) -> Mapping[str, Any]:
    """What is in a file.

    Raises:
        ValueError: it is none that can be read, or holds more than tensors and plain containers.
        ImportError: it needs safetensors.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{path}: safetensors is not installed: pip install safetensors") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"truncated, or no safetensors file: {error}") from error
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError("an empty file")
    try:
        found: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # Truncated files raise whatever the reader trips over.
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused is not None:
            raise ValueError(
                f"it holds {refused[1]}, and nothing but tensors and plain containers is read; save the state_dict() "
                "alone, or, if you trust the file, name that class in torch.serialization.safe_globals"
            ) from error
        what = "a web page, not a checkpoint" if download.is_page(start) else "truncated, or no checkpoint"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # torch's advice is to read the file without weights_only, whatever it is.
        if reason.startswith("Weights only load failed"):
            reason = "torch.save writes other files"
        raise ValueError(f"{what}: {reason}") from error
    return found


def _group(key: str, *prefixes: str) -> tuple[str, str]:
    """What has to fit together: the part, and which of it: of a neck the ladder, of a detector the head."""
    part = next(filter(None, (part_of(key, prefix) for prefix in prefixes)), "network")
    return part, key.partition(".")[0] if part in ("neck", "heads") else {"head": "fc"}.get(part, part)


def _fitted(found: Checkpoint, own: Mapping[str, Tensor], head: str) -> tuple[dict[str, Tensor], LoadReport]:
    """What to load, by the model's own keys, and the report.

    Raises:
        ValueError: something does not fit.
    """
    names = {short(key): key for key in own}
    prefix, deep = prefix_of(names), deep_trees(names)
    unused = any(is_unused(key, deep) for key in names)
    converted = convert(found, Layout(prefix, ALL, unused), "the model", "keep")
    report = LoadReport(**vars(converted.report))
    old_of = {new: old for old, new in report.renamed.items()}
    prefix_there = prefix_of(found.state)
    groups: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for side, keys in enumerate((list(names), list(converted))):
        for key in keys:
            # Counters are younger than the published checkpoints, and norms that are frozen have none.
            if not key.endswith(_COUNTER):
                groups.setdefault(_group(key, prefix, prefix_there), ([], []))[side].append(key)
    wrong: dict[str, str] = {}
    way = head == "error"
    for (part, name), (ours, theirs) in groups.items():
        differences = _differences(ours, theirs, {key: own[names[key]] for key in ours}, converted)
        may_stay = part not in ("network", "neck") or (part == "neck" and not theirs)
        if part != "network" and not ours:
            report.dropped |= {old_of.get(key, key): f"the model has no {name}" for key in theirs}
        elif differences and may_stay and head == "drop":
            report.kept |= {names[key]: f"{name}: {differences}" for key in ours}
            report.dropped |= {old_of.get(key, key): f"the model's own {name} stays" for key in theirs}
        elif differences:
            wrong[name] = differences
            way = way and may_stay
    if wrong:
        said = "; ".join(f"{name}: {text}" for name, text in wrong.items())
        said += "; with head='drop' the model's own values stay there" if way else ""
        raise ValueError(f"does not fit the model: {said}")
    state = {}
    for key, value in converted.items():
        if key in names and names[key] not in report.kept:
            state[names[key]] = _shaped(value, own[names[key]])
    report.loaded = list(state)
    report.kept |= {k: "the checkpoint has no counter" for k in own if k not in state and k not in report.kept}
    report.renamed = {
        old: names[key] for key in converted if names.get(key) in state and (old := old_of.get(key, key)) != names[key]
    }
    report.added = {names[key]: source for key, source in report.added.items() if names.get(key) in state}
    return state, report


def _shaped(value: Tensor, own: Tensor) -> Tensor:
    """``value`` as a linear layer's weight, where the model has one for a 1x1 convolution."""
    return value.flatten(1) if own.dim() == 2 and value.shape == (*own.shape, 1, 1) else value


def _differences(
    ours: list[str], theirs: list[str], own: Mapping[str, Tensor], converted: Mapping[str, Tensor]
) -> str | None:
    """What does not fit of a group, in words."""
    missing = [key for key in ours if key not in converted]
    unexpected = [key for key in theirs if key not in own]
    shapes = [
        f"{key} {tuple(converted[key].shape)} where the model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in converted and _shaped(converted[key], value).shape != value.shape
    ]
    parts = [f"the checkpoint lacks {listing(missing)}"] if missing else []
    parts += [f"the model lacks {listing(unexpected)}"] if unexpected else []
    parts += [f"the checkpoint has {listing(shapes, 3)}"] if shapes else []
    return "; ".join(parts) or None
