"""How good boundaries are: pixels matched with those of each annotator, and the F-measures of the Berkeley benchmark.

Martin, Fowlkes and Malik (Learning to detect natural image boundaries, PAMI 2004); Arbelaez, Maire, Fowlkes and Malik
(Contour detection and hierarchical image segmentation, PAMI 2011).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from dla_fast.tasks.edges import thin

THRESHOLDS = 99
_STEPS = 100
Mask = NDArray[np.bool_]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Pixels of an image at each threshold, arrays of integers; those of several images can be added.

    Attributes:
        matched_truth: of the annotators' pixels, summed over annotators, those that a predicted pixel was found for.
        truth: the annotators' pixels, summed over annotators.
        matched_predicted: predicted pixels that belong to a pixel of any annotator.
        predicted: predicted pixels.
    """

    matched_truth: NDArray[np.int64]
    truth: NDArray[np.int64]
    matched_predicted: NDArray[np.int64]
    predicted: NDArray[np.int64]

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Scores:
    """The benchmark's figures.

    Attributes:
        ods: F-measure at the best threshold for all images together (optimal data set scale).
        ods_threshold: that threshold.
        ods_precision: precision there.
        ods_recall: recall there.
        ois: F-measure with the best threshold for each image (optimal image scale).
        ap: average precision.
        precision: at each threshold.
        recall: at each threshold.
    """

    ods: float
    ods_threshold: float
    ods_precision: float
    ods_recall: float
    ois: float
    ap: float
    precision: Values
    recall: Values


def thresholds(count: int) -> Values:
    """Evenly spaced thresholds between 0 and 1, neither of them included."""
    return np.arange(1, count + 1) / (count + 1)


class _Annotation:
    """An annotator's pixels, numbered, with room around them."""

    def __init__(self, truth: Mask, distance: float) -> None:
        reach = math.floor(distance)
        near = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
        self._offsets = near[:, (near**2).sum(0) <= distance**2]
        self._reach = reach
        self._numbers = np.pad(np.where(truth, truth.cumsum().reshape(truth.shape) - 1, -1), reach, constant_values=-1)
        self.count = int(truth.sum())

    def match(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each predicted pixel the number of the annotator's that it is matched with, or -1."""
        y = rows[:, None] + self._offsets[0] + self._reach
        x = columns[:, None] + self._offsets[1] + self._reach
        numbers = self._numbers[y, x]
        candidate = numbers >= 0
        if not candidate.any():
            return np.full(len(rows), -1, np.int64)
        starts = np.concatenate([[0], candidate.sum(1).cumsum()])
        found = numbers[candidate]
        graph = csr_array((np.ones(len(found), np.int8), found, starts), shape=(len(rows), self.count))
        # The benchmark looks for the cheapest assignment, in which a pixel left alone costs a hundred times the largest
        # distance: so it matches as many as can be. Which of several largest matchings is found decides over the pixels
        # that count for precision, by some tenths of a percent; the cheapest takes four times as long.
        matched: NDArray[np.int64] = maximum_bipartite_matching(graph, perm_type="column")
        return matched


def match(predicted: Mask, truth: Mask, distance: float) -> tuple[Mask, Mask]:
    """Match pixels one to one, as many as can be.

    Args:
        predicted: (H, W).
        truth: (H, W).
        distance: how far matched pixels may lie apart, in pixels.

    Returns:
        Which of the predicted and which of the true pixels are matched, (H, W) each.
    """
    rows, columns = np.nonzero(predicted)
    found = _Annotation(truth, distance).match(rows, columns)
    of_predicted, of_truth = np.zeros_like(predicted, bool), np.zeros_like(truth, bool)
    of_predicted[rows[found >= 0], columns[found >= 0]] = True
    of_truth[tuple(index[found[found >= 0]] for index in np.nonzero(truth))] = True
    return of_predicted, of_truth


def count(
    probability: NDArray[np.floating[Any]],
    annotations: Sequence[Mask],
    *,
    thresholds: int = THRESHOLDS,
    max_distance: float = 0.0075,
) -> Counts:
    """Match an image's boundaries with each annotator's, at each threshold.

    Args:
        probability: (H, W), 0 to 1, after :func:`dla_fast.tasks.edges.suppress`. What passes a threshold is thinned.
        annotations: (H, W) for each annotator.
        thresholds: how many, evenly spaced.
        max_distance: how far matched pixels may lie apart, as a share of the image's diagonal.

    Raises:
        ValueError: an annotation of another size than the map.
    """
    for truth in annotations:
        if np.shape(truth) != np.shape(probability):
            raise ValueError(f"annotations: expected {np.shape(probability)}, as the map's, got {np.shape(truth)}")
    distance = max_distance * math.hypot(*probability.shape)
    people = [_Annotation(np.asarray(truth, bool), distance) for truth in annotations]
    total = sum(person.count for person in people)
    found = np.zeros((4, thresholds), np.int64)
    last: int | None = None
    for place, threshold in enumerate(np.arange(1, thresholds + 1) / (thresholds + 1)):
        over = probability >= threshold
        size = int(over.sum())
        if size == last:  # one set holds the other, so they are the same
            found[:, place] = found[:, place - 1]
            continue
        last = size
        rows, columns = np.nonzero(thin(over))
        matches = [person.match(rows, columns) >= 0 for person in people]
        any_of_them = np.any(matches, axis=0) if matches else np.zeros(len(rows), bool)
        found[:, place] = sum(m.sum() for m in matches), total, any_of_them.sum(), len(rows)
    return Counts(*found)


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Values:
    """A share; 0 of nothing."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)


def _f(precision: NDArray[Any], recall: NDArray[Any]) -> Values:
    return _ratio(2 * np.asarray(precision) * recall, np.asarray(precision) + recall)


def _rates(counts: Counts) -> tuple[Values, Values]:
    """Precision and recall at each threshold."""
    return _ratio(counts.matched_predicted, counts.predicted), _ratio(counts.matched_truth, counts.truth)


def _best(precision: Values, recall: Values) -> tuple[float, float, float, float]:
    """The best F-measure between neighbouring thresholds, with threshold, precision and recall there."""
    at = thresholds(len(precision))
    part = np.linspace(0, 1, _STEPS)[:, None]

    def between(values: Values) -> Values:
        return (values[:-1] * (1 - part) + values[1:] * part).ravel() if len(values) > 1 else values

    p, r, t = between(precision), between(recall), between(at)
    f = _f(p, r)
    best = int(f.argmax())
    return float(f[best]), float(t[best]), float(p[best]), float(r[best])


def _average_precision(precision: Values, recall: Values) -> float:
    """The area under precision over recall, read at 0, 0.01 to 1; 0 where no threshold gives such a recall.

    So the benchmark has it: a detector with one recall at all thresholds, as of a binary map, has next to none.
    """
    # Of thresholds with one recall the most precise.
    order = np.lexsort((precision, recall))
    last = np.append(np.diff(recall[order]) > 0, True)
    r, p = recall[order][last], precision[order][last]
    return float(np.interp(np.linspace(0, 1, 101), r, p, left=0, right=0).sum() * 0.01)


def scores(counts: Sequence[Counts]) -> Scores:
    """The benchmark's figures, from the counts of each image."""
    together, at_best = counts[0], np.zeros(4, np.int64)
    for each in counts[1:]:
        together = together + each
    for each in counts:
        best = int(_f(*_rates(each)).argmax())
        at_best += [each.matched_truth[best], each.truth[best], each.matched_predicted[best], each.predicted[best]]
    precision, recall = _rates(together)
    ods, threshold, p, r = _best(precision, recall)
    ois = float(_f(_ratio(at_best[2:3], at_best[3:4]), _ratio(at_best[0:1], at_best[1:2]))[0])
    return Scores(ods, threshold, p, r, ois, _average_precision(precision, recall), precision, recall)


def draw(found: Scores, title: str) -> bytes:
    """Precision over recall with lines of equal F-measure, a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5.2), layout="constrained")
    axes = figure.subplots()
    for f in np.arange(1, 10) / 10:
        recall = np.linspace(f / (2 - f), 1, 400)
        axes.plot(recall, f * recall / (2 * recall - f), color="0.85", linewidth=0.8, zorder=1)
        axes.annotate(f"F = {f:.1f}", (1, f / (2 - f)), (3, 0), "data", "offset points", color="0.6", fontsize=7,
                      va="center", annotation_clip=False)  # fmt: skip
    label = f"ODS {found.ods:.3f}, OIS {found.ois:.3f}, AP {found.ap:.3f}"
    some = found.recall > 0
    axes.plot(found.recall[some], found.precision[some], color="#c0392b", linewidth=2, label=label, zorder=2)
    best = f"threshold {found.ods_threshold:.2f}: P {found.ods_precision:.3f}, R {found.ods_recall:.3f}"
    axes.plot([found.ods_recall], [found.ods_precision], "o", color="#2c3e50", label=best, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="recall", ylabel="precision", title=title, aspect="equal")
    axes.legend(loc="lower left", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
