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
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow
from scipy.spatial import cKDTree

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


def _candidates(predicted: Mask, truth: Mask, distance: float) -> Any:
    """Which pixels may be matched: a sparse matrix of predicted pixels by true ones, in the order of the rows."""
    pixels, others = np.argwhere(predicted), np.argwhere(truth)
    # A hair more, so that rounding does not decide over pixels that are exactly so far apart.
    reach = distance * (1 + 1e-9)
    pairs = cKDTree(pixels).sparse_distance_matrix(cKDTree(others), reach, output_type="ndarray")
    ones = np.ones(len(pairs), np.int32)
    return coo_array((ones, (pairs["i"], pairs["j"])), shape=(len(pixels), len(others))).tocsr()


def _assign(candidates: Any) -> NDArray[np.int64]:
    """For each row the column that it is matched with, or -1."""
    # The benchmark looks for the cheapest assignment, in which a pixel left alone costs a hundred times the largest
    # distance: so it matches as many as can be, which is a maximum flow from the rows to the columns. Which of several
    # largest matchings is found decides over the pixels that count for precision, by some tenths of a percent; the
    # cheapest takes ten times as long. SciPy's maximum_bipartite_matching (1.17 and before) takes exponential time
    # on the bands of candidates along a line (scipy issue 26147) and does not end on an image of BSDS500's size.
    rows, columns = candidates.shape
    source = np.arange(1, rows + 1)
    sink = np.full(columns, rows + columns + 1)
    indices = np.concatenate([source, candidates.indices + rows + 1, sink]).astype(np.int32)
    ends = rows + candidates.nnz + np.arange(1, columns + 1)
    starts = np.concatenate([[0], candidates.indptr + rows, ends, ends[-1:]]).astype(np.int32)
    matched = np.full(rows, -1, np.int64)
    if candidates.nnz:
        graph = csr_array((np.ones(len(indices), np.int32), indices, starts), shape=(rows + columns + 2,) * 2)
        flow = maximum_flow(graph, 0, rows + columns + 1, method="dinic").flow[1 : rows + 1].tocoo()
        used = flow.data > 0
        matched[flow.row[used]] = flow.col[used] - rows - 1
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
    found = _assign(_candidates(predicted, truth, distance))
    of_predicted, of_truth = np.zeros_like(predicted, bool), np.zeros_like(truth, bool)
    of_predicted[predicted] = found >= 0
    matched = np.zeros(np.count_nonzero(truth), bool)
    matched[found[found >= 0]] = True
    of_truth[truth] = matched
    return of_predicted, of_truth


class _Annotator:
    """Matches pixels of a map, numbered, with an annotator's, and remembers the last that it was asked for."""

    def __init__(self, pixels: Mask, truth: Mask, distance: float) -> None:
        self._candidates = _candidates(pixels, truth, distance)
        self._near = np.diff(self._candidates.indptr) > 0
        self._asked = self._matched = np.zeros(0, np.int64)

    def match(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the pixels that are matched."""
        asked = numbers[self._near[numbers]]
        if not np.array_equal(asked, self._asked):
            self._asked, self._matched = asked, asked[_assign(self._candidates[asked]) >= 0]
        return self._matched


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
    at = np.arange(1, thresholds + 1) / (thresholds + 1)
    # Thinning only takes pixels away: those over the lowest threshold are all that there will be.
    pixels = probability >= at[0]
    numbers = pixels.cumsum().reshape(pixels.shape) - 1
    people = [_Annotator(pixels, np.asarray(truth, bool), distance) for truth in annotations]
    total = sum(np.count_nonzero(truth) for truth in annotations)
    found = np.zeros((4, thresholds), np.int64)
    last: int | None = None
    for place, threshold in enumerate(at):
        over = probability >= threshold
        size = int(over.sum())
        if size == last:  # one set holds the other, so they are the same
            found[:, place] = found[:, place - 1]
            continue
        last = size
        predicted = numbers[thin(over)]
        matches = [person.match(predicted) for person in people]
        anyone = np.zeros(np.count_nonzero(pixels), bool)
        for matched in matches:
            anyone[matched] = True
        found[:, place] = sum(map(len, matches)), total, anyone.sum(), len(predicted)
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
    """The benchmark's figures.

    A share of nothing is 0: without predictions or annotated pixels so are all the figures, and an image that has
    neither changes none.

    Args:
        counts: of each image, at the same thresholds; at least one.
    """
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
