"""The made data: the same from the same seed, small, and such as a network can learn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def maker():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import made_data

        yield made_data
    finally:
        sys.path.remove(str(ROOT / "examples"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("part", ["digits", "birds", "scenes", "boundaries", "cars", "aircraft", "voc"])
def test_a_seed_gives_the_same_files_and_another_seed_others(maker, part, tmp_path):
    counts = {
        "digits": {"count": 100},
        "birds": {"train": 2, "test": 1},
        "scenes": {"train": 2, "val": 1},
        "boundaries": {"train": 2, "val": 1, "test": 1},
        "cars": {"train": 1, "test": 1},
        "aircraft": {"train": 1, "test": 1},
        "voc": {"train": 1, "val": 1},
    }[part]
    make = maker.PARTS[part]
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        make(tmp_path / name, seed, **counts)
    first = contents(tmp_path / "first")
    assert first == contents(tmp_path / "again")
    assert first != contents(tmp_path / "other")
    assert sum(map(len, first.values())) < 2**20


def test_training_and_test_crops_share_no_pixel(maker):
    """Cells of a grid are for one of the two."""
    rng = np.random.default_rng(0)
    training, testing = [], []
    for for_training, picture in maker.crops("coffee", 24, 10, rng):
        (training if for_training else testing).append(np.asarray(picture))
    rows = {row.tobytes() for crop in training for row in crop[:, :60]}
    assert not any(row.tobytes() in rows for crop in testing for row in crop[:, :60])


def test_an_exact_boundary_lies_where_the_colour_changes(maker, tmp_path):
    """The first annotator's line separates what differs: on it the image changes more than elsewhere."""
    from dla_fast.tasks.layouts import edges

    maker.boundaries(tmp_path, 0, train=4, val=1, test=1)
    layout = edges.LAYOUTS["bsds500"](tmp_path)
    for image, path in layout.pairs("train"):
        exact, _, moved = layout.annotations(path)
        pixels = np.asarray(Image.open(image)).astype(float)
        change = np.abs(np.diff(pixels, axis=0)).sum(2)[:, :-1] + np.abs(np.diff(pixels, axis=1)).sum(2)[:-1]
        on = exact[:-1, :-1]
        assert change[on].mean() > 2 * change[~on].mean()
        assert 0.5 < moved.sum() / exact.sum() < 1.5


def test_the_script_makes_what_is_asked_for(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "made_data.py"), str(tmp_path), "--only", "voc", "dogs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dogs", "voc"]
