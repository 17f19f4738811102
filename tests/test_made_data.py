"""The made data is small, the same each time, and what its annotations say is in the pictures."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation
from skimage.measure import label

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def streets(maker):
    """Pictures and ids."""
    return [(image, ids) for _, _, image, ids in maker._streets(0, 12, 0)]


@pytest.fixture(scope="module")
def drawn(maker):
    return [shapes for _, _, shapes in maker._shapes(0, (12,))]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def make_few(maker, root, seed):
    """Of every part, a little."""
    few = {
        "digits": {"count": 60},
        "scenes": {"train": 1, "val": 1},
        "boundaries": {"train": 1, "val": 1, "test": 1},
        "camvid": {"train": 1, "val": 1},
        "voc": {"train": 1, "val": 1},
    }
    for part, make in maker.PARTS.items():
        make(root / part, seed, **few.get(part, {"train": 1, "test": 1}))
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def test_a_seed_gives_the_same_bytes(maker, tmp_path):
    names = [make_few(maker, tmp_path / folder, seed) for folder, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert names[0] == names[1]
    assert {name.parts[0] for name in names[0]} == set(maker.PARTS)
    _, different, unreadable = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names[0], shallow=False)
    assert not different
    assert not unreadable
    drawn = [name for name in names[0] if name.parts[0] in ("birds", "scenes", "boundaries") and name.suffix != ".txt"]
    same, _, _ = filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", drawn, shallow=False)
    assert not same


def test_digits(maker, tmp_path):
    maker.digits(tmp_path, 0)
    counts = {
        split: [len(list((tmp_path / split / str(digit)).iterdir())) for digit in range(10)]
        for split in ("train", "val")
    }
    assert sum(counts["train"]) == 1437
    assert sum(counts["val"]) == 360
    assert all(34 <= count <= 38 for count in counts["val"])
    first = pixels(tmp_path / "train/0/0000.png")
    assert first.shape == (32, 32)
    assert first.max() > 240


def test_command_line_without_torch(tmp_path):
    path = ROOT / "examples" / "made_data.py"
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv.pop(1) + '/made_data.py', "
    code += "run_name='__main__'); sys.exit('torch' in sys.modules)"
    arguments = [str(path.parent), str(tmp_path), "--only", "cars", "voc"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cars", "voc"]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1e6
    done = subprocess.run(
        [sys.executable, str(path), str(tmp_path), "--only", "cats"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


@pytest.mark.parametrize(("width", "height"), [(400, 400), (599, 400), (601, 400)])
def test_no_pixel_is_in_a_crop_for_training_and_in_one_for_testing(maker, monkeypatch, width, height):
    # Colours are places.
    y, x = np.indices((height, width))
    places = Image.fromarray(np.stack([x % 256, y % 256, x // 256 + 4 * (y // 256)], 2).astype(np.uint8))
    monkeypatch.setattr(maker, "_photograph", lambda name: places)
    found = {True: set(), False: set()}
    crops = list(maker.crops("any", 24, 10, np.random.default_rng(0)))
    assert [training for training, _ in crops] == [True] * 24 + [False] * 10
    for training, crop in crops:
        assert all(88 <= side <= 104 for side in crop.size)
        colours = np.asarray(crop).reshape(-1, 3)
        found[training].update(map(tuple, colours.tolist()))
    assert not found[True] & found[False]


def test_streets(streets):
    shapes = {image.shape[:2] for image, _ in streets}
    assert len(shapes) > 3
    assert any(height % 32 for height, _ in shapes)
    assert any(width % 32 for _, width in shapes)
    total = np.zeros(34)
    for image, ids in streets:
        assert image.dtype == ids.dtype == np.uint8
        assert image.shape == (*ids.shape, 3)
        assert 120 <= ids.shape[0] <= 136
        assert 240 <= ids.shape[1] <= 272
        total += np.bincount(ids.ravel(), minlength=34) / ids.size / len(streets)
    # Seven classes, of which none is too rare to be learnt, and ids that are ignored.
    assert set(total.nonzero()[0]) == {1, 3, 4, 7, 8, 11, 21, 23, 24, 26}
    assert total[[7, 8, 11, 21, 23, 24, 26]].min() > 0.02
    assert 0 < total[[1, 3, 4]].sum() < 0.06


def test_labels_of_streets_are_where_things_are(streets):
    # Asphalt is grey and trees are green, in whatever light; the outlines are left out since lenses blur them.
    greenness, greyness = [], []
    for image, ids in streets:
        red, green, blue = image.astype(float).transpose(2, 0, 1)
        for number, values, measure in ((21, greenness, green - blue), (7, greyness, image.std(2))):
            inside = ~binary_dilation(ids != number, iterations=2)
            if inside.any():
                values.append(measure[inside].mean())
    assert min(greenness) > 8
    assert max(greyness) < 22


def test_boundaries_are_lines_one_pixel_wide(maker, drawn):
    for shapes in drawn:
        assert shapes.image.shape in ((97, 145, 3), (145, 97, 3))
        regions = shapes.regions[0]
        line = maker.made_scenes.boundaries(regions)
        full = line[:-1, :-1] & line[1:, :-1] & line[:-1, 1:] & line[1:, 1:]
        assert full.mean() < 1e-3
        # Each lies between two regions, and every place where one ends has a line nearby; at the tip of a
        # needle it is a pixel short.
        y, x = line.nonzero()
        for i, j in zip(y, x, strict=True):
            assert len(np.unique(regions[i : i + 2, j : j + 2])) > 1
        ends = (regions[:-1, :-1] != regions[1:, :-1]) | (regions[:-1, :-1] != regions[:-1, 1:])
        assert not (ends & ~binary_dilation(line, np.ones((5, 5)))[:-1, :-1]).any()


def test_boundaries_by_hand(maker):
    regions = np.zeros((6, 8), int)
    regions[:, 3:] = 4
    expected = np.zeros((6, 8), bool)
    expected[:, 2] = True
    assert (maker.made_scenes.boundaries(regions) == expected).all()
    assert (maker.made_scenes.segments(regions) == np.where(regions, 2, 1)).all()


def test_annotators(maker, drawn):
    omitted = moved = 0
    for shapes in drawn:
        whole, fewer, shifted = shapes.regions
        changed = whole != fewer
        omitted += changed.any()
        # What is left out is small, and nothing else differs.
        assert all(part.sum() < 260 for part in (label(changed) == i for i in range(1, label(changed).max() + 1)))
        moved += (whole != shifted).any()
        # Beside the picture's rim, into which a shape may have moved.
        near = binary_dilation(maker.made_scenes.boundaries(whole), np.ones((5, 5)))
        assert not ((whole != shifted) & ~near)[2:-2, 2:-2].any()
    assert omitted == len(drawn)
    assert moved >= len(drawn) - 2


def test_a_boundary_can_be_seen(drawn):
    # Colours of neighbours differ by more than their textures do.
    for shapes in drawn:
        regions = shapes.regions[0]
        means = [shapes.image[regions == i].mean(0) for i in np.unique(regions)]
        apart = [np.linalg.norm(a - b) for i, a in enumerate(means) for b in means[:i]]
        assert min(apart) > 30
