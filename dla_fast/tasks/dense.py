"""What segmentation and boundary detection share: crops for training, and whole images through a network in parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dla_fast._timm import import_timm
from dla_fast.tasks import loading, options
from dla_fast.tasks.errors import DataError, TaskError
from dla_fast.tasks.options import option
from dla_fast.tasks.task import MEAN, STD, Session
from dla_fast.tasks.weights import DOWN_RATIO

IGNORED = 255
STRIDE = 32


@dataclass(frozen=True)
class Seeing:
    """How an evaluation sees whole images."""

    scales: tuple[float, ...] = option((1.0,), "sizes of the image whose probabilities are averaged", above=0)
    flip: bool = option(False, "average with the mirrored image")
    window: int = option(0, "side of a window that slides over the image, in pixels; 0 for the whole at once", least=0)


@dataclass(frozen=True)
class Whole(Seeing, options.Running, options.Data):
    """How networks are evaluated and used."""

    batch: int = option(4, "windows at once", least=1)


@dataclass(frozen=True)
class Cropping(Seeing, options.Training):
    """How networks are trained on parts of images."""

    model: str = option("dla34up", "a network of list_models(); one that classifies gets a ladder and a head")
    batch: int = option(16, "crops in a step", least=1)
    lr: float = option(0.01, "learning rate", above=0)
    schedule: str = option("poly", "of the learning rate", choices=("cosine", "poly", "step", "constant"))
    down_ratio: int = option(DOWN_RATIO, "stride at which the network scores classes: 2, 4, 8 or 16", least=2)
    random_scale: float = option(2.0, "images are scaled by a factor between this and its inverse", least=1)
    random_rotate: float = option(10.0, "degrees by which images are turned, either way", least=0)
    hflip: float = option(0.5, "probability of a mirrored image", least=0)
    color_jitter: float = option(0.4, "changes of brightness, contrast and saturation", least=0)


def check_window(options: Any) -> None:
    """Whether the sizes fit the network's stride.

    Raises:
        TaskError: they do not.
    """
    for name in ("size", "window"):
        if (value := getattr(options, name)) % STRIDE:
            raise TaskError(f"--{name} {value}: expected a multiple of {STRIDE}, the stride of the last level")
    if (ratio := getattr(options, "down_ratio", DOWN_RATIO)) not in (2, 4, 8, 16):
        raise TaskError(f"--down-ratio {ratio}: expected 2, 4, 8 or 16")


def pair(path: Path, annotation: NDArray[Any], where: Path | None) -> Any:
    """An image, and what was said of it, of the same size.

    Raises:
        DataError: the sizes differ, or the image cannot be read.
    """
    image = loading.open_image(path)
    if image.size != (annotation.shape[-1], annotation.shape[-2]):
        raise DataError(
            f"{where}: it is {annotation.shape[-1]}x{annotation.shape[-2]}, "
            f"the image {path} {image.width}x{image.height}"
        )
    return image


def augmentation(options: Any) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
    """What gives a crop (3, size, size) of a PIL image and one of its labels (size, size), changed alike."""
    import_timm()
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size, jitter = options.size, options.color_jitter
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
    steps = [
        v2.RandomRotation(options.random_rotate, fill=fill) if options.random_rotate else None,
        v2.RandomCrop(size, pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(options.hflip),
        v2.ColorJitter(jitter, jitter, jitter) if jitter else None,
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    transform = v2.Compose([step for step in steps if step is not None])

    def augment(image: Any, labels: NDArray[Any]) -> tuple[Tensor, Tensor]:
        crop = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        mask = tv_tensors.Mask(torch.from_numpy(labels)[None])
        if options.random_scale > 1:
            factor = options.random_scale ** random.uniform(-1, 1)
            sides = [max(1, round(side * factor)) for side in labels.shape]
            crop, mask = (v2.functional.resize(each, sides, antialias=True) for each in (crop, mask))
        crop, mask = transform(crop, mask)
        return torch.Tensor(crop), mask.as_subclass(torch.Tensor)[0].long()

    return augment


def loss(log_probabilities: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    """Cross-entropy of the pixels that are not ignored, a weighted mean; zero where all are.

    Args:
        log_probabilities: (N, C, H, W).
        labels: (N, H, W), :data:`IGNORED` where nothing is said.
        weight: of each class, (C,).
    """
    weight = torch.ones_like(log_probabilities[0, :, 0, 0]) if weight is None else weight.to(log_probabilities.dtype)
    total = F.nll_loss(log_probabilities, labels, weight, ignore_index=IGNORED, reduction="sum")
    seen = labels != IGNORED
    return total / (weight[labels.where(seen, 0)] * seen).sum().clamp_min(torch.finfo(total.dtype).tiny)


def _padded(images: Tensor) -> Tensor:
    """Images up to the next multiple of the stride, their border repeated."""
    height, width = images.shape[2:]
    return F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin that overlap by a third or more and end with the image."""
    if length <= window:
        return [0]
    count = -(-(length - window) // (window * 2 // 3)) + 1
    return np.linspace(0, length - window, count).round().astype(int).tolist()


def probabilities(session: Session, image: Tensor) -> Tensor:
    """Probabilities at every pixel, averaged over scales, mirrored twins and overlapping windows.

    Args:
        session: with ``scales``, ``flip``, ``window`` and ``batch`` among its options.
        image: normalised, (3, H, W).

    Returns:
        (C, H, W), float32, on the network's device.
    """
    options = session.options
    image = session.images(image[None])
    height, width = image.shape[2:]
    total = torch.zeros((), device=image.device)
    for scale in options.scales:
        sides = max(1, round(height * scale)), max(1, round(width * scale))
        scaled = image if scale == 1 else F.interpolate(image, sides, mode="bilinear", antialias=True)
        for mirrored in (False, True) if options.flip else (False,):
            found = _over_windows(session, scaled.flip(3) if mirrored else scaled)
            found = found.flip(3) if mirrored else found
            if scale != 1:
                found = F.interpolate(found, (height, width), mode="bilinear", antialias=True)
            total = total + found
    return (total / (len(options.scales) * (2 if options.flip else 1)))[0]


def _over_windows(session: Session, image: Tensor) -> Tensor:
    """Probabilities (1, C, H, W) of an image (1, 3, H, W)."""
    height, width = image.shape[2:]
    window = session.options.window
    if not window or max(height, width) <= window:
        return _network(session, _padded(image))[:, :, :height, :width]
    padded = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)), mode="replicate")
    corners = [(y, x) for y in _starts(padded.shape[2], window) for x in _starts(padded.shape[3], window)]
    total, times = None, torch.zeros(padded.shape[2:], device=image.device)
    for first in range(0, len(corners), session.options.batch):
        part = corners[first : first + session.options.batch]
        found = _network(session, torch.cat([padded[:, :, y : y + window, x : x + window] for y, x in part]))
        if total is None:
            total = found.new_zeros(1, found.shape[1], *padded.shape[2:])
        for (y, x), each in zip(part, found, strict=True):
            total[0, :, y : y + window, x : x + window] += each
            times[y : y + window, x : x + window] += 1
    assert total is not None
    return (total / times)[:, :, :height, :width]


def _network(session: Session, images: Tensor) -> Tensor:
    log_probabilities, _ = session(images)
    return log_probabilities.float().exp()


def whole_images(
    session: Session, paths: Sequence[Path], annotation: Callable[[int], Any], what: str
) -> Iterator[tuple[int, Any, Any, Tensor]]:
    """This process's part of images, each through the network by itself.

    Args:
        session: what runs.
        paths: the images.
        annotation: gives what belongs to an image by its place, or None; in a worker process.
        what: for the progress bar.

    Yields:
        The place, the PIL image, the annotation, and the probabilities (C, H, W).
    """

    def load(index: int) -> tuple[int, Any, Any]:
        return index, loading.open_image(paths[index]), annotation(index)

    batches = loading.Batches(len(paths), 1, rank=session.processes.rank, processes=session.processes.count)
    loader = loading.loader(
        loading.Samples(len(paths), load), batches, workers=loading.workers_of(session.options.workers), stack=False
    )
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for loaded in session.processes.through(loader, len(batches), what):
        session.failures.see(loaded.failures)
        for index, image, found in loaded.items:
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
            yield index, image, found, probabilities(session, (pixels - mean) / std)
