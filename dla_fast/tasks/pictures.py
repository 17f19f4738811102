"""What predictions look like: labels in colour, outlines on the image, sheets of images with their classes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dla_fast.tasks.loading import open_image
from dla_fast.tasks.weights import Facts

_ON_A_SHEET, _COLUMNS = 24, 4
Picture = NDArray[np.uint8]


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def stems(paths: Sequence[Path]) -> list[str]:
    """What files about images are called: as they are, numbered where others have the name too."""
    times = Counter(path.stem for path in paths)
    return [path.stem if times[path.stem] == 1 else f"{i:05d}-{path.stem}" for i, path in enumerate(paths, 1)]


def palette(facts: Facts) -> Picture:
    """Colours of the classes, (C, 3): the data set's, or some that are told apart."""
    if facts.palette is not None:
        return np.array(facts.palette, np.uint8)
    from matplotlib import colormaps

    return (colormaps["turbo"](np.linspace(0.05, 0.95, len(facts.classes)))[:, :3] * 255).astype(np.uint8)


def indexed(labels: Picture, colours: Picture) -> bytes:
    """Labels (H, W) as a PNG whose pixels are the classes and whose palette shows them in colour."""
    picture = Image.fromarray(labels, "P")
    picture.putpalette(colours.ravel().tolist())
    return _png(picture)


def overlay(image: Image.Image, labels: Picture, colours: Picture, classes: Sequence[str]) -> bytes:
    """The image and its labels side by side in colour, with the names of the classes that are in it."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    mixed = (np.asarray(image) * 0.35 + colours[labels] * 0.65).astype(np.uint8)
    height = 5 * image.height / image.width
    figure = Figure(figsize=(10, height + 0.5), layout="constrained")
    for axes, picture in zip(figure.subplots(1, 2), (np.asarray(image), mixed), strict=True):
        axes.imshow(picture)
        axes.axis("off")
    shown = np.unique(labels)
    names = [Patch(facecolor=colours[i] / 255, edgecolor="black", linewidth=0.5, label=classes[i]) for i in shown]
    figure.legend(handles=names, loc="outside lower center", ncols=min(len(names), 8), frameon=False, fontsize=9)
    return _figure(figure)


def grey(values: NDArray[np.floating[Any]]) -> bytes:
    """Values (H, W) between 0 and 1 as a grey PNG, dark where they are high."""
    return _png(Image.fromarray(255 - np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)))


def outlined(image: Image.Image, boundaries: NDArray[np.floating[Any]]) -> bytes:
    """The image beside itself with boundaries (H, W) drawn on it, the stronger the likelier."""
    pixels = np.asarray(image)
    strength = np.clip(boundaries, 0, 1)[..., None]
    drawn = pixels * 0.5 * (1 - strength) + np.array([255, 40, 0]) * strength
    return _png(Image.fromarray(np.hstack([pixels, drawn.astype(np.uint8)])))


def contact_sheets(predictions: Sequence[tuple[Path, list[tuple[str, float]]]]) -> Iterator[bytes]:
    """Sheets of images, each with its likeliest classes as bars."""
    from matplotlib.figure import Figure

    for first in range(0, len(predictions), _ON_A_SHEET):
        part = predictions[first : first + _ON_A_SHEET]
        lines = -(-len(part) // _COLUMNS)
        figure = Figure(figsize=(3.2 * min(_COLUMNS, len(part)), 3.4 * lines), layout="constrained")
        grid = figure.subplots(2 * lines, min(_COLUMNS, len(part)), squeeze=False, height_ratios=[3, 1] * lines)
        for axes in grid.flat:
            axes.axis("off")
        for place, (path, best) in enumerate(part):
            row, column = divmod(place, _COLUMNS)
            picture, bars = grid[2 * row][column], grid[2 * row + 1][column]
            picture.imshow(open_image(path))
            picture.set_title(path.name, fontsize=8)
            _bars(bars, best[:3])
        yield _figure(figure)


def _bars(axes: Any, best: list[tuple[str, float]]) -> None:
    axes.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5))
    axes.barh(range(len(best)), [p for _, p in best], color="#9ecae1")
    for place, (name, p) in enumerate(best):
        axes.text(0.02, place, f"{name}  {p:.2f}", va="center", fontsize=8)


def _figure(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
