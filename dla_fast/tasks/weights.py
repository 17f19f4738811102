"""The weights that a run ends with, and all that is needed to use them: one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dla_fast import models
from dla_fast._version import __version__
from dla_fast.bench import files
from dla_fast.models.dense import DLASeg
from dla_fast.tasks import checkpoints
from dla_fast.tasks.errors import TaskError

FILE = "model.safetensors"
_KEY = "dla_fast"
DOWN_RATIO = 2


@dataclass(frozen=True)
class Facts:
    """What a network is for.

    Attributes:
        task: the task's name.
        model: the network's name.
        classes: the names of its outputs.
        options: those that it was trained with.
        metrics: what the evaluation gave.
        epoch: passes over the training images that it had.
        version: of this package.
        palette: colours of the classes, red, green, blue, 0 to 255, where the data set has some.
    """

    task: str
    model: str
    classes: list[str]
    options: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    version: str = __version__
    palette: list[list[int]] | None = None


def network(
    name: str, classes: int, *, dense: bool, memory: str = "default", down_ratio: int = DOWN_RATIO
) -> nn.Module:
    """A network with random weights.

    Args:
        name: one of :func:`dla_fast.models.list_models`. For dense prediction a classification network's name means
            the segmenter that stands on it.
        classes: outputs.
        dense: whether it predicts at every pixel.
        memory: see :func:`dla_fast.models.create_model`.
        down_ratio: of dense prediction, the stride at which classes are scored.

    Raises:
        TaskError: there is no such network, or it classifies images and cannot predict at every pixel.
    """
    try:
        if dense and name in models.list_models(dense=False):
            if f"{name}up" in models.list_models(dense=True):
                name = f"{name}up"
            else:
                base: Any = models.create_model(name, memory=memory, features_only=True)
                return DLASeg(base, classes, down_ratio)
        if not dense and name in models.list_models(dense=True):
            raise TaskError(f"--model {name}: it predicts at every pixel; expected one of {_names(False)}")
        stride = {"down_ratio": down_ratio} if dense else {}
        return models.create_model(name, memory=memory, num_classes=classes, **stride)
    except ValueError as error:
        raise TaskError(f"--model {name}: unknown; expected one of {_names(dense or None)}") from error


def _names(dense: bool | None) -> str:
    return ", ".join(models.list_models(dense))


def start_from(model: nn.Module, source: str) -> str:
    """Load a checkpoint to train from; a head that does not fit stays as it was drawn.

    Returns:
        What was done, in a line.

    Raises:
        TaskError: it cannot be read, or does not fit.
    """
    path = Path(source)
    try:
        report = models.load_pretrained(model, path / FILE if path.is_dir() else source, head="drop")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise TaskError(f"--weights {source}: {error}") from error
    kept = f", {len(report.kept)} drawn anew: {', '.join(list(report.kept)[:3])}" if report.kept else ""
    return f"{report.source}: {len(report.loaded)} tensors loaded{kept}"


def save(run: Path, model: nn.Module, facts: Facts) -> None:
    """Write a run's weights at one stroke."""
    from safetensors.torch import save as as_bytes

    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    files.write(run / FILE, as_bytes(state, {_KEY: json.dumps(asdict(facts))}))


def find(source: Path) -> Path:
    """The file with the weights: itself, or a run's.

    Raises:
        TaskError: there is none.
    """
    path = source / FILE if source.is_dir() else source
    if not path.is_file():
        raise TaskError(f"--weights {source}: there is no {'file ' + FILE if source.is_dir() else 'such file'}")
    return path


def facts_of(path: Path) -> Facts | None:
    """What a file says of its network; None of a checkpoint from elsewhere.

    Raises:
        TaskError: it is damaged.
    """
    if path.suffix != ".safetensors":
        return Facts(**found) if (found := _of_checkpoint(path).get("facts")) else None
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise TaskError(f"{path}: no readable safetensors file: {error}") from error
    return Facts(**json.loads(metadata[_KEY])) if _KEY in metadata else None


def _of_checkpoint(path: Path) -> dict[str, Any]:
    """A run's checkpoint; of any other file nothing."""
    return checkpoints.read(path) if path.name.startswith("step-") else {}


def load(path: Path, facts: Facts, *, dense: bool, device: torch.device) -> nn.Module:
    """The network of a file, in evaluation mode.

    Raises:
        TaskError: the file does not fit.
    """
    model = network(
        facts.model, len(facts.classes), dense=dense, down_ratio=facts.options.get("down_ratio", DOWN_RATIO)
    )
    state = _of_checkpoint(path)
    try:
        if state:
            model.load_state_dict(state["ema"] or state["model"])
        else:
            models.load_pretrained(model, path)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise TaskError(f"--weights {path}: {error}") from error
    return model.to(device).eval()
