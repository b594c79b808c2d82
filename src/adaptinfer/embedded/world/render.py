"""Pictures of scenes, the same to the bit on every machine.

Only operations that IEEE arithmetic fixes are used, here and in :mod:`masks` and :mod:`backdrop`: ``+ - * /`` and
comparisons of floats, and integers. No sines or powers, no sums of floats in an order that a library chooses, no font
engine at run time: directions are constants, noise is integer hashing, letters come from an atlas.
"""

import numpy as np

from adaptinfer.embedded.world.backdrop import backdrop
from adaptinfer.embedded.world.masks import (
    CAPITAL_HEIGHT,
    COARSE,
    FINE,
    core_mask,
    pattern_mask,
    sampled,
    shape_mask,
    text_mask,
    window,
)
from adaptinfer.embedded.world.things import SIGN, Scene, Thing

_COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((214, 32, 38), (120, 4, 10)),
    "green": ((34, 158, 58), (6, 82, 24)),
    "blue": ((36, 74, 214), (8, 22, 112)),
    "yellow": ((248, 222, 40), (176, 146, 0)),
    "purple": ((134, 40, 176), (66, 6, 96)),
    "orange": ((246, 128, 18), (164, 74, 0)),
    "white": ((250, 250, 250), (168, 168, 172)),
    "black": ((14, 14, 16), (86, 86, 90)),
}
RGB = {name: first for name, (first, _) in _COLOURS.items()}
"""RGB, 0 to 255, of each colour of things. Backgrounds are of middle brightness and nearly grey, so equal to none."""

SHADES = {name: second for name, (_, second) in _COLOURS.items()}
"""The second colour of each colour's patterns: darker, for black lighter."""

OUTLINES = {"dark": (20, 20, 24), "light": (244, 244, 240)}
INKS = {"dark": (16, 16, 18), "light": (252, 252, 252)}
INK_ON = {name: "dark" if name in ("yellow", "orange", "white") else "light" for name in RGB}
"""The ink that text on each colour is written in."""

MIN_PATCH, MAX_PATCH = 4, 64

_SIGN_RIM = 0.09  # width of a sign's outline, patches
_LETTER_HEIGHT = 0.8  # of a letter on a thing, patches
_SMALL = 12  # smaller patches are drawn at this size or above and averaged

Array = np.ndarray


def render(scene: Scene, patch: int = 12) -> Array:
    """Draw a scene at ``patch`` pixels a patch: uint8 RGB [grid * patch, grid * patch, 3].

    The scene looks the same at every size: a large picture scaled down is the small picture, up to the filter.

    Raises:
        ValueError: ``patch`` is not a whole number from 4 to 64.
    """
    if not MIN_PATCH <= patch <= MAX_PATCH:
        raise ValueError(f"patch must be a whole number of pixels from {MIN_PATCH} to {MAX_PATCH}, got {patch}")
    times = -(-_SMALL // patch)
    if times > 1:  # too small for the textures: draw it larger and average
        side = scene.grid * patch
        blocks = render(scene, patch * times).reshape(side, times, side, times, 3)
        total = blocks.sum(axis=(1, 3), dtype=np.int32)
        return ((total + times * times // 2) // (times * times)).astype(np.uint8)
    canvas = backdrop(scene.background, scene.grid, patch)
    for thing in sorted(scene.things, key=lambda thing: -thing.width * thing.height):  # small ones lie on top
        _paint(canvas, thing, patch)
    canvas += np.float32(0.5)
    picture = np.empty((*canvas.shape[1:], 3), dtype=np.uint8)
    for channel, values in enumerate(canvas):
        picture[..., channel] = values
    return picture


def _paint(canvas: Array, thing: Thing, patch: int) -> None:
    """Blend one thing into the float canvas [3, side, side], in place."""
    left, top, right, bottom = (edge * patch for edge in thing.box)
    rows, row_edges = _pixels(top, bottom, canvas.shape[1])
    cols, col_edges = _pixels(left, right, canvas.shape[2])
    region = canvas[:, rows, cols]
    detail = COARSE if thing.width * patch <= COARSE // 2 else FINE
    places = window(row_edges, col_edges, detail, detail)
    cover = sampled(shape_mask(thing.shape, detail), places)
    fill = _colour(RGB[thing.colour])
    if thing.pattern != "plain":
        share = sampled(pattern_mask(thing.pattern, thing.size, detail), places)
        fill = fill + (_colour(SHADES[thing.colour]) - fill) * share
    # Light from above: a little brighter at the top, a little darker at the bottom.
    fill = fill * (1.06 - 0.14 * row_edges[:-1]).astype(np.float32)[:, None]
    if thing.outline != "none":
        region += cover * (_colour(OUTLINES[thing.outline]) - region)
        if thing.shape == SIGN:  # its rim is as wide above as at the sides, whatever the sign's proportions
            inset = _inset(row_edges, thing.height), _inset(col_edges, thing.width)
            cover = sampled(shape_mask(SIGN, detail), window(*inset, detail, detail))
        else:
            cover = sampled(core_mask(thing.shape, detail), places)
    region += cover * (fill - region)
    np.minimum(region, 255, out=region)
    if thing.text:
        _write(canvas, thing, patch)


def _write(canvas: Array, thing: Thing, patch: int) -> None:
    """Blend a thing's text into the float canvas, in place."""
    integral = text_mask(thing.text, thing.font)
    height, width = (side - 1 for side in integral.shape)
    if thing.shape == SIGN:
        rim = _SIGN_RIM if thing.outline != "none" else 0
        across, along = (thing.width - 0.2 - 2 * rim) / width, (thing.height - 0.18 - 2 * rim) / height
        across, along = min(across, along), min(along, across * 1.4)  # long words are of narrower letters
    else:
        along = _LETTER_HEIGHT / CAPITAL_HEIGHT
        across = min(along, 0.75 * _LETTER_HEIGHT / width)
    half_x, half_y = width * across / 2, height * along / 2
    rows, row_edges = _pixels((thing.y - half_y) * patch, (thing.y + half_y) * patch, canvas.shape[1])
    cols, col_edges = _pixels((thing.x - half_x) * patch, (thing.x + half_x) * patch, canvas.shape[2])
    region = canvas[:, rows, cols]
    cover = sampled(integral, window(row_edges, col_edges, height, width))
    region += cover * (_colour(INKS[INK_ON[thing.colour]]) - region)


def _colour(rgb: tuple[int, int, int]) -> Array:
    """float32 [3, 1, 1]."""
    return np.array(rgb, dtype=np.float32)[:, None, None]


def _inset(edges: Array, length: float) -> Array:
    """Places in a stretch of ``length`` patches as places in what a sign's rim leaves of it."""
    return (edges * length - _SIGN_RIM) / (length - 2 * _SIGN_RIM)


def _pixels(start: float, stop: float, side: int) -> tuple[slice, Array]:
    """The pixels that the stretch from ``start`` to ``stop`` (in pixels) touches, and where their edges lie in it:
    0 at its start, 1 at its end; float64 [pixels + 1].
    """
    first, last = max(int(start), 0), min(-int(-stop // 1), side)
    return slice(first, last), (np.arange(first, last + 1) - start) / (stop - start)
