"""What a scene is: things on a background, as numbers and names, without a pixel; and the names themselves.

A scene is laid out on a grid of *patches*, the unit of every length here: one patch of the picture is one vision token
of the model. Things are one to a few patches large, so what a question is about stands in a handful of known tokens
and most of the picture is background.
"""

from dataclasses import dataclass
from typing import NamedTuple

VERSION = 1
"""Version of the world: it changes whenever the same seed would give another scene, picture or question."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring", "moon", "arrow")
"""Shapes of things. An arrow points to the right. A thing can also be a :data:`SIGN`, which is none of these."""

SIGN = "sign"
"""The shape of a wide rectangle that carries a word or a number."""

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
PATTERNS = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "medium", "large")
OUTLINES = ("none", "dark", "light")

# fmt: off
WORDS = (
    "bank", "bird", "box", "bus", "cake", "cat", "desk", "dog", "door", "egg", "exit", "farm", "fire", "fish", "golf",
    "gym", "ice", "jazz", "key", "king", "leaf", "lion", "map", "menu", "milk", "open", "owl", "pen", "pub", "quiz",
    "rain", "ship", "snow", "soup", "stop", "sun", "taxi", "tea", "tree", "yoga",
)
"""Words that stand on signs; any two differ in at least two letters, and none is a word that questions use."""
# fmt: on

NUMBERS = tuple(str(number) for number in range(10, 100))
"""Numbers that stand on signs."""

LETTERS = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ")
"""Letters that stand on things: I and O are left out, as on number plates, for they look like 1 and 0."""

DIGITS = tuple("0123456789")
"""Digits that stand on things."""

FONTS = 3
"""Fonts that text is drawn in; ``Thing.font`` is the number of one."""

LETTERED = {"medium": {"circle", "square", "heart"}, "large": {"circle", "square", "heart", "diamond"}}
"""The shapes of each size that have room in the middle for a letter or a digit. Of medium things these alone can also
have two of a pattern, an outline and a text; others have one of them, or none could be seen at 12 pixels a patch."""

HELD_OUT = frozenset(
    {"circle": "purple", "square": "orange", "triangle": "white", "star": "green", "diamond": "red", "heart": "blue",
     "ring": "yellow", "moon": "black"}.items()
)  # fmt: skip
"""(shape, colour) pairs that no training scene contains; elsewhere they are as common as any other."""

SPLITS: dict[str, range] = {
    "train": range(0, 4_000_000),
    "validation": range(4_000_000, 4_100_000),
    "test": range(4_100_000, 4_200_000),
}
"""The scene seeds of each split. They are disjoint: no scene of one split is in another."""

BACKGROUNDS = ("clouds", "bricks", "wood", "speckle", "weave", "gradient")
"""Kinds of background."""

_COVERED = 0.12  # share of a patch from which on a thing counts as standing on it


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing of a scene.

    Attributes:
        x: Centre, patches from the left edge of the picture.
        y: Centre, patches from the top edge.
        width: Width of its box in patches.
        height: Height of its box in patches.
        shape: One of :data:`SHAPES`, or :data:`SIGN`.
        colour: One of :data:`COLOURS`.
        pattern: One of :data:`PATTERNS`; small things and signs are plain.
        size: One of :data:`SIZES`.
        outline: One of :data:`OUTLINES`; small things have none.
        text: What stands on it: one of :data:`WORDS` or :data:`NUMBERS` on a sign, one of :data:`LETTERS` or
            :data:`DIGITS` or nothing (``""``) on other things.
        font: Number of the text's font, below :data:`FONTS`; 0 without text.
    """

    x: float
    y: float
    width: float
    height: float
    shape: str
    colour: str
    pattern: str
    size: str
    outline: str
    text: str
    font: int

    @property
    def anchor(self) -> tuple[int, int]:
        """(row, col) of the patch that holds the centre. No two things of a scene have the same."""
        return int(self.y), int(self.x)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in patches."""
        across, along = self.width / 2, self.height / 2
        return self.x - across, self.y - along, self.x + across, self.y + along

    def cells(self, grid: int) -> tuple[tuple[int, int], ...]:
        """(row, col), in reading order, of every patch of a ``grid`` x ``grid`` picture that the thing stands on: its
        box covers more than 12 % of the patch. The anchor is always among them.
        """
        left, top, right, bottom = self.box
        anchor = self.anchor
        cells = []
        for row in range(max(int(top), 0), min(int(bottom) + 1, grid)):
            high = min(bottom, row + 1) - max(top, row)
            for col in range(max(int(left), 0), min(int(right) + 1, grid)):
                if (row, col) == anchor or high * (min(right, col + 1) - max(left, col)) > _COVERED:
                    cells.append((row, col))
        return tuple(cells)


class Blot(NamedTuple):
    """A blurred grey spot or bar of the background: clutter, not a thing. Lengths in patches."""

    x: float
    y: float
    width: float
    height: float
    shade: float
    """Brightness it adds, -1 (much darker) to 1 (much brighter)."""


@dataclass(frozen=True, slots=True)
class Background:
    """A muted backdrop of middle brightness.

    Attributes:
        kind: One of :data:`BACKGROUNDS`.
        base: RGB, 0 to 255, of most of it.
        accent: RGB, 0 to 255, that it shades into.
        scale: Length of its largest features (clouds, bricks, bands) in patches.
        strength: How rough the texture is, 0 (smooth) to 1.
        direction: Direction of bands and gradients, in sixteenths of a full turn.
        vignette: How much darker the corners are, 0 (not at all) to 1.
        seed: Seed of its noise, below 2**32.
        blots: The clutter.
    """

    kind: str
    base: tuple[int, int, int]
    accent: tuple[int, int, int]
    scale: float
    strength: float
    direction: int
    vignette: float
    seed: int
    blots: tuple[Blot, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """4 to 14 things, in reading order of their anchors, on a background ``grid`` patches wide and high.

    ``seed`` and ``hard`` are what it was sampled with.
    """

    seed: int
    grid: int
    hard: bool
    things: tuple[Thing, ...]
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
