"""The scene world of the embedded model: what a scene is, how one is drawn at random, how it becomes a picture.

A scene is an 8 x 8 grid of cells with a few coloured shapes, each inside one cell. At the model's own resolution
(128 x 128 pixels, patches of 16) a cell is exactly one vision token, so the evidence for a question is a handful of
known tokens among 64, and most of the picture is background.

Everything follows from one integer seed; no global random state is read or changed. Questions live in
:mod:`adaptinfer.embedded.questions`; nothing here knows about models.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

GRID = 8
"""Cells along each side of a scene."""

SPLITS: dict[str, range] = {
    "train": range(0, 1_000_000),
    "validation": range(1_000_000, 1_100_000),
    "test": range(1_100_000, 1_200_000),
}
"""The scene seeds of each split. They are disjoint: no scene of one split is in another."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "green": (34, 158, 58),
    "blue": (36, 74, 214),
    "yellow": (248, 222, 40),
    "purple": (134, 40, 176),
    "orange": (246, 128, 18),
    "white": (250, 250, 250),
    "black": (14, 14, 16),
}
"""RGB, 0 to 255, of each object colour. Backgrounds are desaturated and of middle brightness, so never equal to one."""

_SUPERSAMPLES = 4  # sample points along each side of a pixel, for smooth edges
_NOISE_LATTICE = 24  # the background's texture has this many bumps a side, at any resolution

Array = np.ndarray


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape inside one cell.

    Attributes:
        row: Cell row, 0 (top) to 7.
        col: Cell column, 0 (left) to 7.
        shape: A key of :data:`SHAPES`.
        colour: A key of :data:`COLOURS`.
        size: Width of the object as a share of the cell's width, 0.60 to 0.95.
        x: Centre of the object within its cell, 0 to 1 from the left.
        y: Centre of the object within its cell, 0 to 1 from the top.
    """

    row: int
    col: int
    shape: str
    colour: str
    size: float
    x: float
    y: float

    @property
    def cell(self) -> tuple[int, int]:
        """(row, col) of the cell; the object's vision token is number ``row * GRID + col``."""
        return self.row, self.col


@dataclass(frozen=True)
class Background:
    """A muted backdrop: a gradient between two greyish colours, with stripes and soft noise.

    Attributes:
        start: RGB, 0 to 255, at one end of the gradient.
        end: RGB, 0 to 255, at the other end.
        angle: Direction of gradient and stripes in radians.
        stripes: Stripes across the picture.
        stripe_strength: Brightness amplitude of the stripes, 0 to 255.
        noise_strength: Brightness amplitude of the noise, 0 to 255.
        noise_seed: Seed of the noise.
    """

    start: tuple[int, int, int]
    end: tuple[int, int, int]
    angle: float
    stripes: float
    stripe_strength: float
    noise_strength: float
    noise_seed: int


@dataclass(frozen=True)
class Scene:
    """4 to 10 objects, at most one in a cell, on a background. ``seed`` is the seed it was sampled from."""

    seed: int
    objects: tuple[SceneObject, ...]
    background: Background


def split_of(seed: int) -> str:
    """The name of the split a scene seed belongs to.

    Raises:
        ValueError: The seed is in no split.
    """
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"seed {seed} is in no split; splits are {SPLITS}")


def sample_scene(seed: int) -> Scene:
    """Draw a scene at random. The same seed always gives the same scene.

    One shape and one colour are repeated up to five times, the others are mixed, so that counts from 0 to 5 are all
    common; no shape and no colour appears more than five times.
    """
    rng = random.Random(seed)
    count = rng.randint(4, 10)
    shapes = _repeating(list(SHAPES), count, rng)
    colours = _repeating(list(COLOURS), count, rng)
    cells = rng.sample(range(GRID * GRID), count)
    objects = []
    for cell, shape, colour in zip(cells, shapes, colours, strict=True):
        size = rng.uniform(0.60, 0.95)
        x, y = (0.5 + rng.uniform(-0.5, 0.5) * (0.97 - size) for _ in range(2))  # stays inside the cell
        objects.append(SceneObject(cell // GRID, cell % GRID, shape, colour, size, x, y))
    return Scene(seed, tuple(objects), _sample_background(rng))


def render(scene: Scene, size: int) -> Image.Image:
    """Draw a scene as an RGB picture of ``size`` x ``size`` pixels.

    The scene looks the same at every size: a large picture scaled down is the small picture, up to the filter.

    Raises:
        ValueError: ``size`` is less than one pixel a cell.
    """
    if size < GRID:
        raise ValueError(f"size must be at least {GRID} pixels, one a cell; got {size}")
    canvas = _render_background(scene.background, size)
    for item in scene.objects:
        _paint(canvas, item, size)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


def _repeating(names: list[str], count: int, rng: random.Random) -> list[str]:
    """``count`` names in random order: one of them repeated 1 to 5 times, the others at random, none over five."""
    theme = rng.choice(names)
    drawn = [theme] * min(rng.randint(1, 5), count)
    others = [name for name in names if name != theme] * 5
    drawn += rng.sample(others, count - len(drawn))
    rng.shuffle(drawn)
    return drawn


def _sample_background(rng: random.Random) -> Background:
    def muted() -> tuple[int, int, int]:
        grey = rng.uniform(95, 165)
        red, green, blue = (round(grey + rng.uniform(-16, 16)) for _ in range(3))
        return red, green, blue

    return Background(
        start=muted(),
        end=muted(),
        angle=rng.uniform(0, 2 * math.pi),
        stripes=rng.uniform(4, 20),
        stripe_strength=rng.choice((0.0, rng.uniform(3, 12))),
        noise_strength=rng.uniform(0, 9),
        noise_seed=rng.randrange(2**31),
    )


def _render_background(background: Background, size: int) -> Array:
    """Float RGB canvas (size, size, 3), 0 to 255."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5).astype(np.float32)
    along = math.cos(background.angle) * axis[None, :] + math.sin(background.angle) * axis[:, None]
    start, end = (np.array(rgb, dtype=np.float32) for rgb in (background.start, background.end))
    brightness = background.stripe_strength * np.sin(2 * math.pi * background.stripes * along)
    lattice = np.random.default_rng(background.noise_seed).standard_normal((_NOISE_LATTICE, _NOISE_LATTICE))
    noise = Image.fromarray(lattice.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    brightness = brightness + background.noise_strength * np.clip(np.asarray(noise), -2, 2)
    return start + (end - start) * (along + 0.5)[..., None] + brightness[..., None]


def _paint(canvas: Array, item: SceneObject, size: int) -> None:
    """Blend one object into the canvas, in place, with a supersampled edge."""
    rows, cols = (
        np.arange(math.floor(cell * size / GRID), math.ceil((cell + 1) * size / GRID)) for cell in (item.row, item.col)
    )
    offsets = (np.arange(_SUPERSAMPLES) + 0.5) / _SUPERSAMPLES
    points = [(pixels[:, None] + offsets).ravel() * GRID / size for pixels in (cols, rows)]  # in cells
    u = (points[0] - item.col - item.x) * 2 / item.size  # -1 to 1 across the object
    v = (points[1] - item.row - item.y) * 2 / item.size
    inside = SHAPES[item.shape](u[None, :].astype(np.float32), v[:, None].astype(np.float32))
    cover = inside.reshape(len(rows), _SUPERSAMPLES, len(cols), _SUPERSAMPLES).mean(axis=(1, 3), dtype=np.float32)
    patch = canvas[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    patch += cover[..., None] * (np.array(COLOURS[item.colour], dtype=np.float32) - patch)


# Shapes as point sets: u runs from -1 (left) to 1 (right), v from -1 (top) to 1 (bottom); True inside.


def _circle(u: Array, v: Array) -> Array:
    return u * u + v * v <= 1


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.88


def _triangle(u: Array, v: Array) -> Array:
    return (np.abs(u) <= (v + 1) / 1.85) & (v <= 0.85)


def _star(u: Array, v: Array) -> Array:
    # Five points are one point, folded: only the angle to the nearest point matters.
    radius, angle = np.hypot(u, v), np.arctan2(u, -v)
    fifth = 2 * math.pi / 5
    angle = np.abs((angle + fifth / 2) % fifth - fifth / 2)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    inner_x, inner_y = 0.42 * math.cos(fifth / 2), 0.42 * math.sin(fifth / 2)
    return inner_y * (x - 1) + (1 - inner_x) * y <= 0


def _cross(u: Array, v: Array) -> Array:
    u, v = np.abs(u), np.abs(v)
    return (np.minimum(u, v) <= 0.32) & (np.maximum(u, v) <= 1)


def _diamond(u: Array, v: Array) -> Array:
    return np.abs(u) / 0.78 + np.abs(v) <= 1


def _heart(u: Array, v: Array) -> Array:
    x, y = 1.14 * u, 0.12 - 1.12 * v
    return (x * x + y * y - 1) ** 3 - x * x * y**3 <= 0


def _ring(u: Array, v: Array) -> Array:
    square = u * u + v * v
    return (square <= 1) & (square >= 0.55**2)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
    "ring": _ring,
}
"""Each shape's name and its point set: (u, v) from -1 to 1 across the object, True inside."""
