"""Maps of boundary probabilities made thin: non-maximum suppression, and thinning of what passes a threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import morphology

# Over which orientations are taken, in pixels; and how much a neighbour has to be higher, so that of a ridge two pixels
# wide both stay and thinning decides.
_SIGMA, _TOLERANCE = 1.5, 1.01


def suppress(probability: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Keep what is highest across a boundary.

    As Dollar and Zitnick (Fast edge detection using structured forests, PAMI 2015) do: a pixel is compared with its two
    interpolated neighbours across the boundary, whose orientation is that of the smoothed map's curvature.

    Args:
        probability: (H, W), 0 to 1.

    Returns:
        (H, W), float32: the values that are not smaller than their neighbours, 0 elsewhere.
    """
    values = np.asarray(probability, np.float32)
    smooth = ndimage.gaussian_filter(values, _SIGMA, mode="nearest")
    dy, dx = np.gradient(np.pad(smooth, 2, mode="edge"))
    (dyy, dxy), (_, dxx) = np.gradient(dy), np.gradient(dx)
    dyy, dxy, dxx = (each[2:-2, 2:-2] for each in (dyy, dxy, dxx))
    # Where the curvature's larger eigenvalue points, or the smaller one's, whichever is the stronger: a ridge is bent
    # down across the boundary, its foot up.
    across = 0.5 * np.arctan2(2 * dxy, dxx - dyy) + np.where(dxx + dyy < 0, np.pi / 2, 0)
    step = np.stack([np.sin(across), np.cos(across)])
    here = np.indices(values.shape).astype(np.float32)
    highest = values * _TOLERANCE
    keep = np.ones(values.shape, bool)
    for sign in (1, -1):
        keep &= highest >= ndimage.map_coordinates(values, here + sign * step, order=1, mode="nearest")
    return np.where(keep, values, np.float32(0))


def thin(binary: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Lines one pixel wide in the middle of what is set, (H, W)."""
    thinned: NDArray[np.bool_] = morphology.thin(binary)
    return thinned
