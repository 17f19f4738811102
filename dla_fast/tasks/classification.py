"""Classification of images, as on ImageNet, and fine-grained recognition, as of birds and cars."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_fast._timm import import_timm
from dla_fast.bench import files
from dla_fast.tasks import loading, options, pictures
from dla_fast.tasks.errors import DataError, TaskError
from dla_fast.tasks.layouts import classes as layouts
from dla_fast.tasks.options import option
from dla_fast.tasks.task import MEAN, STD, Data, Evaluation, Session, Task
from dla_fast.tasks.weights import Facts


@dataclass(frozen=True)
class Crops:
    """What an evaluation sees of an image."""

    crops: int = option(1, "crops that are averaged: 1, the middle, or 10, with corners and mirrored twins", least=1)
    resize: float = option(0.875, "share of the shorter side that a crop takes in evaluation", above=0)


@dataclass(frozen=True)
class Judging(Crops, options.Running, options.Data):
    """How classifiers are judged."""

    layout: str = option("folder", "how the folder is laid out", choices=tuple(layouts.LAYOUTS))
    batch: int = option(256, "images at once", least=1)


@dataclass(frozen=True)
class Classifying(Crops, options.Training):
    """How classifiers are trained; the defaults are the paper's for ImageNet."""

    layout: str = option("folder", "how the folder is laid out", choices=tuple(layouts.LAYOUTS))
    smoothing: float = option(0.0, "label smoothing", least=0)
    hflip: float = option(0.5, "probability of a mirrored image", least=0)
    crop_scale: float = option(0.08, "smallest share of an image's area that a training crop takes", above=0)
    color_jitter: float = option(0.4, "changes of brightness, contrast and saturation", least=0)
    auto_augment: str | None = option(None, "a policy of timm's, as rand-m9-mstd0.5 (default: none)")
    erasing: float = option(0.0, "probability that a part is erased", least=0)


@dataclass(frozen=True)
class FineGrained(Classifying):
    """How fine-grained recognition is trained: from weights for ImageNet, at 448 pixels, with a head of its own."""

    layout: str = option("cub200", "how the folder is laid out", choices=tuple(layouts.LAYOUTS))
    size: int = option(448, "side of the images that the network sees in training, in pixels", least=32)
    epochs: int = option(110, "passes over the training images", least=1)
    batch: int = option(32, "images in a step", least=1)
    lr: float = option(0.01, "learning rate", above=0)
    schedule: str = option("cosine", "of the learning rate", choices=("cosine", "poly", "step", "constant"))
    crop_scale: float = option(0.25, "smallest share of an image's area that a training crop takes", above=0)


@dataclass(frozen=True)
class FineJudging(Judging):
    """How fine-grained recognition is judged."""

    layout: str = option("cub200", "how the folder is laid out", choices=tuple(layouts.LAYOUTS))
    size: int = option(448, "side of a crop in pixels", least=32)
    batch: int = option(32, "images at once", least=1)


class Classification(Task):
    """One class an image, judged by top-1 and top-5 accuracy."""

    name, headline, dense = "classification", "top-1", False
    training: type[options.Training] = Classifying
    evaluation: type = Judging

    def check(self, options: Any) -> None:
        super().check(options)
        if options.crops not in (1, 10):
            raise TaskError(f"--crops {options.crops}: expected 1 or 10")
        # The first halving rounds up, so one pixel less goes as well.
        if options.size % 32 and (options.size + 1) % 32:
            raise TaskError(
                f"--size {options.size}: expected a multiple of 32, the stride of the last level, or one less"
            )

    def read(self, options: Any, split: str, classes: list[str] | None = None) -> Data:
        found = layouts.LAYOUTS[options.layout](Path(options.data), split)
        if classes is None or classes == found.classes:
            return Data(found.samples, found.classes)
        unknown = [name for name in found.classes if name not in classes]
        if unknown:
            raise DataError(
                f"{options.data}: {len(unknown)} of {len(found.classes)} classes are none of the {len(classes)} that "
                f"the network was trained on: {', '.join(unknown[:5])}"
            )
        place = [classes.index(name) for name in found.classes]
        return Data([(path, place[label]) for path, label in found.samples], classes)

    def training_sample(self, data: Data, options: Any) -> Callable[[int], tuple[Tensor, Any]]:
        import_timm()
        from timm.data import create_transform

        try:
            transform = create_transform(
                options.size,
                is_training=True,
                scale=(options.crop_scale, 1.0),
                hflip=options.hflip,
                color_jitter=options.color_jitter,
                auto_augment=options.auto_augment,
                re_prob=options.erasing,
                interpolation="bilinear",
                mean=MEAN,
                std=STD,
            )
        # Of policies timm's own parser says what it likes.
        except Exception as error:
            raise TaskError(f"--auto-augment {options.auto_augment}: timm does not take it: {error}") from error
        return lambda index: (transform(loading.open_image(data.pairs[index][0])), data.pairs[index][1])

    def loss(self, data: Data, options: Any, device: torch.device) -> Callable[[Any, Tensor], Tensor]:
        return lambda logits, target: F.cross_entropy(logits, target, label_smoothing=options.smoothing)

    def evaluate(self, session: Session, data: Data) -> Evaluation:
        import_timm()  # torchmetrics imports torchvision too
        from torchmetrics.classification import MulticlassAccuracy

        count = len(data.classes)
        device = session.processes.device
        top = {f"top-{k}": MulticlassAccuracy(count, top_k=k, average="micro").to(device) for k in (1, 5) if k <= count}
        each = MulticlassAccuracy(count, average="none").to(device)
        seen = 0
        for scores, labels in self._scores(session, [path for path, _ in data.pairs], [c for _, c in data.pairs]):
            seen += len(labels)
            for metric in (*top.values(), each):
                metric.update(scores, labels.to(device))
        images = sum(session.processes.gather([seen]))
        if not images:
            raise DataError("no image could be read")
        # They gather what the processes have counted.
        found = {name: float(metric.compute()) for name, metric in top.items()}
        return Evaluation(found, dict(zip(data.classes, each.compute().tolist(), strict=True)), images)

    def _scores(
        self, session: Session, paths: Sequence[Path], labels: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Probabilities (n, classes) averaged over crops, and what was given with each image; of this process's."""
        import_timm()
        from torchvision import transforms

        options = session.options
        side = round(options.size / options.resize)
        crop: Any = transforms.CenterCrop(options.size) if options.crops == 1 else transforms.TenCrop(options.size)
        resize = transforms.Resize(side)
        finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

        def load(index: int) -> tuple[Tensor, int]:
            crops = crop(resize(loading.open_image(paths[index])))
            return torch.stack([finish(c) for c in (crops if options.crops > 1 else [crops])]), labels[index]

        batches = loading.Batches(
            len(paths), options.batch, rank=session.processes.rank, processes=session.processes.count
        )
        loader = loading.loader(
            loading.Samples(len(paths), load),
            batches,
            workers=loading.workers_of(options.workers),
            pin=session.processes.device.type == "cuda",
            stack=True,
        )
        for loaded in session.processes.through(loader, len(batches), "evaluating"):
            session.failures.see(loaded.failures)
            if loaded.items is None:
                continue
            crops, targets = loaded.items
            logits = session(crops.flatten(0, 1))
            scores = logits.float().softmax(1).view(*crops.shape[:2], -1).mean(1)
            yield scores, targets

    def predict(self, session: Session, paths: Sequence[Path], facts: Facts, out: Path) -> list[Path]:
        classes = facts.classes
        shown: list[tuple[Path, list[tuple[str, float]]]] = []
        for scores, places in self._scores(session, paths, range(len(paths))):
            top = scores.cpu().topk(min(5, len(classes)))
            for place, values, found in zip(places.tolist(), *top, strict=True):
                names = [classes[i] for i in found.tolist()]
                shown.append((paths[place], list(zip(names, values.tolist(), strict=True))))
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["image", *(f"{what} {k + 1}" for k in range(min(5, len(classes))) for what in ("class", "p"))])
        for path, best in shown:
            writer.writerow([path, *(cell for name, p in best for cell in (name, f"{p:.4f}"))])
        written = [out / "predictions.csv"]
        files.write(written[0], table.getvalue())
        for number, sheet in enumerate(pictures.contact_sheets(shown), 1):
            written.append(out / f"predictions-{number}.png")
            files.write(written[-1], sheet)
        return written


class FineGrainedRecognition(Classification):
    """Classification of kinds that look alike."""

    name = "fine-grained"
    training, evaluation = FineGrained, FineJudging
