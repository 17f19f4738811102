"""Data sets of images with a class each: an ImageFolder, and the published lists of five fine-grained sets.

Where a set is published with a train and a test part alone, both "val" and "test" mean the test part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dla_fast.tasks.errors import DataError
from dla_fast.tasks.layouts import files


@dataclass(frozen=True)
class Labelled:
    """Images with a class each.

    Attributes:
        samples: path and label, from 0.
        classes: their names, by label.
    """

    samples: list[tuple[Path, int]]
    classes: list[str]


def _labelled(samples: Sequence[tuple[Path, int]], classes: Sequence[str], listed: Path) -> Labelled:
    """Checked: there are samples, every one of their files is there and every label has a class with a name."""
    if not samples:
        raise DataError(f"{listed}: it names no image for this split")
    if "" in classes:
        raise DataError(f"{listed}: class {list(classes).index('') + 1} of {len(classes)} has no name")
    twice = {name for name in classes if classes.count(name) > 1}
    if twice:
        raise DataError(f"{listed}: several classes are called {min(twice)}")
    for path, label in samples:
        if not 0 <= label < len(classes):
            raise DataError(f"{listed}: the label of {path.name} is {label + 1}, and there are {len(classes)} classes")
    files.present([path for path, _ in samples], f"{listed} names it")
    return Labelled(list(samples), list(classes))


def _image_folder(root: Path, split: str) -> Labelled:
    """root/train/CLASS/image, with any folders below CLASS."""
    names = {"train": ("train",), "val": ("val", "validation", "test"), "test": ("test", "val", "validation")}[split]
    parent = files.folder(root, *names, layout="folder")
    classes = sorted(path.name for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"{parent}: the layout folder needs a folder for each class there")
    samples = [(path, label) for label, name in enumerate(classes) for path in files.images(parent / name)]
    return Labelled(samples, classes)


def _numbered(path: Path, layout: str) -> dict[int, str]:
    """A list of lines ``number value``, where the value may have spaces."""
    found: dict[int, str] = {}
    for i, line in enumerate(files.lines(path, layout=layout), 1):
        number, _, value = line.partition(" ")
        found[files.whole(number, f"{path}, entry {i}")] = value.strip()
    return found


def _cub200(root: Path, split: str) -> Labelled:
    """CUB-200-2011: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/."""
    layout = "cub200"
    home = files.home(root, "CUB_200_2011", layout=layout, holds="images.txt")
    names, images = _numbered(home / "classes.txt", layout), _numbered(home / "images.txt", layout)
    values = {}
    for name in ("image_class_labels.txt", "train_test_split.txt"):
        path = home / name
        values[name] = {
            number: files.whole(value, f"{path}, image {number}") for number, value in _numbered(path, layout).items()
        }
        unlisted = images.keys() - values[name].keys()
        if unlisted:
            raise DataError(f"{path}: it says nothing of image {min(unlisted)} ({images[min(unlisted)]})")
    labels, training = values["image_class_labels.txt"], values["train_test_split.txt"]
    parent = files.folder(home, "images", layout=layout)
    samples = [
        (parent / path, labels[number] - 1)
        for number, path in images.items()
        if (training[number] == 1) == (split == "train")
    ]
    return _labelled(samples, _without_gaps(names, home / "classes.txt"), home / "image_class_labels.txt")


def _without_gaps(names: dict[int, str], path: Path) -> list[str]:
    """Names of classes by number from 1."""
    nameless = [number for number in range(1, max(names, default=0) + 1) if not names.get(number)]
    if nameless:
        raise DataError(f"{path}: class {nameless[0]} has no name")
    return [names[number] for number in range(1, len(names) + 1)]


def _cars(root: Path, split: str) -> Labelled:
    """Stanford Cars: devkit/, cars_train/, cars_test/, cars_test_annos_withlabels.mat."""
    layout = "cars"
    home = files.home(root, "stanford_cars", "cars", layout=layout, holds="devkit")
    (names,) = files.mat(home / "devkit" / "cars_meta.mat", "class_names", layout=layout)
    if split == "train":
        path, parent = home / "devkit" / "cars_train_annos.mat", "cars_train"
    else:
        path, parent = home / "cars_test_annos_withlabels.mat", "cars_test"
        path = path if path.exists() else home / "devkit" / path.name
    (annotations,) = files.mat(path, "annotations", layout=layout)
    folder, samples = files.folder(home, parent, layout=layout), []
    for i, each in enumerate(np.atleast_1d(annotations), 1):
        if not (hasattr(each, "fname") and hasattr(each, "class")):
            raise DataError(f"{path}: annotation {i} has no fname or no class")
        samples.append((folder / str(each.fname), files.whole(getattr(each, "class"), f"{path}, {each.fname}") - 1))
    return _labelled(samples, [str(name).strip() for name in _texts(names)], path)


def _texts(cells: np.ndarray) -> list[str]:
    """The texts of a cell array; an empty one is an empty array there."""
    return [text if isinstance(text, str) else "" for text in np.atleast_1d(cells).tolist()]


def _aircraft(root: Path, split: str) -> Labelled:
    """FGVC-Aircraft by variant: data/images/, data/variants.txt, data/images_variant_SPLIT.txt.

    Train is trainval, as in what is published about it; its train and val alone are too few.
    """
    layout = "aircraft"
    home = files.home(root, "fgvc-aircraft-2013b", layout=layout, holds="data/variants.txt") / "data"
    classes = files.lines(home / "variants.txt", layout=layout)
    path = home / f"images_variant_{'trainval' if split == 'train' else 'test'}.txt"
    lines = [line.partition(" ")[::2] for line in files.lines(path, layout=layout)]
    parent = files.folder(home, "images", layout=layout)
    return _named([(parent / f"{image}.jpg", variant.strip()) for image, variant in lines], classes, path)


def _named(samples: list[tuple[Path, str]], classes: list[str], path: Path) -> Labelled:
    """Of images that are listed with the names of their classes."""
    labels = {name: label for label, name in enumerate(classes)}
    for i, (image, name) in enumerate(samples, 1):
        if name not in labels:
            raise DataError(
                f"{path}: entry {i}, {image.name}, is of {name!r}, which is none of the {len(classes)} classes"
            )
    return _labelled([(image, labels[name]) for image, name in samples], classes, path)


def _food101(root: Path, split: str) -> Labelled:
    """Food-101: meta/classes.txt, meta/train.txt, meta/test.txt, images/CLASS/id.jpg."""
    layout = "food101"
    home = files.home(root, "food-101", layout=layout, holds="meta/classes.txt")
    path = home / "meta" / f"{'train' if split == 'train' else 'test'}.txt"
    parent, classes = (
        files.folder(home, "images", layout=layout),
        files.lines(home / "meta" / "classes.txt", layout=layout),
    )
    lines = files.lines(path, layout=layout)
    return _named([(parent / f"{line}.jpg", line.rpartition("/")[0]) for line in lines], classes, path)


def _dogs(root: Path, split: str) -> Labelled:
    """Stanford Dogs: Images/BREED/image, train_list.mat and test_list.mat, beside Images or in lists/."""
    layout = "dogs"
    parent = files.folder(root, "Images", layout=layout)
    lists = root if (root / "train_list.mat").exists() else root / "lists"
    names: dict[int, str] = {}
    samples: dict[str, list[tuple[Path, int]]] = {}
    for part in ("train", "test"):
        path = lists / f"{part}_list.mat"
        images, labels = (np.atleast_1d(each) for each in files.mat(path, "file_list", "labels", layout=layout))
        if len(images) != len(labels):
            raise DataError(f"{path}: {len(images)} images, and {len(labels)} labels")
        samples[part] = []
        for image, value in zip(map(str, images), labels, strict=True):
            label = files.whole(value, f"{path}, {image}")
            samples[part].append((parent / image, label - 1))
            # No list has the names: they follow from the folders, such as n02085620-Chihuahua.
            folder = image.rpartition("/")[0]
            breed = folder.partition("-")[2] or folder
            if names.setdefault(label, breed) != breed:
                raise DataError(f"{path}: the label of {image} is {label}, and that of {names[label]} as well")
    part = "train" if split == "train" else "test"
    path = lists / f"{part}_list.mat"
    if min(names, default=1) < 1:
        raise DataError(f"{path}: a label is {min(names)}, and they start with 1")
    return _labelled(samples[part], _without_gaps(names, path), path)


LAYOUTS: dict[str, Callable[[Path, str], Labelled]] = {
    "folder": _image_folder,
    "cub200": _cub200,
    "cars": _cars,
    "aircraft": _aircraft,
    "food101": _food101,
    "dogs": _dogs,
}
