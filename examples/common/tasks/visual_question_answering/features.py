"""Region features of plain images: a grid of cells, each described by colour and edges.

LXMERT reads features of detected objects. Where there is no detector, cells of a grid stand in:
a cell's features say which colours are in it and which directions its edges have, and its box says
where it is. Nothing is learned, and nothing depends on the other images.

Axes: ``N`` images, ``H`` and ``W`` pixels, ``C`` three colours, ``R`` regions (cells, row by row),
``F`` features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DIRECTIONS = 8
NUM_FEATURES = 6 + DIRECTIONS
_Floats = npt.NDArray[np.float32]


def grid_regions(images_NHWC: npt.NDArray[np.uint8], cells: int) -> tuple[_Floats, _Floats]:
    """Describe the cells of a regular grid.

    The features of a cell: the mean of each colour (-1 black, 1 white); four times the standard
    deviation of each colour; and the root of how much edge there is in each of eight directions
    between 0 and 180 degrees (a histogram of gradient directions, weighted by the gradient's
    length, shared between the two nearest directions; 1 is one edge from black to white across
    the cell). At every pixel the colour with the longest gradient counts.

    Args:
        images_NHWC: Colours from 0 to 255.
        cells: Cells along each side; must divide ``H`` and ``W``.

    Returns:
        Features with shape ``NRF``, and boxes with shape ``R4``: left, top, right and bottom as
        shares of the image, 0 to 1.

    Raises:
        ValueError: The array is no batch of colour images, or the grid does not divide it.

    Source:
        Dalal and Triggs, Histograms of Oriented Gradients, CVPR 2005 (the histogram of a cell).
    """
    if images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(
            f"images have shape {images_NHWC.shape}, not (images, height, width, 3 colours)"
        )
    height, width = images_NHWC.shape[1:3]
    if cells < 1 or height % cells or width % cells:
        raise ValueError(
            f"a grid of {cells} x {cells} cells does not divide images of {height} x {width} "
            "pixels; choose a divisor of both"
        )
    pixels = images_NHWC.astype(np.float32) / np.float32(255)
    colours = _cells(pixels, cells)
    edges = _cells(_edges(pixels), cells).sum(axis=2) / np.sqrt(height * width) * cells
    features = np.concatenate(
        [2 * colours.mean(axis=2) - 1, 4 * colours.std(axis=2), np.sqrt(edges)], axis=-1
    )
    return features.astype(np.float32), _boxes(cells)


def _cells(pixels_NHWX: _Floats, cells: int) -> _Floats:
    """Return the pixels of every cell: shape ``N, R, pixels of a cell, X``."""
    n, height, width, x = pixels_NHWX.shape
    h, w = height // cells, width // cells
    split = pixels_NHWX.reshape(n, cells, h, cells, w, x)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(n, cells * cells, h * w, x)


def _edges(pixels_NHWC: _Floats) -> _Floats:
    """Return each pixel's gradient length, spread over the two nearest directions."""
    down, right = np.gradient(pixels_NHWC, axis=(1, 2))
    length = np.hypot(down, right)
    strongest = length.argmax(axis=-1)[..., None]
    down, right, length = (
        np.take_along_axis(a, strongest, axis=-1)[..., 0] for a in (down, right, length)
    )
    direction = np.arctan2(down, right) % np.pi * (DIRECTIONS / np.pi)
    lower = np.floor(direction)
    upper_share = direction - lower
    spread = np.zeros((*length.shape, DIRECTIONS), dtype=np.float32)
    for offset, share in ((0, 1 - upper_share), (1, upper_share)):
        at = ((lower.astype(np.int64) + offset) % DIRECTIONS)[..., None]
        before = np.take_along_axis(spread, at, axis=-1)
        np.put_along_axis(spread, at, before + (length * share)[..., None], axis=-1)
    return spread


def _boxes(cells: int) -> _Floats:
    row, column = np.divmod(np.arange(cells * cells), cells)
    corners = np.stack([column, row, column + 1, row + 1], axis=1)
    return (corners / cells).astype(np.float32)
