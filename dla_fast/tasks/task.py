"""What a task is: its data, its loss, how its networks are judged and what they predict."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast.tasks.errors import TaskError
from dla_fast.tasks.loading import Failures
from dla_fast.tasks.options import Training
from dla_fast.tasks.processes import Processes
from dla_fast.tasks.weights import Facts

# Normalisation of the networks' images, that of ImageNet's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Data:
    """A split of a data set.

    Attributes:
        pairs: an image, and what belongs to it: a class, or a file of annotations.
        classes: names of the classes, in the order of the network's outputs.
        layout: the object that reads annotations, where they are files.
    """

    pairs: Sequence[tuple[Path, Any]]
    classes: list[str]
    layout: Any = None

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass
class Evaluation:
    """How good a network is.

    Attributes:
        metrics: by name, between 0 and 1; the first is the one that is meant where one is.
        classes: the same by class, where there is such a thing.
        images: how many it was judged on.
        plot: a picture of it, PNG.
    """

    metrics: dict[str, float]
    classes: dict[str, float] = field(default_factory=dict)
    images: int = 0
    plot: bytes | None = None


def autocast(options: Any, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a network runs in."""
    if options.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, options.amp))


def memory_format(options: Any) -> torch.memory_format:
    """Of a network and its images."""
    return torch.channels_last if options.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Session:
    """What evaluation and prediction run with.

    Attributes:
        model: in evaluation mode, on its device.
        processes: those that share the work.
        options: of the task's evaluation.
        failures: what could not be read.
    """

    model: nn.Module
    processes: Processes
    options: Any
    failures: Failures

    def __call__(self, images: Tensor) -> Any:
        """What the network says of a batch."""
        with autocast(self.options, self.processes.device):
            return self.model(self.images(images))

    def images(self, images: Tensor) -> Tensor:
        """A batch where the network is, in its memory format."""
        device = self.processes.device
        return images.to(device, non_blocking=True).contiguous(memory_format=memory_format(self.options))


class Task(abc.ABC):
    """One of the paper's tasks.

    Attributes:
        name: on the command line.
        headline: the metric that is meant where one is.
        dense: its networks predict at every pixel.
        training: the class of its options of training.
        evaluation: the class of its options of evaluation and prediction.
        classes: the names of its networks' outputs, where no data set says them.
        plot: what the picture of an evaluation shows, where there is one.
    """

    name: str
    headline: str
    dense: bool
    training: type[Training]
    evaluation: type
    classes: tuple[str, ...] = ()
    plot: str | None = None

    def check(self, options: Any) -> None:
        """Look at the options of training or evaluation together, before anything long.

        Raises:
            TaskError: they do not go together.
        """
        if not options.data:
            raise TaskError("--data has to be given: the folder of the data set")

    @abc.abstractmethod
    def read(self, options: Any, split: str, classes: list[str] | None = None) -> Data:
        """A split of the data set.

        Args:
            options: with ``data`` and ``layout``.
            split: "train", "val" or "test".
            classes: those of a trained network; the data set's have to be among them.

        Raises:
            DataError: it is not there, or not what it should be.
        """

    @abc.abstractmethod
    def training_sample(self, data: Data, options: Any) -> Callable[[int], tuple[Tensor, Any]]:
        """What gives an image (3, size, size) and its target, augmented."""

    @abc.abstractmethod
    def loss(self, data: Data, options: Any, device: torch.device) -> Callable[[Any, Tensor], Tensor]:
        """The loss of the network's output and targets."""

    @abc.abstractmethod
    def evaluate(self, session: Session, data: Data) -> Evaluation:
        """Judge a network on a split."""

    @abc.abstractmethod
    def predict(self, session: Session, paths: Sequence[Path], facts: Facts, out: Path) -> list[Path]:
        """Write pictures, and tables where there are any, of what a network sees in images.

        Returns:
            The files written.
        """
