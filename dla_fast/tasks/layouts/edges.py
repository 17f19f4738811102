"""Data sets of boundaries: those drawn by several people for BSDS500, and those of the instances of PASCAL VOC."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.ndimage import distance_transform_edt
from skimage.morphology import thin
from skimage.segmentation import find_boundaries

from dla_fast.tasks.errors import DataError
from dla_fast.tasks.layouts import files

VOID = 255


class Edges(Protocol):
    """A data set of images and their boundaries."""

    def __init__(self, root: Path) -> None: ...

    def pairs(self, split: str) -> list[tuple[Path, Path | None]]:
        """Image and annotation of "train", "val" or "test"; None only where a test split has no annotations."""
        ...

    def annotations(self, path: Path) -> list[np.ndarray]:
        """An annotation as (H, W), bool, for each annotator."""
        ...


class Bsds500:
    """The Berkeley segmentation data set: images/SPLIT/*.jpg and groundTruth/SPLIT/*.mat.

    Args:
        root: BSR, BSDS500 or the folder data in it.

    Raises:
        DataError: there is no folder of images.
    """

    def __init__(self, root: Path) -> None:
        self._home = files.home(root, "data", "BSDS500/data", layout="bsds500", holds="images")

    def pairs(self, split: str) -> list[tuple[Path, Path | None]]:
        """The images of a split in the order of their names, with their annotations.

        Raises:
            DataError: a folder, the images or some annotations are missing.
        """
        images = files.images(files.folder(self._home / "images", split, layout="bsds500"))
        annotations = self._home / "groundTruth" / split
        if split == "test" and not annotations.is_dir():
            return [(image, None) for image in images]
        paths = [annotations / f"{image.stem}.mat" for image in images]
        files.present(paths, "there is an image for it")
        return list(zip(images, paths, strict=True))

    def annotations(self, path: Path) -> list[np.ndarray]:
        """The boundaries that each person drew, one pixel wide.

        Returns:
            (H, W), bool, for each.

        Raises:
            DataError: the file is missing, broken, or has no such boundaries.
        """
        (cells,) = files.mat(path, "groundTruth", layout="bsds500")
        drawn = [np.asarray(getattr(cell, "Boundaries", None)) for cell in np.atleast_1d(cells)]
        if not drawn or any(each.ndim != 2 or each.dtype == object or each.shape != drawn[0].shape for each in drawn):
            raise DataError(f"{path}: the cells of groundTruth need Boundaries, a matrix each, all of one size")
        return [each.astype(bool) for each in drawn]


class Pascal:
    """PASCAL VOC: boundaries of the instances in SegmentationObject; "test" means val, since the test's are not public.

    Args:
        root: VOC2012, VOCdevkit or what that is in.

    Raises:
        DataError: there is no list of images.
    """

    def __init__(self, root: Path) -> None:
        names = ("VOC2012", "VOCdevkit/VOC2012")
        self._home = files.home(root, *names, layout="pascal", holds="ImageSets/Segmentation")

    def pairs(self, split: str) -> list[tuple[Path, Path | None]]:
        """The images of a split in the order of its list, with their annotations.

        Raises:
            DataError: the list, or an image or annotation that it names, is missing.
        """
        path = self._home / "ImageSets" / "Segmentation" / f"{'val' if split == 'test' else split}.txt"
        names = files.lines(path, layout="pascal")
        if not names:
            raise DataError(f"{path}: it names no image")
        images = [self._home / "JPEGImages" / f"{name}.jpg" for name in names]
        annotations = [self._home / "SegmentationObject" / f"{name}.png" for name in names]
        files.present(images, f"{path} names it")
        files.present(annotations, f"{path} names it")
        return list(zip(images, annotations, strict=True))

    def annotations(self, path: Path) -> list[np.ndarray]:
        """The boundaries of the instances, one pixel wide.

        Objects have a border of a few pixels that is neither theirs nor the ground's. Each of its pixels is given to
        whatever is nearest, so that the boundary runs in its middle.

        Returns:
            One annotation, (H, W), bool.

        Raises:
            DataError: the file is missing, broken, or no map of instances.
        """
        instances = files.pixels(path)
        if instances.ndim != 2:
            raise DataError(f"{path}: {instances.shape[-1]} channels, and a PNG of indices with a palette was expected")
        void = instances == VOID
        if void.all():
            return [np.zeros(instances.shape, bool)]
        nearest = distance_transform_edt(void, return_distances=False, return_indices=True)
        filled = instances[tuple(nearest)]
        # Both of two objects that touch have an inner boundary there.
        return [thin(find_boundaries(filled, mode="inner"))]


LAYOUTS: dict[str, type[Edges]] = {"bsds500": Bsds500, "pascal": Pascal}
