"""Drawn streets with exact labels, and drawn shapes with exact boundaries, textured by photographs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import skimage.data
from scipy.ndimage import gaussian_filter
from skimage import draw, measure, morphology

# Ids that annotations of Cityscapes hold; the first three are ignored.
EGO_VEHICLE, OUT_OF_ROI, STATIC = 1, 3, 4
ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, PERSON, CAR = 7, 8, 11, 21, 23, 24, 26

Pixels = tuple[np.ndarray, np.ndarray]  # rows and columns


def textures() -> dict[str, np.ndarray]:
    """Grey photographs as float32, with mean 0 and standard deviation 1."""
    photographs = {name: getattr(skimage.data, name)().astype(np.float32) for name in ("brick", "grass", "gravel")}
    return {name: (pixels - pixels.mean()) / pixels.std() for name, pixels in photographs.items()}


class Canvas:
    """A picture and its labels, painted from back to front.

    Attributes:
        image: (H, W, 3), float32, 0 to 255 and beyond.
        labels: (H, W), uint8.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator, photographs: dict[str, np.ndarray]) -> None:
        self.image = np.zeros((height, width, 3), np.float32)
        self.labels = np.zeros((height, width), np.uint8)
        self._rng, self._photographs = rng, photographs

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]

    def texture(self, name: str) -> np.ndarray:
        """A piece of a photograph, (H, W), drawn at random."""
        photograph = self._photographs[name]
        top, left = (self._rng.integers(0, of - n + 1) for of, n in zip(photograph.shape, self.shape, strict=True))
        piece = photograph[top : top + self.shape[0], left : left + self.shape[1]]
        return piece[:, ::-1] if self._rng.random() < 0.5 else piece

    def paint(
        self,
        where: Pixels,
        colour: np.ndarray | tuple[float, ...],
        label: int,
        texture: str = "gravel",
        depth: float = 6,
    ) -> None:
        """Give pixels a colour, a label and a texture with that standard deviation."""
        grain = self.texture(texture)[where]
        self.image[where] = np.asarray(colour, np.float32) + depth * grain[:, None]
        self.labels[where] = label

    def box(self, top: float, left: float, bottom: float, right: float) -> Pixels:
        """The pixels of a rectangle."""
        return self.polygon((left, top), (right, top), (right, bottom), (left, bottom))

    def polygon(self, *corners: tuple[float, float]) -> Pixels:
        """The pixels of a polygon, of which the corners are given as x, y."""
        x, y = np.array(corners).T
        return draw.polygon(y, x, self.shape)

    def ellipse(self, y: float, x: float, radius_y: float, radius_x: float) -> Pixels:
        """The pixels of an ellipse."""
        return draw.ellipse(y, x, radius_y, radius_x, self.shape)


def _house(canvas: Canvas, left: float, right: float, top: float, bottom: float, rng: np.random.Generator) -> None:
    colours = ((150, 84, 66), (176, 150, 118), (136, 132, 130), (188, 172, 140), (112, 92, 88))
    colour = np.array(colours[rng.integers(len(colours))]) + rng.uniform(-14, 14, 3)
    canvas.paint(canvas.box(top, left, bottom, right), colour, BUILDING, "brick", 9)
    glass = np.array((70, 84, 102)) + rng.uniform(-25, 25, 3)
    step_x, step_y = rng.uniform(8, 12), rng.uniform(10, 14)
    for x in np.arange(left + 3, right - 5, step_x):
        for y in np.arange(top + 4, bottom - 8, step_y):
            canvas.paint(canvas.box(y, x, y + 0.5 * step_y, x + 0.45 * step_x), glass, BUILDING, depth=10)


def _tree(canvas: Canvas, x: float, foot: float, size: float, rng: np.random.Generator) -> None:
    canvas.paint(canvas.box(foot - size, x - size / 14, foot, x + size / 14), (82, 66, 50), VEGETATION)
    green = np.array((62, 98, 46)) + rng.uniform(-20, 20, 3)
    for _ in range(6):
        dx, dy = rng.normal(0, 0.17 * size, 2)
        radius = rng.uniform(0.18, 0.3) * size
        shade = green * rng.uniform(0.8, 1.15)
        canvas.paint(canvas.ellipse(foot - size + dy, x + dx, radius, radius), shade, VEGETATION, "grass", 18)


def _car(canvas: Canvas, x: float, foot: float, height: float, rng: np.random.Generator) -> None:
    canvas.image[canvas.ellipse(foot, x, height / 8, 0.95 * height)] *= 0.55  # its shadow is road
    colours = (
        (176, 32, 30),
        (34, 62, 150),
        (222, 222, 224),
        (30, 32, 36),
        (196, 160, 40),
        (120, 126, 134),
        (24, 100, 88),
    )
    colour = np.array(colours[rng.integers(len(colours))]) * rng.uniform(0.85, 1.1)
    half, top = 0.85 * height, foot - height
    for side in (-0.55, 0.55):
        canvas.paint(
            canvas.ellipse(foot - 0.12 * height, x + side * height, 0.17 * height, 0.17 * height), (24, 24, 26), CAR
        )
    roof, belt, floor = top, top + 0.42 * height, foot - 0.12 * height
    cabin = ((x - 0.62 * half, roof), (x + 0.62 * half, roof), (x + 0.86 * half, belt), (x - 0.86 * half, belt))
    canvas.paint(canvas.polygon(*cabin), 0.8 * colour, CAR, depth=2)
    pane = (x - 0.5 * half, roof + 2), (x + 0.5 * half, roof + 2), (x + 0.68 * half, belt), (x - 0.68 * half, belt)
    canvas.paint(canvas.polygon(*pane), (56, 70, 84), CAR, depth=5)
    canvas.paint(canvas.box(belt, x - half, floor, x + half), colour, CAR, depth=3)
    lamp = (250, 236, 190) if rng.random() < 0.5 else (196, 24, 20)
    for side in (-0.75, 0.75):
        where = canvas.ellipse(belt + 0.15 * height, x + side * half, 0.07 * height, 0.1 * height)
        canvas.paint(where, lamp, CAR, depth=3)


def _person(canvas: Canvas, x: float, foot: float, height: float, rng: np.random.Generator) -> None:
    skin = np.array(((224, 176, 144), (150, 102, 74), (92, 62, 46))[rng.integers(3)])
    coat, trousers = rng.uniform(20, 220, 3), rng.uniform(20, 110, 3)
    top, wide = foot - height, 0.19 * height
    for side in (-1, 1):
        hip, stand = x + 0.35 * side * wide, x + rng.uniform(0.3, 0.8) * side * wide
        leg = (hip - 0.42 * wide, foot - 0.5 * height), (hip + 0.42 * wide, foot - 0.5 * height)
        canvas.paint(
            canvas.polygon(*leg, (stand + 0.3 * wide, foot), (stand - 0.3 * wide, foot)), trousers, PERSON, depth=4
        )
    body = (x - wide, top + 0.2 * height), (x + wide, top + 0.2 * height)
    canvas.paint(
        canvas.polygon(*body, (x + 0.85 * wide, foot - 0.42 * height), (x - 0.85 * wide, foot - 0.42 * height)),
        coat,
        PERSON,
        depth=5,
    )
    canvas.paint(canvas.ellipse(top + 0.1 * height, x, 0.11 * height, 0.09 * height), skin, PERSON, depth=4)


def street(rng: np.random.Generator, photographs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A street with houses, trees, cars and people, in some light.

    Args:
        rng: what is drawn follows from it.
        photographs: of `textures`.

    Returns:
        The picture, (H, W, 3), uint8, about 128 by 256, and the labels, (H, W), uint8, ids of Cityscapes.
    """
    height, width = int(rng.integers(120, 137)), int(rng.integers(240, 273))
    canvas = Canvas(height, width, rng, photographs)
    horizon, vanishing = rng.uniform(0.38, 0.48) * height, rng.uniform(0.38, 0.62) * width

    zenith, haze = np.array((96, 140, 200)) + rng.uniform(-25, 25, 3), np.array((206, 214, 222))
    down = np.linspace(0, 1, height)[:, None, None] ** 0.7
    clouds = gaussian_filter(rng.normal(size=(height, width)), (4, 14))
    canvas.image[:] = zenith + (haze - zenith) * down + 18 * (clouds / clouds.std())[:, :, None]
    canvas.labels[:] = SKY

    x = -10.0
    while x < width:
        right = x + rng.uniform(26, 62)
        if rng.random() < 0.8:
            _house(canvas, x, right, rng.uniform(0.05, 0.7) * horizon, horizon + 8, rng)
        x = right + (rng.uniform(4, 20) if rng.random() < 0.3 else 0)

    pavement = np.array((164, 156, 148)) + rng.uniform(-16, 16, 3)
    canvas.paint(canvas.box(horizon, 0, height, width), pavement, SIDEWALK, "brick", 10)
    asphalt = np.full(3, rng.uniform(70, 100)) + rng.uniform(-6, 6, 3)
    near = rng.uniform(-0.1, 0.15, 2) * width
    far = (vanishing - 9, horizon), (vanishing + 9, horizon)
    canvas.paint(canvas.polygon(*far, (width - near[1], height), (near[0], height)), asphalt, ROAD, "gravel", 9)
    for a, b in ((0.15, 0.25), (0.4, 0.6), (0.8, 1.0)):  # dashes of the middle line, which are road
        middle = (near[0] + width - near[1]) / 2
        at = [(vanishing + (middle - vanishing) * t, horizon + (height - horizon) * t, 2.2 * t) for t in (a, b)]
        dash = [(x - w, y) for x, y, w in at] + [(x + w, y) for x, y, w in reversed(at)]
        canvas.paint(canvas.polygon(*dash), (206, 204, 196), ROAD)

    for _ in range(rng.integers(2, 6)):
        side = rng.choice((-1, 1))
        _tree(
            canvas,
            vanishing + side * rng.uniform(0.12, 0.55) * width,
            horizon + rng.uniform(3, 14),
            rng.uniform(34, 62),
            rng,
        )

    deep = height - horizon
    movers: list[tuple[float, float, Callable[..., None], float]] = []
    for _ in range(rng.integers(1, 5)):
        t = rng.uniform(0.25, 0.9)
        movers.append((t, rng.uniform(-0.36, 0.36) * width * (0.25 + t), _car, 9 + 0.46 * deep * t))
    for _ in range(rng.integers(2, 6)):
        t = rng.uniform(0.25, 0.9)
        movers.append((t, rng.uniform(-0.45, 0.45) * width * (0.5 + t), _person, 22 + 0.6 * deep * t))
    for t, aside, put, size in sorted(movers, key=lambda mover: mover[0]):
        put(canvas, vanishing + aside, horizon + deep * t, size, rng)

    if rng.random() < 0.4:
        x, foot = rng.uniform(0.05, 0.95) * width, horizon + rng.uniform(0.3, 0.8) * deep
        canvas.paint(canvas.box(foot - 14, x, foot, x + 9), (58, 74, 60), STATIC, depth=8)
    if rng.random() < 0.5:
        canvas.paint(canvas.ellipse(height + 4, width / 2, 14, 0.4 * width), (26, 28, 34), EGO_VEHICLE, depth=3)
    if rng.random() < 0.3:
        canvas.paint(canvas.box(0, 0, height, 2), (0, 0, 0), OUT_OF_ROI, depth=0)

    slope = 1 + rng.uniform(-0.15, 0.15) * np.linspace(-1, 1, width)[None, :, None]
    return _exposed(canvas.image * slope * rng.uniform(0.7, 1.15) * rng.uniform(0.93, 1.07, 3), rng, 4), canvas.labels


def _exposed(image: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """Through a lens and onto a sensor."""
    seen = gaussian_filter(image, (0.5, 0.5, 0)) + rng.normal(0, noise, image.shape)
    return seen.round().clip(0, 255).astype(np.uint8)


class Shapes(NamedTuple):
    """A picture of overlapping shapes.

    Attributes:
        image: (H, W, 3), uint8.
        regions: (H, W), uint16, a drawing for each annotator; every shape has its number, and the ground is 0.
    """

    image: np.ndarray
    regions: list[np.ndarray]


def _outline(radius: float, shape: tuple[int, int], rng: np.random.Generator) -> Callable[[float, float], Pixels]:
    """An ellipse or a polygon, to be put at y, x."""
    if rng.random() < 0.5:
        flat, turn = rng.uniform(0.5, 1), rng.uniform(0, np.pi)
        return lambda y, x: draw.ellipse(y, x, radius, radius * flat, shape, turn)
    corners = int(rng.integers(3, 8))
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners + rng.uniform(0, np.pi)
    reach = radius * rng.uniform(0.75, 1.15, corners)
    return lambda y, x: draw.polygon(y + reach * np.sin(angles), x + reach * np.cos(angles), shape)


def shapes(rng: np.random.Generator, photographs: dict[str, np.ndarray]) -> Shapes:
    """Overlapping shapes, as three people would draw their outlines.

    The first marks every shape, the second leaves small ones out, the third has each by up to a pixel beside its place.

    Args:
        rng: what is drawn follows from it.
        photographs: of `textures`.
    """
    height, width = (97, 145) if rng.random() < 0.7 else (145, 97)
    canvas = Canvas(height, width, rng, photographs)
    names = sorted(photographs)
    colours: list[np.ndarray] = []

    def colour() -> np.ndarray:
        # Neighbours that look alike would have a boundary that nobody can see.
        while True:
            drawn = rng.uniform(25, 230, 3)
            if all(np.linalg.norm(drawn - other) > 70 for other in colours):
                colours.append(drawn)
                return drawn

    def fill(where: Pixels, label: int) -> None:
        canvas.paint(where, colour(), label, names[rng.integers(len(names))], rng.uniform(6, 18))
        slope = rng.uniform(-0.2, 0.2, 2)
        canvas.image[where] *= (1 + slope[0] * (where[0] / height - 0.5) + slope[1] * (where[1] / width - 0.5))[:, None]

    fill(canvas.box(0, 0, height, width), 0)
    regions = [np.zeros((height, width), np.uint16) for _ in range(3)]
    radii = [*rng.uniform(14, 34, rng.integers(3, 6)), *rng.uniform(5, 8, rng.integers(1, 3))]
    for number, radius in enumerate(radii, 1):
        y, x = rng.uniform(0.08, 0.92, 2) * (height, width)
        # A pixel along one axis is within the usual tolerance, 0.0075 of the diagonal; along both it would not be.
        dy, dx = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))[rng.integers(5)]
        outline = _outline(radius, canvas.shape, rng)
        fill(outline(y, x), number)
        regions[0][outline(y, x)] = number
        if radius > 10:
            regions[1][outline(y, x)] = number
        regions[2][outline(y + dy, x + dx)] = number
    return Shapes(_exposed(canvas.image, rng, 5), regions)


def boundaries(regions: np.ndarray) -> np.ndarray:
    """The pixels at which another region begins to the right or below, as lines one pixel wide.

    Args:
        regions: (H, W), a number for each region.

    Returns:
        (H, W), bool.
    """
    edge = np.zeros(regions.shape, bool)
    edge[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    edge[:-1] |= regions[:-1] != regions[1:]
    return morphology.thin(edge)


def segments(regions: np.ndarray) -> np.ndarray:
    """The connected parts of regions, (H, W), uint16, numbered from 1."""
    return measure.label(regions.astype(int) + 1, connectivity=1).astype(np.uint16)
