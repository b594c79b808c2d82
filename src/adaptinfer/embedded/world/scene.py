"""How a scene is drawn at random from a seed.

Everything follows from one integer seed through :class:`Chance`; no global random state is read or changed, and the
same seed gives the same scene on every machine and every Python. :mod:`~adaptinfer.embedded.world.render` makes the
picture, :mod:`~adaptinfer.embedded.world.questions` the questions; nothing here knows about either.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.things import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    FONTS,
    HELD_OUT,
    LETTERED,
    LETTERS,
    NUMBERS,
    OUTLINES,
    PATTERNS,
    SHAPES,
    SIGN,
    SIZES,
    VERSION,
    WORDS,
    Background,
    Blot,
    Scene,
    Thing,
    split_of,
)

MIN_GRID = 12
MIN_THINGS, MAX_THINGS = 4, 14
MAX_ALIKE = 6
"""At most this many things of a scene share a shape, and at most this many a colour."""

GAP = 0.15
"""Patches of background between the boxes of any two things that do not overlap."""

MAX_OVERLAP = 0.25
"""The largest share of the smaller thing's box that an overlap covers."""

_WIDTHS = {"small": (0.85, 1.1), "medium": (1.4, 1.8), "large": (2.3, 3.0)}
_SIGN_WIDTHS = {"small": (2.0, 2.4), "medium": (2.4, 2.9), "large": (2.9, 3.4)}
_SIGN_HEIGHTS = (0.95, 1.3)
_OFF_CENTRE = 0.25  # the most a thing's centre is away from the middle of its patch, along each side
_PLACES = 60  # places that are tried for a thing before it is left out


def sample_scene(seed: int, grid: int = 16, hard: bool = False) -> Scene:
    """Draw a scene at random. The same arguments always give the same scene.

    One shape and one colour are common in it, so that counts from 0 to 5 are all frequent, and about a third of the
    things are distractors: an earlier thing with one attribute changed. In a hard scene everything is small.

    Raises:
        ValueError: The seed is in no split, or ``grid`` is below 12 patches.
    """
    if grid < MIN_GRID:
        raise ValueError(f"grid must be at least {MIN_GRID} patches, got {grid}")
    taboo = HELD_OUT if split_of(seed) == "train" else frozenset()
    chance = Chance("scene", VERSION, seed, grid, hard)
    things = _place(_sample_looks(chance, hard, taboo), grid, chance)
    while len(things) < MIN_THINGS:
        things = _place(_sample_looks(chance, hard, taboo), grid, chance)
    things.sort(key=lambda thing: thing.anchor)
    return Scene(seed, grid, hard, tuple(things), _sample_background(grid, chance))


class _Look(NamedTuple):
    """A thing without its place: the attributes of :class:`Thing` that are names."""

    shape: str
    colour: str
    pattern: str
    size: str
    outline: str
    text: str
    font: int


_Pairs = frozenset[tuple[str, str]]


def _sample_looks(chance: Chance, hard: bool, taboo: _Pairs) -> list[_Look]:
    count = chance.integer(8 if hard else MIN_THINGS, MAX_THINGS)
    signs = min(chance.weighted((0, 1, 2, 3), (10, 35, 35, 20) if hard else (24, 40, 27, 9)), count // 3 + 1)
    shape, colour = chance.choice(SHAPES), chance.choice(COLOURS)
    shape_share, colour_share = (chance.choice((0.0, 0.15, 0.3, 0.45, 0.6)) for _ in range(2))
    looks: list[_Look] = []
    shapes: Counter[str] = Counter()
    colours: Counter[str] = Counter()
    while len(looks) < count:
        of_sign = len(looks) < signs
        kin = looks if of_sign else looks[signs:]
        if kin and chance.happens(0.4):  # some break a rule below, and are not used
            look = _distractor(chance.choice(kin), chance, hard)
        else:
            look = _Look(
                SIGN if of_sign else shape if chance.happens(shape_share) else chance.choice(SHAPES),
                colour if chance.happens(colour_share) else chance.choice(COLOURS),
                "plain",
                "small" if hard else chance.weighted(SIZES, (40, 35, 25) if of_sign else (61, 22, 17)),
                "none",
                "",
                0,
            )
            look = _decorated(look, chance)
        if not _can_be_seen(look) or look[:2] in taboo:
            continue
        if shapes[look.shape] >= MAX_ALIKE or colours[look.colour] >= MAX_ALIKE:
            continue
        looks.append(look)
        shapes[look.shape] += 1
        colours[look.colour] += 1
    return looks


def _decorated(look: _Look, chance: Chance) -> _Look:
    """The bare look with what belongs on a thing of its shape and size: pattern, outline, text."""
    pattern, outline, text = "plain", "none", ""
    if look.shape == SIGN:
        text = chance.choice(WORDS if chance.happens(0.5) else NUMBERS)
    elif look.size != "small":
        if chance.happens(0.66):
            pattern = chance.choice(PATTERNS[1:])
        if look.shape in LETTERED[look.size] and chance.happens(0.85):
            text = chance.choice(LETTERS if chance.happens(0.6) else DIGITS)
    if look.size != "small" and chance.happens(0.4):
        outline = chance.choice(OUTLINES[1:])
    font = chance.integer(0, FONTS - 1) if text else 0
    return look._replace(pattern=pattern, outline=outline, text=text, font=font)


def _distractor(look: _Look, chance: Chance, hard: bool) -> _Look:
    """The same look but for one attribute."""
    pools: dict[str, tuple[str, ...]] = {"colour": COLOURS}
    if look.shape != SIGN:
        pools["shape"] = SHAPES
        if look.size != "small":
            pools["pattern"] = PATTERNS
    if look.text:
        pools["text"] = next(pool for pool in (WORDS, NUMBERS, LETTERS, DIGITS) if look.text in pool)
    if not hard:
        pools["size"] = SIZES
    attribute = chance.choice(list(pools))
    value = getattr(look, attribute)
    return look._replace(**{attribute: chance.choice([other for other in pools[attribute] if other != value])})


def _can_be_seen(look: _Look) -> bool:
    """Whether all that the look says can be told from a picture at 12 pixels a patch."""
    if (look.colour, look.outline) in (("black", "dark"), ("white", "light")):
        return False
    if look.shape == SIGN:
        return look.size != "small" or look.outline == "none"
    if look.size == "small":
        return look[2:6] == ("plain", "small", "none", "")
    if look.text and look.shape not in LETTERED[look.size]:
        return False
    extras = (look.pattern != "plain") + (look.outline != "none") + (look.text != "")
    return look.size == "large" or extras <= (2 if look.shape in LETTERED["medium"] else 1)


def _place(looks: list[_Look], grid: int, chance: Chance) -> list[Thing]:
    """The things with places, largest first. One that finds no room in a crowded scene is left out."""
    sized = []
    for look in looks:
        if look.shape == SIGN:
            sized.append((chance.uniform(*_SIGN_WIDTHS[look.size]), chance.uniform(*_SIGN_HEIGHTS), look))
        else:
            width = chance.uniform(*_WIDTHS[look.size])
            sized.append((width, width, look))
    sized.sort(key=lambda item: -item[0] * item[1])
    wants_overlap = chance.happens(0.3)  # not every pair finds a place
    things: list[Thing] = []
    boxes: list[tuple[float, float, float, float]] = []
    for width, height, look in sized:
        under = None
        if wants_overlap and things and chance.happens(0.5):
            under = chance.choice(things)
        place = None
        if under is not None and under.shape != SIGN and under.size != "small":
            place = _overlapping_place(width, height, under, boxes, grid, chance)
            wants_overlap = place is None
        place = place or _free_place(width, height, boxes, grid, chance)
        if place is None:
            continue
        x, y = place
        things.append(Thing(x, y, width, height, look.shape, look.colour, *look[2:]))
        boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
    return things


_Boxes = Sequence[tuple[float, float, float, float]]


def _free_place(width: float, height: float, boxes: _Boxes, grid: int, chance: Chance) -> tuple[float, float] | None:
    """A centre at which a box of this size lies in the picture, apart from the others; None if none was found."""
    half_width, half_height = width / 2, height / 2
    for _ in range(_PLACES):
        x, y = _centre(chance.random() * grid, chance), _centre(chance.random() * grid, chance)
        mine = (x - half_width, y - half_height, x + half_width, y + half_height)
        if _inside(x, half_width, grid) and _inside(y, half_height, grid) and _apart(*mine, boxes):
            return x, y
    return None


def _overlapping_place(
    width: float, height: float, under: Thing, boxes: _Boxes, grid: int, chance: Chance
) -> tuple[float, float] | None:
    """A centre at which a box lies on the edge of a thing that is larger, clear of the thing's middle; or None."""
    half_width, half_height = width / 2, height / 2
    left, top, right, bottom = under.box
    others = [box for box in boxes if box != under.box]
    reach_x, reach_y = half_width + under.width / 2, half_height + under.height / 2
    row, col = under.anchor
    for _ in range(_PLACES):
        x = _centre(under.x + chance.uniform(-reach_x, reach_x), chance)
        y = _centre(under.y + chance.uniform(-reach_y, reach_y), chance)
        if not (_inside(x, half_width, grid) and _inside(y, half_height, grid)):
            continue
        mine = (x - half_width, y - half_height, x + half_width, y + half_height)
        across = min(mine[2], right) - max(mine[0], left)
        along = min(mine[3], bottom) - max(mine[1], top)
        if across <= 0 or along <= 0 or not 0.06 <= across * along / (width * height) <= MAX_OVERLAP:
            continue
        # The whole anchor patch and what is written on the thing, which is less than a patch around the centre.
        middle = (
            min(col, under.x - 0.45),
            min(row, under.y - 0.45),
            max(col + 1, under.x + 0.45),
            max(row + 1, under.y + 0.45),
        )
        if _apart(*mine, [middle], gap=0.0) and _apart(*mine, others):
            return x, y
    return None


def _centre(position: float, chance: Chance) -> float:
    """A coordinate in the same patch as ``position``, near the patch's middle."""
    return int(position) + 0.5 + _OFF_CENTRE * (2 * chance.random() - 1)


def _inside(centre: float, half: float, grid: int) -> bool:
    return half <= centre <= grid - half


def _apart(left: float, top: float, right: float, bottom: float, boxes: _Boxes, gap: float = GAP) -> bool:
    left, top, right, bottom = left - gap, top - gap, right + gap, bottom + gap
    return not any(box[0] < right and left < box[2] and box[1] < bottom and top < box[3] for box in boxes)


def _sample_background(grid: int, chance: Chance) -> Background:
    grey = chance.uniform(100, 155)

    def muted(grey: float) -> tuple[int, int, int]:
        red, green, blue = (int(grey + chance.uniform(-13, 13)) for _ in range(3))
        return red, green, blue

    blots = []
    for _ in range(chance.integer(0, 7)):
        long, thin = chance.uniform(1.0, 5.0), chance.uniform(0.3, 1.5)
        width, height = (long, thin) if chance.happens(0.5) else (thin, long)
        shade = chance.uniform(0.4, 1.0) * (1 if chance.happens(0.5) else -1)
        blots.append(Blot(chance.uniform(0, grid), chance.uniform(0, grid), width, height, shade))
    return Background(
        kind=chance.choice(BACKGROUNDS),
        base=muted(grey),
        accent=muted(grey + chance.uniform(-28, 28)),
        scale=chance.uniform(1.6, 5.0),
        strength=chance.uniform(0.35, 1.0),
        direction=chance.integer(0, 15),
        vignette=chance.choice((0.0, chance.uniform(0.3, 1.0))),
        seed=chance.integer(0, 2**32 - 1),
        blots=tuple(blots),
    )
