"""Make small data sets in the layouts of the published ones, for tests and first steps; nothing is downloaded.

    python examples/made_data.py OUT [--only digits scenes ...] [--seed 0]

Handwritten digits of scikit-learn, crops of photographs of scikit-learn and scikit-image, drawn streets and shapes. The
same seed gives the same files, byte for byte, with the same versions of the libraries.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_scenes
import numpy as np
import skimage.data
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import binary_dilation
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split
from tqdm import tqdm

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "china",
    "coffee",
    "flower",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
)
# One of each data set, so that a seed draws something else for each.
DIGITS, BIRDS, CARS, AIRCRAFT, FOOD, DOGS, STREETS, SHAPES = range(8)
SPLITS = ("train", "val", "test")


def _save(pixels: np.ndarray | Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if path.suffix == ".jpg":
        # With the chroma of every pixel edges stay where they are.
        picture.save(path, quality=95, subsampling=0)
    else:
        picture.save(path)


def _write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _write_mat(path: Path, **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    savemat(written, values, do_compression=True)
    # The first 116 bytes are free text, to which scipy writes the time.
    path.write_bytes(b"MATLAB 5.0 MAT-file, made data".ljust(116) + written.getvalue()[116:])


def _cells(texts: list[str], columns: bool = False) -> np.ndarray:
    """A cell array of texts, a row or a column."""
    cells = np.empty((len(texts), 1) if columns else (1, len(texts)), object)
    cells.flat[:] = texts
    return cells


def _photograph(name: str) -> Image.Image:
    pixels = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(skimage.data, name)()
    picture = Image.fromarray(pixels)
    scale = 400 / min(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def crops(name: str, train: int, test: int, rng: np.random.Generator) -> Iterator[tuple[bool, Image.Image]]:
    """Crops of a photograph, about 96 pixels each way.

    Those for training and those for testing are from different cells of a grid, so that no pixel is in both.

    Yields:
        Whether it is for training, and the crop; first those for training.
    """
    picture = _photograph(name)
    columns, rows = (round(side / 133) for side in picture.size)
    wide, high = picture.width // columns, picture.height // rows
    cells = [(x, y) for y in range(rows) for x in range(columns)]
    for training, count in ((True, train), (False, test)):
        those = [(x, y) for x, y in cells if ((x + y) % 3 != 1) == training]
        for number in range(count):
            x, y = those[number % len(those)]
            width, height = (int(n) for n in rng.integers(88, 105, 2))
            left, top = x * wide + int(rng.integers(wide - width + 1)), y * high + int(rng.integers(high - height + 1))
            yield training, picture.crop((left, top, left + width, top + height))


def _labelled(
    seed: int, part: int, names: tuple[str, ...], train: int, test: int
) -> Iterator[tuple[int, str, int, bool, Image.Image]]:
    """Crops with their class from 0, its name, a number from 1 within the class, and whether they are for training."""
    for label, name in enumerate(names):
        found = crops(name, train, test, np.random.default_rng([seed, part, label]))
        for number, (training, picture) in enumerate(found, 1):
            yield label, name, number, training, picture


def digits(root: Path, seed: int, count: int = 1797) -> None:
    """scikit-learn's digits, 8x8 and here enlarged to 32x32, as an ImageFolder; a fifth is for validation.

    Args:
        root: the folder, made if it is missing.
        seed: what is drawn follows from it.
        count: images.
    """
    loaded = load_digits()
    images, labels = loaded.images[:count], loaded.target[:count]
    train, _ = train_test_split(np.arange(len(images)), test_size=0.2, random_state=seed, stratify=labels)
    training = set(train.tolist())
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        small = Image.fromarray((image * (255 / 16)).round().astype(np.uint8))
        split = "train" if number in training else "val"
        _save(small.resize((32, 32), Image.Resampling.BICUBIC), root / split / str(label) / f"{number:04d}.png")


def birds(root: Path, seed: int, train: int = 48, test: int = 10) -> None:
    """Crops of eight photographs, in the layout of CUB-200-2011.

    Args:
        root: the folder, made if it is missing.
        seed: what is drawn follows from it.
        train: images of a class for training.
        test: images of a class for testing.
    """
    lists: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for label, name, number, training, picture in _labelled(seed, BIRDS, PHOTOGRAPHS, train, test):
        index = len(lists["images"]) + 1
        path = f"{label + 1:03d}.{name.title()}/{name.title()}_{number:04d}_{index}.jpg"
        _save(picture, root / "images" / path)
        lists["images"].append(f"{index} {path}")
        lists["image_class_labels"].append(f"{index} {label + 1}")
        lists["train_test_split"].append(f"{index} {int(training)}")
    lists["classes"] = [f"{i} {i:03d}.{name.title()}" for i, name in enumerate(PHOTOGRAPHS, 1)]
    for name, lines in lists.items():
        _write(root / f"{name}.txt", lines)


def cars(root: Path, seed: int, train: int = 4, test: int = 2) -> None:
    """Crops of three photographs, in the layout of Stanford Cars; the arguments are those of `birds`."""
    names = PHOTOGRAPHS[:3]
    rows: dict[bool, list[tuple[int, str, tuple[int, int]]]] = {True: [], False: []}
    for label, _, _, training, picture in _labelled(seed, CARS, names, train, test):
        file = f"{len(rows[training]) + 1:05d}.jpg"
        _save(picture, root / ("cars_train" if training else "cars_test") / file)
        rows[training].append((label + 1, file, picture.size))
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for training, path in ((True, "devkit/cars_train_annos.mat"), (False, "cars_test_annos_withlabels.mat")):
        annotations = np.empty((1, len(rows[training])), fields)
        for i, (label, file, (width, height)) in enumerate(rows[training]):
            annotations[0, i] = (1, 1, width, height, label, file)
        _write_mat(root / path, annotations=annotations)
    _write_mat(root / "devkit" / "cars_meta.mat", class_names=_cells([f"{name.title()} Sedan 2012" for name in names]))


def aircraft(root: Path, seed: int, train: int = 4, test: int = 2) -> None:
    """Crops of three photographs, in the layout of FGVC-Aircraft; the arguments are those of `birds`."""
    names = PHOTOGRAPHS[3:6]
    variants = [f"{name} {i}00" for i, name in enumerate(names, 1)]  # with spaces, as there
    lists: dict[str, list[str]] = {split: [] for split in (*SPLITS, "trainval")}
    for label, _, number, training, picture in _labelled(seed, AIRCRAFT, names, train, test):
        identity = f"{label + 1:03d}{number:04d}"
        _save(picture, root / "data" / "images" / f"{identity}.jpg")
        for split in (("train" if number % 2 else "val"), "trainval") if training else ("test",):
            lists[split].append(f"{identity} {variants[label]}")
    _write(root / "data" / "variants.txt", variants)
    for split, lines in lists.items():
        _write(root / "data" / f"images_variant_{split}.txt", lines)


def food(root: Path, seed: int, train: int = 4, test: int = 2) -> None:
    """Crops of three photographs, in the layout of Food-101; the arguments are those of `birds`."""
    names = PHOTOGRAPHS[3:6]
    lists: dict[bool, list[str]] = {True: [], False: []}
    for label, name, number, training, picture in _labelled(seed, FOOD, names, train, test):
        path = f"{name}/{1000 * (label + 1) + number}"
        _save(picture, root / "images" / f"{path}.jpg")
        lists[training].append(path)
    _write(root / "meta" / "classes.txt", list(names))
    _write(root / "meta" / "train.txt", lists[True])
    _write(root / "meta" / "test.txt", lists[False])


def dogs(root: Path, seed: int, train: int = 4, test: int = 2) -> None:
    """Crops of three photographs, in the layout of Stanford Dogs; the arguments are those of `birds`."""
    lists: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for label, name, number, training, picture in _labelled(seed, DOGS, PHOTOGRAPHS[5:], train, test):
        path = f"n{label + 1:08d}-{name.title()}/n{label + 1:08d}_{number}.jpg"
        _save(picture, root / "Images" / path)
        lists[training].append((path, label + 1))
    for training, rows in lists.items():
        files, labels = _cells([path for path, _ in rows], columns=True), np.array([[label] for _, label in rows])
        _write_mat(root / ("train_list.mat" if training else "test_list.mat"), file_list=files, labels=labels)


def _streets(seed: int, train: int, val: int) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    photographs = made_scenes.textures()
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            rng = np.random.default_rng([seed, STREETS, SPLITS.index(split), number])
            yield split, number, *made_scenes.street(rng, photographs)


def scenes(root: Path, seed: int, train: int = 120, val: int = 16) -> None:
    """Drawn streets of about 128 by 256 pixels in seven classes, in the layout of Cityscapes.

    Args:
        root: the folder, made if it is missing.
        seed: what is drawn follows from it.
        train: images for training.
        val: images for validation.
    """
    for split, number, image, labels in _streets(seed, train, val):
        name = f"{split}/drawn/drawn_{number:06d}_000019"
        _save(image, root / "leftImg8bit" / f"{name}_leftImg8bit.png")
        _save(labels, root / "gtFine" / f"{name}_gtFine_labelIds.png")


def camvid(root: Path, seed: int, train: int = 6, val: int = 3) -> None:
    """The streets of `scenes`, in the layout that SegNet gave CamVid; the validation images are those of the test."""
    of_ids = np.full(256, 11, np.uint8)  # void
    for theirs, ours in (("SKY", 0), ("BUILDING", 1), ("ROAD", 3), ("SIDEWALK", 4), ("VEGETATION", 5), ("CAR", 8)):
        of_ids[getattr(made_scenes, theirs)] = ours
    of_ids[made_scenes.PERSON] = 9
    for split, number, image, labels in _streets(seed, train, val):
        for each in ("train",) if split == "train" else ("val", "test"):
            _save(image, root / each / f"drawn_{number:05d}.png")
            _save(of_ids[labels], root / f"{each}annot" / f"drawn_{number:05d}.png")


def _shapes(seed: int, counts: tuple[int, ...]) -> Iterator[tuple[str, int, made_scenes.Shapes]]:
    photographs = made_scenes.textures()
    for index, count in enumerate(counts):
        for number in range(count):
            rng = np.random.default_rng([seed, SHAPES, index, number])
            yield SPLITS[index], 1000 * (index + 1) + number, made_scenes.shapes(rng, photographs)


def boundaries(root: Path, seed: int, train: int = 160, val: int = 12, test: int = 12) -> None:
    """Drawn shapes, 97 by 145 pixels or upright, with the outlines of three annotators, in the layout of BSDS500.

    Args:
        root: the folder, made if it is missing.
        seed: what is drawn follows from it.
        train: images for training.
        val: images for validation.
        test: images for testing.
    """
    for split, number, drawn in _shapes(seed, (train, val, test)):
        _save(drawn.image, root / "data" / "images" / split / f"{number}.jpg")
        cells = np.empty((1, len(drawn.regions)), object)
        for i, regions in enumerate(drawn.regions):
            cells[0, i] = {
                "Segmentation": made_scenes.segments(regions),
                "Boundaries": made_scenes.boundaries(regions).astype(np.uint8),
            }
        _write_mat(root / "data" / "groundTruth" / split / f"{number}.mat", groundTruth=cells)


def voc(root: Path, seed: int, train: int = 6, val: int = 3) -> None:
    """The shapes of `boundaries` as instances with a void border, in the layout of PASCAL VOC 2012."""
    top = root / "VOCdevkit" / "VOC2012"
    lists: dict[str, list[str]] = {"train": [], "val": []}
    palette = np.random.default_rng(0).integers(0, 256, 768).tolist()
    for split, number, drawn in _shapes(seed, (train, val)):
        name = f"2012_{number:06d}"
        instances = drawn.regions[0].astype(np.uint8)
        border = binary_dilation(made_scenes.boundaries(instances))
        coloured = Image.fromarray(np.where(border, 255, instances).astype(np.uint8))
        coloured.putpalette(palette)
        _save(drawn.image, top / "JPEGImages" / f"{name}.jpg")
        _save(coloured, top / "SegmentationObject" / f"{name}.png")
        lists[split].append(name)
    for split, names in (*lists.items(), ("trainval", lists["train"] + lists["val"])):
        _write(top / "ImageSets" / "Segmentation" / f"{split}.txt", names)


PARTS: dict[str, Callable[[Path, int], None]] = {
    "digits": digits,
    "birds": birds,
    "scenes": scenes,
    "boundaries": boundaries,
    "cars": cars,
    "aircraft": aircraft,
    "food-101": food,
    "dogs": dogs,
    "camvid": camvid,
    "voc": voc,
}


def main() -> None:
    """Make all of them, or those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder; each data set is a folder in it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn and of how it is split")
    args = parser.parse_args()
    bar = tqdm(args.only, unit="part")
    for part in bar:
        bar.set_description(part)
        PARTS[part](args.out / part, args.seed)


if __name__ == "__main__":
    main()
