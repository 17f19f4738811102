"""Boundaries made thin, matched one to one, and the benchmark's figures, beside brute force and cases by hand."""

from __future__ import annotations

import io
import itertools
import pickle
import time

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from dla_fast.tasks import edge_metrics, edges
from dla_fast.tasks.edge_metrics import Counts


def mask(*lines: str) -> np.ndarray:
    return np.array([[character == "#" for character in line] for line in lines])


def most_pairs(first: list, second: list, distance: float) -> int:
    """How many pairs there can be, by trying all."""
    if not first:
        return 0
    (y, x), rest = first[0], first[1:]
    best = most_pairs(rest, second, distance)
    for place, (v, u) in enumerate(second):
        if (y - v) ** 2 + (x - u) ** 2 <= distance**2:
            best = max(best, 1 + most_pairs(rest, second[:place] + second[place + 1 :], distance))
    return best


@pytest.mark.parametrize("distance", [0.5, 1.0, 1.5, 2.3])
def test_matching_against_brute_force(distance):
    draw = np.random.default_rng(0)
    for _ in range(25):
        predicted, truth = draw.random((2, 5, 5)) < 0.2
        of_predicted, of_truth = edge_metrics.match(predicted, truth, distance)
        assert of_predicted.sum() == of_truth.sum()
        assert not (of_predicted & ~predicted).any()
        assert not (of_truth & ~truth).any()
        pixels = [list(map(tuple, np.argwhere(each))) for each in (predicted, truth, of_predicted, of_truth)]
        assert of_predicted.sum() == most_pairs(pixels[0], pixels[1], distance)
        # Those that are matched can be matched among themselves: one to one, and near.
        assert most_pairs(pixels[2], pixels[3], distance) == of_predicted.sum()


def test_the_distance_is_the_last_that_matches():
    first, second = np.zeros((2, 20, 20), bool)
    first[10, 10], second[13, 14] = True, True
    assert edge_metrics.match(first, second, 5.0)[0].sum() == 1
    assert edge_metrics.match(first, second, 4.99)[0].sum() == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 2)])
def test_matching_at_the_border_and_of_nothing(shape):
    full, empty = np.ones(shape, bool), np.zeros(shape, bool)
    assert edge_metrics.match(full, full, 3.0)[1].all()
    for a, b in ((full, empty), (empty, full), (empty, empty)):
        assert not any(each.any() for each in edge_metrics.match(a, b, 3.0))


def test_bands_of_candidates_are_matched_in_no_time():
    """A search that visits a dead end once for every way that leads there does not end here."""
    draw = np.random.default_rng(0)
    predicted, truth = draw.random((2, 24, 600)) < 0.7
    start = time.process_time()
    of_predicted, of_truth = edge_metrics.match(predicted, truth, 4.3)
    assert time.process_time() - start < 5
    assert of_predicted.sum() == of_truth.sum() == min(predicted.sum(), truth.sum())


def test_counts_by_hand_where_annotators_disagree():
    """Two lines are predicted; one annotator drew the first, the other both and a third that is missed."""
    probability = np.zeros((12, 9), np.float32)
    probability[1], probability[5] = 0.9, 0.4
    first, second = np.zeros((2, 12, 9), bool)
    first[1] = True
    second[[1, 5, 9]] = True
    found = edge_metrics.count(probability, [first, second], thresholds=3, max_distance=1 / 15)
    assert edge_metrics.thresholds(3).tolist() == [0.25, 0.5, 0.75]
    assert found.predicted.tolist() == [18, 9, 9]
    assert found.matched_predicted.tolist() == [18, 9, 9]
    assert found.truth.tolist() == [36, 36, 36]
    assert found.matched_truth.tolist() == [9 + 18, 9 + 9, 9 + 9]


def independent(probability, annotations, count, max_distance):
    """The same with dense matrices and the cheapest assignment, in which a pixel alone costs 100 times the distance."""
    distance = max_distance * np.hypot(*probability.shape)
    result = np.zeros((4, count), int)
    for k in range(count):
        predicted = np.argwhere(edges.thin(probability >= (k + 1) / (count + 1)))
        anyone = np.zeros(len(predicted), bool)
        for annotation in annotations:
            truth = np.argwhere(annotation)
            apart = np.linalg.norm(predicted[:, None] - truth[None], axis=2)
            size = len(predicted) + len(truth)
            cost = np.full((size, size), 100 * distance)
            cost[: len(predicted), : len(truth)] = np.where(apart <= distance, apart, 1e6)
            cost[len(predicted) :, len(truth) :] = 0
            rows, columns = linear_sum_assignment(cost)
            together = (rows < len(predicted)) & (columns < len(truth))
            anyone[rows[together]] = True
            result[0, k] += together.sum()
            result[1, k] += len(truth)
        result[2:, k] = anyone.sum(), len(predicted)
    return result


@pytest.mark.parametrize("seed", range(3))
def test_counts_against_the_cheapest_assignment(seed):
    draw = np.random.default_rng(seed)
    truth = edges.thin(ndimage.gaussian_filter(draw.normal(size=(24, 30)), 2) > 0.05)
    annotations = [truth, np.roll(truth, 1, 0), truth & (draw.random(truth.shape) < 0.7)]
    blurred = ndimage.gaussian_filter(truth.astype(np.float32), 0.7) + draw.uniform(0, 0.3, truth.shape)
    probability = edges.suppress(blurred.clip(0, 1))
    found = edge_metrics.count(probability, annotations, thresholds=7, max_distance=0.05)
    expected = independent(probability, annotations, 7, 0.05)
    one_to_one = [found.matched_truth, found.truth, found.predicted]
    assert [each.tolist() for each in one_to_one] == expected[[0, 1, 3]].tolist()
    # Which of several best matchings is found decides over a pixel here and there that two annotators share.
    assert np.abs(found.matched_predicted - expected[2]).max() <= 0.03 * expected[3].max()


def test_the_annotator_himself_is_perfect():
    truth = edges.thin(ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 50)), 3) > 0.02)
    counts = [edge_metrics.count(truth * 0.5, [truth, truth])]
    found = edge_metrics.scores(counts)
    assert (found.ods, found.ois, found.ods_precision, found.ods_recall) == (1, 1, 1, 1)


def counts(matched_truth, truth, matched_predicted, predicted):
    return Counts(*(np.array(each) for each in (matched_truth, truth, matched_predicted, predicted)))


def test_figures_by_hand():
    """Two images, three thresholds."""
    first = counts([8, 6, 2], [10, 10, 10], [8, 6, 2], [16, 8, 2])
    second = counts([10, 5, 0], [10, 10, 10], [10, 5, 0], [10, 5, 0])
    assert (first + second).predicted.tolist() == [26, 13, 2]
    found = edge_metrics.scores([first, second])
    precision, recall = np.array([18 / 26, 11 / 13, 1.0]), np.array([18 / 20, 11 / 20, 2 / 20])
    assert found.precision.tolist() == pytest.approx(precision.tolist())
    assert found.recall.tolist() == pytest.approx(recall.tolist())
    f = 2 * precision * recall / (precision + recall)
    # Between the first two thresholds precision rises while recall falls, and F has its maximum at the first.
    assert found.ods == pytest.approx(f[0])
    assert found.ods_threshold == 0.25
    # The first image's best is its second threshold (P 6/8, R 6/10), the second's its first.
    assert found.ois == pytest.approx(2 * (16 / 18) * (16 / 20) / (16 / 18 + 16 / 20))
    grid = np.arange(101) / 100
    inside = (grid >= 0.1) & (grid <= 0.9)
    area = np.interp(grid[inside], recall[::-1], precision[::-1]).sum() * 0.01
    assert found.ap == pytest.approx(area)


def test_the_best_threshold_may_lie_between_two():
    found = edge_metrics.scores([counts([9, 1], [10, 10], [9, 10], [90, 10])])
    by_threshold = [2 * p * r / (p + r) for p, r in zip(found.precision, found.recall, strict=True)]
    assert found.ods > max(by_threshold) + 0.1
    assert 1 / 3 < found.ods_threshold < 2 / 3


def test_nothing_predicted_nothing_true_and_neither():
    zero, ten = [0, 0], [10, 10]
    with np.errstate(all="raise"):
        for truth, predicted in itertools.product((zero, ten), repeat=2):
            found = edge_metrics.scores([counts(zero, truth, zero, predicted)])
            assert (found.ods, found.ois, found.ap) == (0, 0, 0)
    empty = edge_metrics.count(np.zeros((9, 9)), [np.zeros((9, 9), bool)], thresholds=2)
    assert not any(each.any() for each in vars(empty).values())
    perfect = edge_metrics.count(np.eye(9), [np.eye(9, dtype=bool)], thresholds=2)
    assert edge_metrics.scores([empty, perfect]).ods == 1


@pytest.mark.parametrize("shape", [(8, 9), (9, 10), (12, 12)])
def test_an_annotation_of_another_size(shape):
    with pytest.raises(ValueError, match=r"annotations: expected \(9, 9\), as the map's, got"):
        edge_metrics.count(np.eye(9), [np.zeros(shape, bool)])


def test_counts_travel_between_processes():
    found = edge_metrics.count(np.eye(9), [np.eye(9, dtype=bool)], thresholds=4)
    other = pickle.loads(pickle.dumps(found))
    assert all((a == b).all() for a, b in zip(vars(found).values(), vars(other).values(), strict=True))


@pytest.mark.parametrize("degrees", range(0, 180, 15))
def test_suppression_leaves_the_ridge_of_a_line_at_any_angle(degrees):
    angle = np.deg2rad(degrees)
    y, x = np.mgrid[-30:31, -30:31]
    away = np.abs(x * np.sin(angle) - y * np.cos(angle))
    line = np.exp(-(away**2) / 8).astype(np.float32)
    found = edges.suppress(line) > 0.2
    assert away[found][(np.abs(y) < 29)[found] & (np.abs(x) < 29)[found]].max() <= 1.0
    thinned = edges.thin(found)
    # One pixel a step, from border to border.
    steps = thinned.any(0) if abs(np.cos(angle)) > abs(np.sin(angle)) else thinned.any(1)
    assert steps[1:-1].all()
    assert thinned.sum() < 61 * 1.5
    assert (edges.suppress(line)[found] == line[found]).all()


@pytest.mark.parametrize("row", [0, 1, 2, 21, 22, 23])
def test_suppression_along_the_border(row):
    line = np.exp(-((np.arange(24)[:, None] - row) ** 2) / 8) * np.ones((1, 30), np.float32)
    expected = np.zeros((24, 30), bool)
    expected[row] = True
    assert (edges.suppress(line) > 0.2).tolist() == expected.tolist()
    assert (edges.suppress(line.T) > 0.2).tolist() == expected.T.tolist()


def test_suppression_of_what_has_no_ridge():
    assert not edges.suppress(np.zeros((5, 7))).any()
    flat = edges.suppress(np.full((5, 7), 0.5))
    assert np.isfinite(flat).all()
    assert edges.suppress(np.ones((1, 1))).shape == (1, 1)


def test_a_plateau_two_pixels_wide_leaves_a_line():
    line = np.zeros((20, 20), np.float32)
    line[:, 9:11] = 1
    assert (edges.thin(edges.suppress(line) > 0.5).sum(1)[1:-1] == 1).all()


def test_the_curve_is_drawn():
    found = edge_metrics.scores([counts([8, 6, 2], [10] * 3, [8, 6, 2], [16, 8, 2])])
    with np.errstate(all="raise"):
        picture = Image.open(io.BytesIO(edge_metrics.draw(found, "Boundaries")))
    assert picture.format == "PNG"
    assert min(picture.size) > 400
    assert len(np.unique(np.asarray(picture.convert("L")))) > 50
