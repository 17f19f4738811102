"""Whole images through a network in parts, the loss that ignores, and intersection over union."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import task_helpers
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from task_helpers import TINY
from torch import nn

from dla_fast import tasks
from dla_fast.tasks import DataError, TaskError, dense, options, running, segmentation
from dla_fast.tasks.task import Data


class PixelNetwork(nn.Module):
    """Log-probabilities that follow from each pixel alone; remembers the shapes that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        assert not any(side % 32 for side in x.shape[2:])
        return F.log_softmax(torch.stack([x[:, 0], x[:, 1] * 2, x.sum(1)], 1), 1), x


def session(model, **given):
    return task_helpers.session(model, segmentation.Judging, **given)


@pytest.mark.parametrize("window", [0, 32, 64, 256])
@pytest.mark.parametrize("size", [(64, 96), (33, 70), (20, 300), (1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_what_follows_from_a_pixel_alone_is_the_same_in_any_windows(window, size, flip):
    model, image = PixelNetwork(), torch.randn(3, *size)
    found = dense.probabilities(session(model, window=window, flip=flip), image)
    padded = F.pad(image[None], (0, -size[1] % 32, 0, -size[0] % 32))
    expected = model(padded)[0].exp()[0, :, : size[0], : size[1]]
    torch.testing.assert_close(found, expected)
    if window:
        assert all(max(seen[2:]) <= window or max(size) <= window for seen in model.seen[:-1])


@pytest.mark.parametrize(("length", "window"), [(64, 32), (65, 32), (1000, 64), (33, 32), (32, 32)])
def test_windows_cover_everything_and_overlap(length, window):
    starts = dense._starts(length, window)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - window)
    gaps = np.diff(starts)
    assert (gaps <= window * 2 // 3 + 1).all()
    assert (gaps > 0).all()


def test_scales_are_averaged():
    """Each at its own size, in equal parts."""
    model, image = PixelNetwork(), torch.randn(3, 64, 64)
    once = dense.probabilities(session(model), image)
    half = dense.probabilities(session(model, scales=(0.5,)), image)
    both = dense.probabilities(session(model, scales=(0.5, 1.0)), image)
    torch.testing.assert_close(both, (once + half) / 2)
    assert (1, 3, 32, 32) in model.seen
    torch.testing.assert_close(both.sum(0), torch.ones(64, 64), rtol=1e-4, atol=1e-4)


def test_mirrored_twins_are_averaged():
    class Left(nn.Module):
        def forward(self, x):
            ramp = torch.linspace(-3, 3, x.shape[3]).expand(x.shape[0], 1, *x.shape[2:])
            return F.log_softmax(torch.cat([ramp, -ramp], 1), 1), x

    found = dense.probabilities(session(Left(), flip=True), torch.randn(3, 32, 64))
    torch.testing.assert_close(found, torch.full_like(found, 0.5))


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 10.0, 0.5])])
def test_the_loss_is_cross_entropy_of_what_is_not_ignored(weight):
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 5, 7))
    labels[torch.rand(2, 5, 7) < 0.3] = dense.IGNORED
    weight = None if weight is None else weight.double()
    found = dense.loss(logits.log_softmax(1), labels, weight)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weight, ignore_index=dense.IGNORED))


def test_the_loss_of_an_image_without_labels_is_zero_and_so_is_its_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = dense.loss(logits.log_softmax(1), torch.full((1, 4, 4), dense.IGNORED), None)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_intersection_over_union_by_hand():
    confusion = torch.tensor([[3.0, 1, 0], [2, 4, 0], [0, 0, 0]])
    union, accuracy = segmentation.intersection_over_union(confusion)
    assert union[:2].tolist() == pytest.approx([3 / 6, 4 / 7])
    assert union[2].isnan()
    assert accuracy == pytest.approx(0.7)


class Labels:
    def __init__(self, classes):
        self.classes = [f"class {i}" for i in range(classes)]
        self.palette = np.zeros((classes, 3), np.uint8)

    def labels(self, path):
        return np.load(path)


@pytest.fixture
def segmented(tmp_path):
    """Random images of several sizes with random labels, some ignored; class 4 is nowhere."""
    draw, pairs = np.random.default_rng(0), []
    for number, (height, width) in enumerate(((40, 50), (33, 64), (64, 31))):
        image, labels = tmp_path / f"{number}.png", tmp_path / f"{number}.npy"
        Image.fromarray(draw.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(image)
        np.save(labels, draw.choice([0, 1, 2, 3, 255], (height, width)).astype(np.uint8))
        pairs.append((image, labels))
    return Data(pairs, Labels(5).classes, Labels(5))


class ColourNetwork(nn.Module):
    def forward(self, x):
        scores = torch.cat([x, x.sum(1, keepdim=True) / 2, torch.full_like(x[:, :1], -9)], 1)
        return scores.log_softmax(1), scores


def test_mean_iou_against_scikit_learn(segmented):
    model = ColourNetwork()
    found = tasks.get("segmentation").evaluate(session(model), segmented)
    truth, predicted = [], []
    for image, labels in segmented.pairs:
        pixels = torch.from_numpy(np.asarray(Image.open(image)).copy()).permute(2, 0, 1)[None] / 255
        pixels = (pixels - torch.tensor(dense.MEAN).view(3, 1, 1)) / torch.tensor(dense.STD).view(3, 1, 1)
        expected = np.load(labels)
        truth.append(expected[expected != 255])
        predicted.append(model(pixels)[0].argmax(1)[0].numpy()[expected != 255])
    truth, predicted = np.concatenate(truth), np.concatenate(predicted)
    by_class = jaccard_score(truth, predicted, labels=range(4), average=None)
    assert [found.classes[f"class {i}"] for i in range(4)] == pytest.approx(by_class.tolist())
    assert np.isnan(found.classes["class 4"])
    assert found.metrics["mIoU"] == pytest.approx(by_class.mean())
    confusion = confusion_matrix(truth, predicted)
    assert found.metrics["pixel accuracy"] == pytest.approx(confusion.trace() / confusion.sum())
    assert found.images == 3


def test_an_annotation_of_another_size_is_named(segmented):
    np.save(segmented.pairs[1][1], np.zeros((5, 6), np.uint8))
    with pytest.raises(DataError, match=r"1\.npy: it is 6x5, the image .*1\.png 64x33"):
        tasks.get("segmentation").evaluate(session(ColourNetwork()), segmented)


def test_median_frequency_weights_by_hand(tmp_path):
    """Class 0 has 8 of 16 pixels, class 1 4 of the 8 of the one image that has it, class 2 6 of 16."""
    first, second = np.array([[0] * 2, [0] * 2, [2] * 2, [2] * 2]), np.array([[0, 0], [2, 2], [1, 1], [255, 255]])
    pairs = []
    for number, labels in enumerate((first, second)):
        np.save(tmp_path / f"{number}.npy", labels.astype(np.uint8))
        pairs.append((Path(), tmp_path / f"{number}.npy"))
    weight = segmentation.median_frequency(Data(pairs, ["a", "b", "c", "absent"], Labels(4)))
    frequency = np.array([6 / 14, 2 / 6, 6 / 14])
    assert weight.tolist() == pytest.approx([*(np.median(frequency) / frequency), 0])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_image_and_labels_are_changed_alike(scale):
    """Where the labels say 1 the image is red, wherever the crop is from; beyond the image is ignored."""
    chosen = options.make(
        segmentation.Segmenting,
        {"data": "x", "size": 64, "random_scale": scale, "random_rotate": 15.0, "color_jitter": 0.0},
    )
    augment = dense.augmentation(chosen)
    labels = np.zeros((60, 80), np.uint8)
    labels[10:40, 20:70] = 1
    image = Image.fromarray(np.stack([labels * 255, 255 - labels * 255, np.full_like(labels, 255)], 2))
    for seed in range(8):
        torch.manual_seed(seed)
        crop, mask = augment(image, labels)
        assert crop.shape == (3, 64, 64)
        assert mask.shape == (64, 64)
        assert set(mask.unique().tolist()) <= {0, 1, 255}
        assert type(crop) is type(mask) is torch.Tensor
        red = crop[0] > crop[1]
        agrees = (red == (mask == 1))[(mask != 255) & (crop[2] > 0)]
        assert agrees.float().mean() > 0.93
        assert (mask == 1).any()


@pytest.mark.parametrize(("name", "given"), [("segmentation", {"window": 100}), ("segmentation", {"size": 100})])
def test_sizes_that_do_not_fit_the_stride(name, given, tmp_path):
    with pytest.raises(TaskError, match="expected a multiple of 32"):
        running.train(tasks.get(name), {**TINY, "size": 64, "data": str(tmp_path), **given}, tmp_path / "run")
