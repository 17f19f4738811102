"""What predictions look like."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dla_fast.tasks import pictures
from dla_fast.tasks.weights import Facts


def test_files_of_images_with_one_name_are_told_apart():
    assert pictures.stems([Path("a/x.png"), Path("b/x.jpg"), Path("y.png")]) == ["00001-x", "00002-x", "y"]


def test_labels_keep_their_values_and_have_colours():
    facts = Facts("segmentation", "dla34up", ["a", "b", "c"], {})
    colours = pictures.palette(facts)
    assert len({tuple(colour) for colour in colours.tolist()}) == 3
    labels = np.array([[0, 2], [1, 2]], np.uint8)
    picture = Image.open(io.BytesIO(pictures.indexed(labels, colours)))
    assert np.asarray(picture).tolist() == labels.tolist()
    assert np.asarray(picture.convert("RGB"))[0, 1].tolist() == colours[2].tolist()


def test_probabilities_are_dark_where_they_are_high():
    picture = Image.open(io.BytesIO(pictures.grey(np.array([[0.0, 0.5, 1.0, 1.5]]))))
    assert np.asarray(picture).tolist() == [[255, 127, 0, 0]]


def test_boundaries_are_drawn_beside_the_image():
    image = Image.fromarray(np.full((4, 6, 3), 100, np.uint8))
    strength = np.zeros((4, 6))
    strength[1] = 1
    drawn = np.asarray(Image.open(io.BytesIO(pictures.outlined(image, strength))))
    assert drawn.shape == (4, 12, 3)
    assert (drawn[:, :6] == 100).all()
    assert drawn[1, 6].tolist() == [255, 40, 0]
    assert drawn[2, 6].tolist() == [50, 50, 50]
