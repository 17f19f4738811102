"""Data sets of images with a label for each pixel: Cityscapes, and CamVid as it comes and as SegNet laid it out."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from skimage.color import hsv2rgb

from dla_fast.tasks.errors import DataError
from dla_fast.tasks.layouts import files

IGNORED = 255


class Labels(Protocol):
    """A data set of images and their labels.

    Attributes:
        classes: names by label.
        palette: (classes, 3), uint8, a colour for each.
    """

    classes: list[str]
    palette: np.ndarray

    def __init__(self, root: Path) -> None: ...

    def pairs(self, split: str) -> list[tuple[Path, Path | None]]:
        """Image and annotation of "train", "val" or "test"; None only where a test split has no annotations."""
        ...

    def labels(self, path: Path) -> np.ndarray:
        """An annotation as (H, W), uint8, 0 to classes - 1 and 255 for what is ignored."""
        ...


def _table(labels: dict[int, int]) -> np.ndarray:
    """Labels of the values 0 to 255 and, last, of all others; -1 where there is none."""
    table = np.full(257, -1, np.int16)
    for value, label in labels.items():
        table[value] = label
    return table


def _looked_up(values: np.ndarray, table: np.ndarray, path: Path, classes: int) -> np.ndarray:
    """Labels of the values in an annotation.

    Raises:
        DataError: some have none.
    """
    if values.ndim != 2:
        raise DataError(f"{path}: {values.shape[-1]} channels, and one with a label for each pixel was expected")
    found = table[np.clip(values, -1, 256)]
    if (found < 0).any():
        raise DataError(
            f"{path}: values {_some(values[found < 0])} in it are none of the {classes} classes, nor ignored"
        )
    return found.astype(np.uint8)


def _some(values: np.ndarray) -> str:
    """The first few of the values that occur."""
    occurring = np.unique(values, axis=0).tolist()
    return ", ".join(map(str, occurring[:5])) + (" …" if len(occurring) > 5 else "")


def _paired(images: list[Path], annotations: list[Path], folder: Path, split: str) -> list[tuple[Path, Path | None]]:
    """Images with annotations, or with None in a test split without a folder of them."""
    if split == "test" and not folder.is_dir():
        return [(image, None) for image in images]
    files.present(annotations, "there is an image for it")
    return list(zip(images, annotations, strict=True))


# Name, colour, id in annotations, in the order of the labels for training.
_CITYSCAPES = (
    ("road", (128, 64, 128), 7),
    ("sidewalk", (244, 35, 232), 8),
    ("building", (70, 70, 70), 11),
    ("wall", (102, 102, 156), 12),
    ("fence", (190, 153, 153), 13),
    ("pole", (153, 153, 153), 17),
    ("traffic light", (250, 170, 30), 19),
    ("traffic sign", (220, 220, 0), 20),
    ("vegetation", (107, 142, 35), 21),
    ("terrain", (152, 251, 152), 22),
    ("sky", (70, 130, 180), 23),
    ("person", (220, 20, 60), 24),
    ("rider", (255, 0, 0), 25),
    ("car", (0, 0, 142), 26),
    ("truck", (0, 0, 70), 27),
    ("bus", (0, 60, 100), 28),
    ("train", (0, 80, 100), 31),
    ("motorcycle", (0, 0, 230), 32),
    ("bicycle", (119, 11, 32), 33),
)


class Cityscapes:
    """Cityscapes, 19 classes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png.

    Where there is a *_gtFine_labelTrainIds.png it is read instead.

    Args:
        root: the folder with leftImg8bit and gtFine.

    Raises:
        DataError: there is no leftImg8bit in it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._images = files.folder(root, "leftImg8bit", layout="cityscapes")
        self.classes = [name for name, _, _ in _CITYSCAPES]
        self.palette = np.array([colour for _, colour, _ in _CITYSCAPES], np.uint8)
        # The ids between those of the classes are ignored.
        ids = dict.fromkeys(range(34), IGNORED) | {number: label for label, (_, _, number) in enumerate(_CITYSCAPES)}
        self._of_ids = _table(ids)
        self._of_train_ids = _table({label: label for label in range(len(_CITYSCAPES))} | {IGNORED: IGNORED})

    def pairs(self, split: str) -> list[tuple[Path, Path | None]]:
        """The images of a split in the order of their names, with their annotations.

        Raises:
            DataError: a folder, the images or some annotations are missing.
        """
        parent = files.folder(self._images, split, layout="cityscapes")
        images = [path for path in files.images(parent) if path.stem.endswith("_leftImg8bit")]
        if not images:
            raise DataError(f"{parent}: no image there is named as in CITY/*_leftImg8bit.png")
        annotated = self._root / "gtFine" / split
        annotations = []
        for image in images:
            stem = image.stem.removesuffix("leftImg8bit")
            place = annotated / image.parent.relative_to(parent)
            train_ids = place / f"{stem}gtFine_labelTrainIds.png"
            annotations.append(train_ids if train_ids.exists() else place / f"{stem}gtFine_labelIds.png")
        return _paired(images, annotations, annotated, split)

    def labels(self, path: Path) -> np.ndarray:
        """Labels for training.

        Returns:
            (H, W), uint8, 0 to 18 and 255 for what is ignored.

        Raises:
            DataError: the file is missing or broken, or a value in it is no id.
        """
        table = self._of_train_ids if path.stem.endswith("_labelTrainIds") else self._of_ids
        return _looked_up(files.pixels(path), table, path, len(self.classes))


# The usual 11 classes, SegNet's colours, and which of the 32 names of the original annotations each takes. What is
# named nowhere is ignored.
_CAMVID = (
    ("sky", (128, 128, 128), ("Sky",)),
    ("building", (128, 0, 0), ("Archway", "Bridge", "Building", "Tunnel", "Wall")),
    ("pole", (192, 192, 128), ("Column_Pole", "TrafficCone")),
    ("road", (128, 64, 128), ("LaneMkgsDriv", "LaneMkgsNonDriv", "Road")),
    ("pavement", (60, 40, 222), ("ParkingBlock", "RoadShoulder", "Sidewalk")),
    ("tree", (128, 128, 0), ("Tree", "VegetationMisc")),
    ("sign", (192, 128, 128), ("Misc_Text", "SignSymbol", "TrafficLight")),
    ("fence", (64, 64, 128), ("Fence",)),
    ("car", (64, 0, 128), ("Car", "OtherMoving", "SUVPickupTruck", "Train", "Truck_Bus")),
    ("pedestrian", (64, 64, 0), ("Animal", "CartLuggagePram", "Child", "Pedestrian")),
    ("bicyclist", (0, 128, 192), ("Bicyclist", "MotorcycleScooter")),
)
_GROUPS = {theirs: label for label, (_, _, names) in enumerate(_CAMVID) for theirs in names} | {"Void": IGNORED}


class CamVid:
    """CamVid in SegNet's layout, and data of one's own in that layout: SPLIT/ and SPLITannot/.

    Annotations are PNGs of labels, with 11 for void. A classes.txt, a name a line, gives other classes; then 255 is
    what is ignored. With a label_colors.txt, lines of ``R G B name``, they may be colours: where its names are the 32
    of the original annotations, these are grouped into the usual 11 classes; else each is a class, and one named Void
    is ignored.

    Args:
        root: the folder with train, trainannot and so on.

    Raises:
        DataError: the folder is missing, or a list of classes in it is unusable.
    """

    def __init__(self, root: Path) -> None:
        files.folder(root, "train", "val", "test", layout="camvid")
        self._root = root
        self._keys, self._targets = np.array([], int), np.array([], np.uint8)
        self.classes = [name for name, _, _ in _CAMVID]
        self.palette = np.array([colour for _, colour, _ in _CAMVID], np.uint8)
        void, no_colours = len(_CAMVID), np.zeros((0, 3), np.uint8)
        if (root / "label_colors.txt").exists():
            listed = _listed_colours(root / "label_colors.txt")
            targets = _GROUPS
            if listed.keys() != _GROUPS.keys():
                void, self.classes = IGNORED, [name for name in listed if name.lower() != "void"]
                self.palette = np.array([listed[name] for name in self.classes], np.uint8)
                targets = dict.fromkeys(listed, IGNORED) | {name: label for label, name in enumerate(self.classes)}
            by_key = sorted((int(_packed(np.array(colour))), targets[name]) for name, colour in listed.items())
            self._keys, self._targets = np.array([k for k, _ in by_key]), np.array([t for _, t in by_key], np.uint8)
        elif (root / "classes.txt").exists():
            void, self.classes, self.palette = IGNORED, files.lines(root / "classes.txt", layout="camvid"), no_colours
        if not 0 < len(set(self.classes)) == len(self.classes) < IGNORED:
            raise DataError(
                f"{root}: {len(self.classes)} classes are listed there, 1 to 254 of different names were expected"
            )
        if len(self.palette) != len(self.classes):
            # Steps of the golden ratio keep hues apart, however many there are.
            hues = np.arange(len(self.classes)) * 0.618034 % 1
            hsv = np.stack([hues, np.full_like(hues, 0.75), np.full_like(hues, 0.9)], 1)
            self.palette = (255 * hsv2rgb(hsv)).astype(np.uint8)
        self._of_labels = _table(
            {label: label for label in range(len(self.classes))} | {void: IGNORED, IGNORED: IGNORED}
        )

    def pairs(self, split: str) -> list[tuple[Path, Path | None]]:
        """The images of a split in the order of their names, with their annotations, named alike or with _L.

        Raises:
            DataError: a folder, the images or some annotations are missing.
        """
        parent, annotated = files.folder(self._root, split, layout="camvid"), self._root / f"{split}annot"
        images = files.images(parent)
        annotations = []
        for image in images:
            path = annotated / image.relative_to(parent).with_suffix(".png")
            with_l = path.with_stem(f"{path.stem}_L")
            annotations.append(with_l if with_l.exists() else path)
        return _paired(images, annotations, annotated, split)

    def labels(self, path: Path) -> np.ndarray:
        """Labels for training.

        Returns:
            (H, W), uint8, 0 to classes - 1 and 255 for what is ignored.

        Raises:
            DataError: the file is missing or broken, or a value or a colour in it is no class.
        """
        values = files.pixels(path)
        if values.ndim == 2:
            return _looked_up(values, self._of_labels, path, len(self.classes))
        if not len(self._keys):
            raise DataError(f"{path}: it has colours, and for these {self._root / 'label_colors.txt'} was expected")
        if values.shape[-1] not in (3, 4):
            raise DataError(f"{path}: {values.shape[-1]} channels, and labels or colours were expected")
        packed = _packed(values[..., :3])
        place = np.searchsorted(self._keys, packed).clip(max=len(self._keys) - 1)
        strange = self._keys[place] != packed
        if strange.any():
            shown = _some(values[strange][:, :3])
            raise DataError(f"{path}: colours {shown} in it are none of the {len(self._keys)} that are listed")
        return self._targets[place]


def _packed(colours: np.ndarray) -> np.ndarray:
    """A number for each colour, (..., 3)."""
    return colours.astype(int) @ (65536, 256, 1)


def _listed_colours(path: Path) -> dict[str, tuple[int, ...]]:
    """Colours by name, of lines ``R G B name``.

    Raises:
        DataError: a line is something else, or a name or a colour is there twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    for i, line in enumerate(files.lines(path, layout="camvid"), 1):
        where, (*numbers, name) = f"{path}, entry {i}", line.split(maxsplit=3)
        colour = tuple(files.whole(number, where) for number in numbers)
        if len(colour) != 3 or not all(0 <= value < 256 for value in colour):
            raise DataError(f"{where}: {line!r}, and R G B name was expected, with numbers from 0 to 255")
        if name in found or colour in found.values():
            raise DataError(f"{where}: {line!r}, whose name or colour was listed before")
        found[name] = colour
    return found


LAYOUTS: dict[str, type[Labels]] = {"cityscapes": Cityscapes, "camvid": CamVid}
