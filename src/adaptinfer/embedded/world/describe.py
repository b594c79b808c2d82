"""What can be said about a scene's things without any doubt: attributes, and descriptions that fit one thing alone.

A *description* is the set of one or two attributes that a phrase names: ``the star`` (shape), ``the red striped
thing`` (colour, pattern). It may be used for a thing only if no other thing of the scene fits it.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Sequence
from functools import cached_property
from itertools import combinations

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.things import HELD_OUT, SIGN, SIZES, Scene, split_of
from adaptinfer.embedded.world.wordings import ATTRIBUTES, COLUMNS, THIRDS, phrase

DESCRIPTIONS: tuple[tuple[str, ...], ...] = (*combinations(ATTRIBUTES, 1), *combinations(ATTRIBUTES, 2))
"""All sets of one or two attributes."""

_PLACES = tuple((ATTRIBUTES.index(names[0]), ATTRIBUTES.index(names[-1])) for names in DESCRIPTIONS)
_SHAPE, _PATTERN, _SIZE, _TEXT = (ATTRIBUTES.index(name) for name in ("shape", "pattern", "size", "text"))

# Lengths in patches, between centres.
_CLEAR_OF_THIRDS, _CLEAR_OF_CELLS = 0.35, 0.2  # to the nearest border of a part of the picture
_NEXT, _NEAR, _NEAR_ACROSS = 1.0, 3.0, 1.0  # the thing directly beside another: from, to, and off the line at most
_ALONE, _ALONE_ACROSS, _GAP = 4.0, 1.6, 0.5  # where no other may be: along, across, and by which its edge stays off


class SceneView:
    """A scene as questions see it.

    Attributes:
        scene: The scene.
        looks: Per thing its (shape, colour, pattern, size, text).
        shapes: Numbers of the things that are no signs.
        signs: Numbers of the signs.
        taboo: (shape, colour) pairs that cannot occur in the scene's split. A question about one would give its answer
            away, and would teach a model in training that held-out things do not exist.
        asked: What was asked already (:attr:`adaptinfer.embedded.world.forms.Asked.subject`).
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.looks = [(t.shape, t.colour, t.pattern, t.size, t.text) for t in scene.things]
        self.shapes = [number for number, look in enumerate(self.looks) if look[_SHAPE] != SIGN]
        self.signs = [number for number, look in enumerate(self.looks) if look[_SHAPE] == SIGN]
        self.asked: set[tuple[str, ...]] = set()
        self.taboo = HELD_OUT if split_of(scene.seed) == "train" else frozenset()

    def value(self, number: int, attribute: str) -> str:
        return self.looks[number][ATTRIBUTES.index(attribute)]

    def values(self, attribute: str, numbers: Iterable[int] | None = None) -> list[str]:
        """The attribute's value of each thing, or of each of the things with these numbers."""
        place = ATTRIBUTES.index(attribute)
        return [self.looks[number][place] for number in (range(len(self.looks)) if numbers is None else numbers)]

    def varies(self, attribute: str) -> bool:
        """Whether the things that are no signs differ in the attribute. In hard scenes all are small and plain."""
        return len(set(self.values(attribute, self.shapes))) > 1

    def groups(self, *attributes: str, numbers: Iterable[int] | None = None) -> dict[tuple[str, ...], list[int]]:
        """The numbers of the things that share the values of the attributes, by those values."""
        places = [ATTRIBUTES.index(attribute) for attribute in attributes]
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number in range(len(self.looks)) if numbers is None else numbers:
            look = self.looks[number]
            groups[tuple(look[place] for place in places)].append(number)
        return dict(groups)

    def descriptions(self, number: int, allowed: Container[str] = ATTRIBUTES) -> list[tuple[str, ...]]:
        """The sets of one or two of the allowed attributes that fit this thing and no other."""
        return [names for names in self._unique[number] if names[0] in allowed and names[-1] in allowed]

    @cached_property
    def _unique(self) -> list[list[tuple[str, ...]]]:
        fits = Counter(key for look in self.looks for key in _keys(look))
        return [
            [
                names
                for which, (names, (first, last)) in enumerate(zip(DESCRIPTIONS, _PLACES, strict=True))
                if fits[which, look[first], look[last]] == 1 and _can_be_said(look, names)
            ]
            for look in self.looks
        ]

    def describe(self, number: int, chance: Chance, allowed: Container[str] = ATTRIBUTES) -> tuple[str, frozenset[str]]:
        """A phrase with its article that means this :meth:`describable` thing alone, and the attributes it names."""
        names = chance.choice(self.descriptions(number, allowed))
        return f"the {phrase(self.pick(number, names), chance)}", frozenset(names)

    def pick(self, number: int, attributes: Iterable[str]) -> dict[str, str]:
        """These attributes of a thing, for :func:`~adaptinfer.embedded.world.wordings.phrase`."""
        return {attribute: self.value(number, attribute) for attribute in attributes}

    def describable(self, allowed: Container[str] = ATTRIBUTES, numbers: Iterable[int] | None = None) -> list[int]:
        """Numbers of the things (of all, or of these) that a description fits alone."""
        chosen: Sequence[int] = range(len(self.looks)) if numbers is None else list(numbers)
        return [number for number in chosen if self.descriptions(number, allowed)]

    def at(self, number: int, across: bool) -> float:
        """The thing's distance from the left edge of the picture, or from its top edge, in patches."""
        thing = self.scene.things[number]
        return thing.x if across else thing.y

    def size_rank(self, number: int) -> int:
        """0 small, 1 medium, 2 large."""
        return SIZES.index(self.value(number, "size"))

    def third(self, number: int) -> str | None:
        """Name of the part of the picture, of 3 x 3, that the thing is in; None if it is near a border."""
        part = self._part(number, 3, _CLEAR_OF_THIRDS)
        return part and THIRDS[part[0]][part[1]]

    def cell(self, number: int) -> str | None:
        """Name of the cell of the 8 x 8 grid that the thing is in, column and row; None if it is near a border."""
        part = self._part(number, len(COLUMNS), _CLEAR_OF_CELLS)
        return part and f"{COLUMNS[part[1]]} {part[0] + 1}"

    def _part(self, number: int, parts: int, clear: float) -> tuple[int, int] | None:
        """(row, col) of the one of ``parts`` x ``parts`` that holds the centre, at least ``clear`` patches inside."""
        thing, side = self.scene.things[number], self.scene.grid / parts
        row, col = int(thing.y / side), int(thing.x / side)
        for at, part in ((thing.y, row), (thing.x, col)):
            if (part > 0 and at - part * side < clear) or (part < parts - 1 and (part + 1) * side - at < clear):
                return None
        return row, col

    def neighbour(self, number: int, side: str) -> int | None:
        """Number of the thing directly "left", "right", "above" or "below" of one; None if that can be doubted.

        It is near and straight on that side, and nothing else is anywhere near there.
        """
        things = self.scene.things
        one, found = things[number], None
        for other, thing in enumerate(things):
            right, down = thing.x - one.x, thing.y - one.y
            if side in ("left", "right"):
                along, across, half = (-right if side == "left" else right), abs(down), thing.height / 2
            else:
                along, across, half = (-down if side == "above" else down), abs(right), thing.width / 2
            if other == number or not 0 < along <= _ALONE or across > max(_ALONE_ACROSS, half + _GAP):
                continue
            if found is not None or not _NEXT <= along <= _NEAR or across > min(_NEAR_ACROSS, along / 2):
                return None
            found = other
        return found


def _keys(look: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """All that can be said of a thing, as keys (number of the description, its first value, its last)."""
    keys = [(which, look[first], look[last]) for which, (first, last) in enumerate(_PLACES)]
    if look[_SHAPE] == SIGN:
        # A sign is wide but low: whether it is a large thing is a matter of opinion, so it fits every size.
        other_sizes = [size for size in SIZES if size != look[_SIZE]]
        for which, (first, last) in enumerate(_PLACES):
            if _SIZE in (first, last):
                for size in other_sizes:
                    keys.append((which, size if first == _SIZE else look[first], size if last == _SIZE else look[last]))
    return keys


def _can_be_said(look: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether one would describe a thing this way. A sign that says something is always called one."""
    if "text" in names and not look[_TEXT]:
        return False
    if look[_SHAPE] == SIGN:
        return "size" not in names and "pattern" not in names and ("text" not in names or "shape" in names)
    return "pattern" not in names or look[_PATTERN] != "plain" or "shape" in names
