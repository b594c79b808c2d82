"""Bitmaps of shapes, patterns and words, and how much of each pixel of a picture they cover.

Every mask is a bitmap of fixed size kept as its integral, so that the share of each pixel that it covers, at any place
and size, is a handful of look-ups: that is all the anti-aliasing there is. Letters come from an atlas (``glyphs.png``,
drawn once from the DejaVu fonts, which are free to embed and change, by ``research/training/make_glyphs.py``).
"""

from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from adaptinfer.embedded.world.things import SIGN

GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
"""What the atlas holds, left to right; one row a font."""

GLYPH_WIDTH, GLYPH_HEIGHT, BASELINE, CAPITAL_HEIGHT = 72, 66, 49, 40
ATLAS = Path(str(resources.files("adaptinfer.embedded.world") / "glyphs.png"))

COARSE, FINE = 64, 256
"""Sides of the bitmaps of shapes and patterns: for things up to half as many pixels wide, and for larger ones."""

_POINTS = 512  # sample points along each side of a mask
_RIM = 0.06  # width of an outline as a share of the thing's width

Array = np.ndarray


class Window(NamedTuple):
    """Where a lattice of rectangles lies on a bitmap: the bitmap's row (column) before each edge, intp, and how far on
    the edge is towards the next one, float64, both [edges] (for columns [1, edges]); and 255 times the area of a
    rectangle, in pixels of the bitmap.
    """

    rows: Array
    row_shares: Array
    cols: Array
    col_shares: Array
    area: float


def window(row_edges: Array, col_edges: Array, height: int, width: int) -> Window:
    """A lattice with these edges (0 at the bitmap's top or left, 1 at its end) on a bitmap of this size."""
    area = (row_edges[1] - row_edges[0]) * (col_edges[1] - col_edges[0]) * (height * width * 255)
    places = np.minimum(np.maximum(row_edges, 0), 1) * height, np.minimum(np.maximum(col_edges, 0), 1) * width
    rows, cols = (
        np.minimum(place.astype(np.intp), side - 1) for place, side in zip(places, (height, width), strict=True)
    )
    return Window(rows, (places[0] - rows)[:, None], cols, places[1] - cols, float(area))


def sampled(integral: Array, window: Window) -> Array:
    """The mean of a bitmap, given as its integral, over each rectangle: float32 [rows, cols], 0 to 1; beyond the
    bitmap counts as 0. The mean is exact: an integral is linear between the pixels' edges.
    """
    low = integral.take(window.rows, axis=0)
    strips = low + (integral.take(window.rows + 1, axis=0) - low) * window.row_shares
    strips = strips[1:] - strips[:-1]
    low = strips.take(window.cols, axis=1)
    sums = low + (strips.take(window.cols + 1, axis=1) - low) * window.col_shares
    return ((sums[:, 1:] - sums[:, :-1]) / window.area).astype(np.float32)


def _integral(bitmap: Array) -> Array:
    """Integral of a bitmap of whole numbers: float64 [height + 1, width + 1], exact."""
    total = np.zeros((bitmap.shape[0] + 1, bitmap.shape[1] + 1), dtype=np.int64)
    total[1:, 1:] = bitmap.astype(np.int64).cumsum(axis=0).cumsum(axis=1)
    return total.astype(np.float64)


def _points() -> tuple[Array, Array]:
    """(u, v) of the sample points, float64 [1, _POINTS] and [_POINTS, 1], -1 to 1 from left and from top."""
    line = (2 * np.arange(_POINTS) + 1 - _POINTS) / _POINTS
    return line[None, :], line[:, None]


def _mask(inside: Array, detail: int) -> Array:
    """The integral of a point set, given at the sample points, as a bitmap ``detail`` pixels a side."""
    samples = _POINTS // detail
    counts = inside.reshape(detail, samples, detail, samples).sum(axis=(1, 3))
    return _integral(counts * 255 // (samples * samples))


@cache
def _inside(shape: str) -> Array:
    """A shape's sample points: bool [_POINTS, _POINTS]."""
    u, v = _points()
    if shape in _FORMULAS:
        return _FORMULAS[shape](u, v)
    inside = np.zeros((_POINTS, _POINTS), dtype=bool)
    corners = _POLYGONS[shape]
    for (x, y), (next_x, next_y) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y != next_y:  # even-odd rule: toggle what lies left of the edge
            inside ^= ((v < y) != (v < next_y)) & (u < x + (next_x - x) * ((v - y) / (next_y - y)))
    return inside


@cache
def shape_mask(shape: str, detail: int) -> Array:
    """The integral of a shape's bitmap, ``detail`` pixels a side; the shape fills it from edge to edge."""
    return _mask(_inside(shape), detail)


@cache
def core_mask(shape: str, detail: int) -> Array:
    """A shape without the rim that its outline takes."""
    reach = int(_RIM * _POINTS)
    padded = np.pad(_inside(shape), reach)
    core = _inside(shape).copy()
    for across in range(-reach, reach + 1):  # what stays inside when the shape moves by a rim's width in any direction
        along = 0
        while (along + 1) ** 2 + across**2 <= reach**2:
            along += 1
        for down in (reach - along, reach + along):
            core &= padded[down : down + _POINTS, reach + across : reach + across + _POINTS]
    return _mask(core, detail)


@cache
def pattern_mask(pattern: str, size: str, detail: int) -> Array:
    """Where a thing has its second colour."""
    periods = _PERIODS[size][pattern]
    across, along = ((axis + 1) / 2 * periods for axis in _points())
    if pattern == "striped":
        return _mask(_phase(across + along) < 0.5, detail)
    across, along = _phase(across), _phase(along)
    if pattern == "checked":
        return _mask((across < 0.5) != (along < 0.5), detail)
    across, along = across - 0.5, along - 0.5
    return _mask(across * across + along * along < 0.3 * 0.3, detail)


def _phase(places: Array) -> Array:
    return places - np.floor(places)


@cache
def _atlas() -> Array:
    """The glyphs: uint8 [fonts, glyphs, GLYPH_HEIGHT, GLYPH_WIDTH]."""
    with Image.open(ATLAS) as picture:
        pixels = np.asarray(picture.convert("L"))
    fonts = len(pixels) // GLYPH_HEIGHT
    return pixels.reshape(fonts, GLYPH_HEIGHT, len(GLYPHS), GLYPH_WIDTH).swapaxes(1, 2)


@cache
def text_mask(text: str, font: int) -> Array:
    """The integral of a word: its glyphs side by side, cropped to the ink."""
    parts = []
    for letter in text:
        glyph = _atlas()[font, GLYPHS.index(letter)]
        inked = np.flatnonzero(glyph.any(axis=0))
        parts += [glyph[:, inked[0] : inked[-1] + 1], np.zeros((GLYPH_HEIGHT, 5), dtype=np.uint8)]
    word = np.concatenate(parts[:-1], axis=1)
    inked = np.flatnonzero(word.any(axis=1))
    return _integral(word[inked[0] : inked[-1] + 1])


_FORMULAS: dict[str, Callable[[Array, Array], Array]] = {
    SIGN: lambda u, v: (abs(u) <= 1) & (abs(v) <= 1),
    "square": lambda u, v: (abs(u) <= 1) & (abs(v) <= 1),
    "circle": lambda u, v: u * u + v * v <= 1,
    "ring": lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= 0.45 * 0.45),
    "moon": lambda u, v: _moon(0.8 * u - 0.2, v),
    "heart": lambda u, v: _heart(1.14 * u, 0.12 - 1.12 * v),
}
"""Shapes as point sets: u runs from -1 (left) to 1 (right), v from -1 (top) to 1 (bottom); True inside."""


def _moon(x: Array, y: Array) -> Array:
    bite = x - 0.62
    return (x * x + y * y <= 1) & (bite * bite + y * y >= 0.78 * 0.78)


def _heart(x: Array, y: Array) -> Array:
    ball = x * x + y * y - 1
    return ball * ball * ball - x * x * (y * y * y) <= 0


_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "triangle": ((0.0, -1.0), (1.0, 1.0), (-1.0, 1.0)),
    "diamond": ((0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)),
    "cross": (
        (-0.34, -1.0), (0.34, -1.0), (0.34, -0.34), (1.0, -0.34), (1.0, 0.34), (0.34, 0.34),
        (0.34, 1.0), (-0.34, 1.0), (-0.34, 0.34), (-1.0, 0.34), (-1.0, -0.34), (-0.34, -0.34),
    ),
    "arrow": ((-1.0, -0.36), (0.05, -0.36), (0.05, -0.95), (1.0, 0.0), (0.05, 0.95), (0.05, 0.36), (-1.0, 0.36)),
    # Five points at radius 1 and, between them, five at 0.44; stretched to fill the box.
    "star": (
        (0.0, -1.0), (0.2719, -0.2879), (1.0, -0.2361), (0.44, 0.2550), (0.6180, 1.0),
        (0.0, 0.5916), (-0.6180, 1.0), (-0.44, 0.2550), (-1.0, -0.2361), (-0.2719, -0.2879),
    ),
}  # fmt: skip
"""The corners of shapes with straight edges."""


_PERIODS = {"medium": {"striped": 3, "dotted": 3, "checked": 2}, "large": {"striped": 4, "dotted": 4, "checked": 3}}
"""How often each pattern repeats across a thing of each size."""
