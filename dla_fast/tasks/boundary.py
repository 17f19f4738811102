"""Boundary detection, as on BSDS500 and PASCAL: judged by the F-measure of matched pixels (ODS, OIS, AP)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dla_fast.bench import files
from dla_fast.tasks import dense, edge_metrics, edges, loading, pictures
from dla_fast.tasks.errors import DataError
from dla_fast.tasks.layouts import edges as layouts
from dla_fast.tasks.options import option
from dla_fast.tasks.task import Data, Evaluation, Session, Task
from dla_fast.tasks.weights import Facts

_ANNOTATORS = ("random", "majority")


@dataclass(frozen=True)
class Matching:
    """How boundaries are matched with the annotators'."""

    thresholds: int = option(edge_metrics.THRESHOLDS, "thresholds at which boundaries are matched", least=1)
    max_distance: float = option(0.0075, "share of the diagonal that matched pixels may lie apart", above=0)


@dataclass(frozen=True)
class Judging(Matching, dense.Whole):
    """How boundaries are judged."""

    layout: str = option("bsds500", "how the folder is laid out", choices=tuple(layouts.LAYOUTS))
    size: int = option(320, "side of a training crop in pixels; evaluation sees whole images", least=32)


@dataclass(frozen=True)
class Detecting(Matching, dense.Cropping):
    """How boundaries are learnt."""

    layout: str = option("bsds500", "how the folder is laid out", choices=tuple(layouts.LAYOUTS))
    size: int = option(320, "side of a training crop in pixels", least=32)
    epochs: int = option(200, "passes over the training images", least=1)
    evaluate_every: int = option(100, "epochs between evaluations; the last is always evaluated", least=1)
    # One-pixel lines do not survive scaling and turning.
    random_scale: float = option(1.0, "images are scaled by a factor between this and its inverse", least=1)
    random_rotate: float = option(0.0, "degrees by which images are turned, either way", least=0)
    edge_weight: float = option(10.0, "weight of a boundary pixel in the loss; the others have 1", above=0)
    annotators: str = option(
        "random",
        "who is learnt from: one drawn each time; or what half of them mark, and what fewer mark is ignored",
        choices=_ANNOTATORS,
    )


class Boundary(Task):
    """How likely a boundary is at every pixel of whole images."""

    name, headline, dense = "boundary", "ODS", True
    training, evaluation = Detecting, Judging
    classes, plot = ("inside", "boundary"), "precision-recall curve"

    def check(self, options: Any) -> None:
        super().check(options)
        dense.check_window(options)

    def read(self, options: Any, split: str, classes: list[str] | None = None) -> Data:
        layout = layouts.LAYOUTS[options.layout](Path(options.data))
        pairs = [(image, found) for image, found in layout.pairs(split) if found is not None]
        if not pairs:
            raise DataError(f"{options.data}: the split {split} has no annotations; predict needs none")
        return Data(pairs, list(self.classes), layout)

    def training_sample(self, data: Data, options: Any) -> Callable[[int], tuple[Tensor, Any]]:
        augment = dense.augmentation(options)

        def sample(index: int) -> tuple[Tensor, Any]:
            path, where = data.pairs[index]
            annotations = np.stack(data.layout.annotations(where))
            image = dense.pair(path, annotations, where)
            return augment(image, target(annotations, options.annotators))

        return sample

    def loss(self, data: Data, options: Any, device: torch.device) -> Callable[[Any, Tensor], Tensor]:
        weight = torch.tensor([1.0, options.edge_weight], device=device)
        return lambda output, labels: dense.loss(output[0].float(), labels, weight)

    def evaluate(self, session: Session, data: Data) -> Evaluation:
        options = session.options

        def annotations(index: int) -> list[NDArray[np.bool_]]:
            path, where = data.pairs[index]
            found: list[NDArray[np.bool_]] = data.layout.annotations(where)
            dense.pair(path, np.stack(found), where)
            return found

        paths = [path for path, _ in data.pairs]
        counts: list[Future[edge_metrics.Counts]] = []
        # Matching takes longer than the network: it goes on beside it.
        pool = ProcessPoolExecutor(
            max(1, loading.workers_of(options.workers)),
            multiprocessing.get_context("fork"),
            loading.ignore_interrupts,
        )
        try:
            for _, _, found, p in dense.whole_images(session, paths, annotations, "evaluating"):
                probability = p[1].cpu().numpy()
                counts.append(pool.submit(_count, probability, found, options.thresholds, options.max_distance))
            mine = [future.result() for future in session.processes.through(counts, len(counts), "matching")]
        finally:
            pool.shutdown(cancel_futures=True)
        everyone = session.processes.gather(mine)
        if not everyone:
            raise DataError("no image could be read")
        scores = edge_metrics.scores(everyone)
        metrics = {"ODS": scores.ods, "OIS": scores.ois, "AP": scores.ap}
        return Evaluation(metrics, images=len(everyone), plot=edge_metrics.draw(scores, data_title(options)))

    def predict(self, session: Session, paths: Sequence[Path], facts: Facts, out: Path) -> list[Path]:
        written, names = [], pictures.stems(paths)
        for index, image, _, p in dense.whole_images(session, paths, lambda index: None, "predicting"):
            probability = p[1].cpu().numpy()
            thin = edges.suppress(probability)
            for suffix, picture in (
                ("boundaries", pictures.grey(probability)),
                ("thin", pictures.grey(thin)),
                ("overlay", pictures.outlined(image, thin)),
            ):
                written.append(out / f"{names[index]}-{suffix}.png")
                files.write(written[-1], picture)
        return written


def data_title(options: Any) -> str:
    """What a plot of this evaluation is called."""
    return f"Boundaries, {options.layout}: {Path(options.data).name}"


def target(annotations: NDArray[np.bool_], which: str) -> NDArray[np.uint8]:
    """What is learnt from several annotators, (H, W): 1 a boundary, 0 none, 255 ignored.

    Args:
        annotations: (annotators, H, W).
        which: "random" draws one; "majority" is what half of them mark or more, and ignores what fewer mark, as Xie and
            Tu (Holistically-nested edge detection, ICCV 2015) have it.
    """
    if which == "random":
        return annotations[np.random.randint(len(annotations))].astype(np.uint8)
    share = annotations.mean(0)
    return np.where(share >= 0.5, 1, np.where(share > 0, dense.IGNORED, 0)).astype(np.uint8)


def _count(
    probability: NDArray[np.float32], annotations: list[NDArray[np.bool_]], thresholds: int, max_distance: float
) -> edge_metrics.Counts:
    return edge_metrics.count(
        edges.suppress(probability), annotations, thresholds=thresholds, max_distance=max_distance
    )
