"""Accuracy of classifiers, the crops it is averaged over, and what is written of predictions."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import task_helpers
import torch
from PIL import Image
from sklearn.metrics import recall_score, top_k_accuracy_score
from task_helpers import CLASSES, colours
from torch import nn

from dla_fast import tasks
from dla_fast.tasks import DataError, classification, options
from dla_fast.tasks.task import MEAN, STD, Data
from dla_fast.tasks.weights import Facts


class Table(nn.Module):
    """Scores that the first pixel of the middle crop looks up."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, x):
        red = (x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255
        return self.scores[red.round().long()]


def session(model, **given):
    return task_helpers.session(model, classification.Judging, **{"size": 32, "resize": 1.0, **given})


@pytest.fixture
def numbered(tmp_path):
    """Thirty images, each of one colour, its number."""
    paths = []
    for number in range(30):
        paths.append(tmp_path / f"{number:02d}.png")
        Image.fromarray(np.full((32, 40, 3), number, np.uint8)).save(paths[-1])
    return paths


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_accuracy_against_scikit_learn(numbered, batch):
    scores, labels = torch.randn(30, 8), torch.arange(30) % 8
    data = Data(list(zip(numbered, labels.tolist(), strict=True)), [f"class {i}" for i in range(8)])
    found = tasks.get("classification").evaluate(session(Table(scores), batch=batch), data)
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores.numpy(), k=k, labels=range(8))
        assert found.metrics[f"top-{k}"] == pytest.approx(expected)
    by_class = recall_score(labels, scores.argmax(1), average=None)
    assert list(found.classes.values()) == pytest.approx(by_class.tolist())
    assert found.images == 30


def test_top_5_is_left_out_of_three_classes(numbered):
    data = Data([(path, 0) for path in numbered], list(CLASSES))
    assert list(tasks.get("classification").evaluate(session(Table(torch.randn(30, 3))), data).metrics) == ["top-1"]


def test_ten_crops_are_four_corners_and_the_middle_with_their_mirrored_twins(tmp_path):
    pixels = np.zeros((48, 48, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(48) * 5, np.arange(48)[:, None] * 5
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    seen = []

    class Corner(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 3)

    data = Data([(tmp_path / "ramp.png", 0)], list(CLASSES))
    tasks.get("classification").evaluate(session(Corner(), crops=10, resize=32 / 48), data)
    (crops,) = seen
    assert crops.shape == (10, 3, 32, 32)
    columns, rows = ((crops[:, c, 0, 0] * STD[c] + MEAN[c]) * 51 for c in (0, 1))
    assert rows.round().tolist() == [0, 0, 16, 16, 8] * 2
    assert columns.round().tolist() == [0, 16, 0, 16, 8, 47, 31, 47, 31, 39]


def test_probabilities_are_averaged_over_crops(numbered):
    """Not scores: one crop that is sure must not outvote nine."""
    calls = []

    class Sure(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            scores = torch.zeros(len(x), 3)
            scores[:, 1] = 1
            scores[::10] = torch.tensor([100.0, 0, 0])
            return scores

    data = Data([(numbered[0], 1)], list(CLASSES))
    assert tasks.get("classification").evaluate(session(Sure(), crops=10), data).metrics["top-1"] == 1
    assert calls == [10]


def test_what_is_predicted(numbered, tmp_path):
    scores = torch.randn(30, 3)
    facts = Facts("classification", "dla34", list(CLASSES), {})
    task = tasks.get("classification")
    written = task.predict(session(Table(scores), batch=8), numbered, facts, tmp_path / "out")
    assert [path.name for path in written] == ["predictions.csv", "predictions-1.png", "predictions-2.png"]
    rows = list(csv.DictReader(written[0].open()))
    assert [row["image"] for row in rows] == [str(path) for path in numbered]
    assert [row["class 1"] for row in rows] == [CLASSES[i] for i in scores.argmax(1)]
    assert [float(row["p 1"]) for row in rows] == pytest.approx(scores.softmax(1).amax(1).tolist(), abs=1e-4)
    for path in written[1:]:
        assert min(Image.open(path).size) > 200


def test_classes_of_a_data_set_that_the_network_does_not_know(tmp_path):
    data = colours(tmp_path)
    chosen = options.make(classification.Judging, {"data": str(data)})
    task = tasks.get("classification")
    with pytest.raises(DataError, match=r"1 of 3 classes are none of the 3 that the network was trained on: red"):
        task.read(chosen, "val", ["dark", "blue", "light"])
    found = task.read(chosen, "val", ["blue", "red", "light", "dark"])
    assert {path.parent.name: label for path, label in found.pairs} == {"red": 1, "light": 2, "dark": 3}
