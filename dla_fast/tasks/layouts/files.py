"""Folders and lists of data sets, looked for with a clear word where they are missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import loadmat

from dla_fast.tasks.errors import DataError

IMAGES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff", ".webp"))


def folder(root: Path, *names: str, layout: str) -> Path:
    """The first of the folders that is there.

    Raises:
        DataError: none is, or ``root`` is no folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder")
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: the layout {layout} needs a folder {' or '.join(names)} there")


def lines(path: Path, *, layout: str) -> list[str]:
    """The lines of a list, without those that are empty.

    Raises:
        DataError: it is not there, or is no text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file, and the layout {layout} needs it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read: {error}") from error


def images(parent: Path) -> list[Path]:
    """The images in a folder and below, in the order of their names, without hidden ones.

    Raises:
        DataError: there is none.
    """
    found = sorted(p for p in parent.rglob("*") if p.suffix.lower() in IMAGES and not p.name.startswith("."))
    if not found:
        raise DataError(f"{parent}: there is no image in it")
    return found


def home(root: Path, *names: str, layout: str, holds: str) -> Path:
    """The folder of a data set: the one given, or one in it that has one of the names it is published under.

    Args:
        root: what a person gave.
        names: folders to look for below ``root``.
        layout: for the error.
        holds: a file or folder by which it is known.

    Raises:
        DataError: none holds it, or ``root`` is no folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder")
    for place in (root, *(root / name for name in names)):
        if (place / holds).exists():
            return place
    raise DataError(f"{root}: the layout {layout} needs {holds} there, or in {' or '.join(names)}")


def whole(text: Any, where: str) -> int:
    """A whole number.

    Args:
        text: of the number, or itself.
        where: it is from, for the error.

    Raises:
        DataError: it is none.
    """
    try:
        return int(text)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {text!r} is no number, and a whole one was expected") from None


def present(paths: Sequence[Path], why: str) -> None:
    """Check that files are there.

    Args:
        paths: of the files.
        why: they are looked for, for the error.

    Raises:
        DataError: some are not; the first is named.
    """
    # A folder is listed once: a question for each file takes minutes on a network's disk.
    found = {
        parent: {entry.name for entry in os.scandir(parent)} for parent in {p.parent for p in paths} if parent.is_dir()
    }
    absent = [path for path in paths if path.name not in found.get(path.parent, ())]
    if absent:
        raise DataError(f"{absent[0]}: there is no such file, and {why} ({len(absent)} of {len(paths)} absent)")


def mat(path: Path, *names: str, layout: str) -> list[Any]:
    """Variables of a MATLAB file, with structs as objects and without dimensions of one.

    Args:
        path: of the file.
        names: of the variables.
        layout: for the error.

    Raises:
        DataError: the file is missing or none of MATLAB's, or a variable is not in it.
    """
    try:
        with path.open("rb") as file:
            content = loadmat(file, struct_as_record=False, squeeze_me=True)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file, and the layout {layout} needs it") from None
    # Its parser meets garbage with exceptions of any kind.
    except Exception as error:
        raise DataError(f"{path}: no readable MATLAB file: {' '.join(str(error).split())}") from error
    missing = [name for name in names if name not in content]
    if missing:
        raise DataError(f"{path}: no variable {missing[0]} in it, and the layout {layout} needs it")
    return [content[name] for name in names]


def pixels(path: Path) -> np.ndarray:
    """An image as it is stored: indices where it has a palette.

    Returns:
        (H, W) or (H, W, channels), integers, or bool where a pixel has one bit.

    Raises:
        DataError: it is missing, or broken.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    # Decoders raise whatever they like on broken files.
    except Exception as error:
        raise DataError(f"{path}: no readable image: {' '.join(str(error).split())}") from error
