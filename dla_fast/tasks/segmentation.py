"""Semantic segmentation, as of Cityscapes and CamVid, judged by mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dla_fast._timm import import_timm
from dla_fast.bench import files
from dla_fast.tasks import dense, pictures
from dla_fast.tasks.errors import DataError
from dla_fast.tasks.layouts import labels as layouts
from dla_fast.tasks.options import option
from dla_fast.tasks.task import Data, Evaluation, Session, Task
from dla_fast.tasks.weights import Facts

_WEIGHTS = ("none", "median")


@dataclass(frozen=True)
class Judging(dense.Whole):
    """How segmenters are judged."""

    layout: str = option("cityscapes", "how the folder is laid out", choices=tuple(layouts.LAYOUTS))
    size: int = option(832, "side of a training crop in pixels; evaluation sees whole images", least=32)


@dataclass(frozen=True)
class Segmenting(dense.Cropping):
    """How segmenters are trained; the defaults are the authors' for Cityscapes."""

    layout: str = option("cityscapes", "how the folder is laid out", choices=tuple(layouts.LAYOUTS))
    size: int = option(832, "side of a training crop in pixels", least=32)
    epochs: int = option(500, "passes over the training images", least=1)
    evaluate_every: int = option(10, "epochs between evaluations; the last is always evaluated", least=1)
    class_weights: str = option(
        "none", "of the loss: median frequency over a class's, counted in the training labels", choices=_WEIGHTS
    )


class Segmentation(Task):
    """A class at every pixel of whole images."""

    name, headline, dense = "segmentation", "mIoU", True
    training, evaluation = Segmenting, Judging

    def check(self, options: Any) -> None:
        super().check(options)
        dense.check_window(options)

    def read(self, options: Any, split: str, classes: list[str] | None = None) -> Data:
        layout = layouts.LAYOUTS[options.layout](Path(options.data))
        if classes is not None and classes != layout.classes:
            raise DataError(
                f"{options.data}: its {len(layout.classes)} classes ({', '.join(layout.classes[:4])} ...) are not the "
                f"{len(classes)} that the network was trained on ({', '.join(classes[:4])} ...)"
            )
        pairs = [(image, labels) for image, labels in layout.pairs(split) if labels is not None]
        if not pairs:
            raise DataError(f"{options.data}: the split {split} has no annotations; predict needs none")
        return Data(pairs, layout.classes, layout)

    def training_sample(self, data: Data, options: Any) -> Callable[[int], tuple[Tensor, Any]]:
        augment = dense.augmentation(options)

        def sample(index: int) -> tuple[Tensor, Any]:
            path, where = data.pairs[index]
            labels = data.layout.labels(where)
            return augment(dense.pair(path, labels, where), labels)

        return sample

    def loss(self, data: Data, options: Any, device: torch.device) -> Callable[[Any, Tensor], Tensor]:
        weight = None
        if options.class_weights == "median":
            weight = median_frequency(data, skip=options.broken == "skip").to(device)
        return lambda output, target: dense.loss(output[0].float(), target, weight)

    def evaluate(self, session: Session, data: Data) -> Evaluation:
        import_timm()  # torchmetrics imports torchvision too
        from torchmetrics.classification import MulticlassConfusionMatrix

        count = len(data.classes)
        device = session.processes.device
        metric = MulticlassConfusionMatrix(count, ignore_index=dense.IGNORED).to(device)
        seen = 0

        def labels(index: int) -> Any:
            path, where = data.pairs[index]
            found = data.layout.labels(where)
            dense.pair(path, found, where)
            return found

        for _, _, target, p in dense.whole_images(session, [path for path, _ in data.pairs], labels, "evaluating"):
            seen += 1
            metric.update(p.argmax(0)[None], torch.from_numpy(target)[None].long().to(device))
        images = sum(session.processes.gather([seen]))
        if not images:
            raise DataError("no image could be read")
        union, accuracy = intersection_over_union(metric.compute().double())
        by_class = {name: float(value) for name, value in zip(data.classes, union, strict=True)}
        return Evaluation({"mIoU": float(union.nanmean()), "pixel accuracy": float(accuracy)}, by_class, images)

    def predict(self, session: Session, paths: Sequence[Path], facts: Facts, out: Path) -> list[Path]:
        palette = pictures.palette(facts)
        written, names = [], pictures.stems(paths)
        for index, image, _, p in dense.whole_images(session, paths, lambda index: None, "predicting"):
            labels = p.argmax(0).cpu().numpy().astype(np.uint8)
            for suffix, picture in (
                ("labels", pictures.indexed(labels, palette)),
                ("overlay", pictures.overlay(image, labels, palette, facts.classes)),
            ):
                written.append(out / f"{names[index]}-{suffix}.png")
                files.write(written[-1], picture)
        return written


def intersection_over_union(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union by class, NaN for a class that is nowhere; and the share of pixels that are right.

    Args:
        confusion: (C, C), rows by what is true, columns by what was predicted.
    """
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    return right / union, right.sum() / confusion.sum()


def median_frequency(data: Data, *, skip: bool = False) -> Tensor:
    """Weights that balance classes (C,), float32.

    Eigen and Fergus (Predicting depth, surface normals and semantic labels, ICCV 2015): a class's frequency is its
    share of the pixels of the images that have it, its weight the median of all frequencies over its own; 0 for a
    class that is nowhere.
    """
    count = len(data.classes)
    pixels, among = np.zeros(count), np.zeros(count)
    for _, where in data.pairs:
        try:
            labels = data.layout.labels(where)
        except DataError:
            if not skip:
                raise
            continue
        found = np.bincount(labels.ravel(), minlength=dense.IGNORED + 1)[:count]
        pixels += found
        among += np.where(found > 0, found.sum(), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        frequency = pixels / among
        weight = np.nan_to_num(np.nanmedian(frequency) / frequency, nan=0.0, posinf=0.0)
    return torch.from_numpy(weight).float()
