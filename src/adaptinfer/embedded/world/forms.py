"""The forms of questions about one scene. Each function asks one at random, or returns None if the scene has none.

Whether a question can be asked never depends on its answer, and nothing that its words name goes with an answer more
often than another: yes and no are tossed for before it is known what about, and only for what could be either.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.describe import SceneView
from adaptinfer.embedded.world.things import COLOURS, NUMBERS, PATTERNS, SHAPES, SIGN, WORDS
from adaptinfer.embedded.world.wordings import ATTRIBUTES, FARTHEST, a, phrase, put, symbol_of

MAX_COUNT = 6
"""The largest number that is ever the answer of a count."""

MAX_LISTED = 4
"""The most things that a caption lists."""

_HARD_NEGATIVES = 0.8  # share of the "no" for which both attributes are in the scene, but not together
APART = 1.0
"""Patches by which places must differ to be compared."""


# What may describe a thing when one attribute of it is asked for. Only medium and large things have patterns and text,
# and only some shapes have text, so these would give each other away.
_DESCRIBED_BY: dict[str, tuple[str, ...]] = {
    "shape": ("colour", "pattern", "size"),
    "colour": ("shape", "pattern", "size", "text"),
    "pattern": ("shape", "colour"),
    "size": ("shape", "colour"),
    "text": ("shape", "colour", "pattern", "size"),
}

# How much a number is preferred as the answer of a count, against how rare it is in scenes.
_COUNT_WEIGHTS = (0.7, 1.0, 1.2, 1.6, 2.4, 3.0, 3.6)

# How much the values that are common in scenes are preferred as answers: if any value may be chosen, and for "it".
_WEIGHTS = {"plain": 0.5, "small": 0.5}
_WEIGHTS_OF_IT = {"plain": 0.06, "small": 0.15}


class Asked(NamedTuple):
    """A question about one scene.

    Attributes:
        text: The question.
        answer: Its answer.
        evidence: Numbers of the things that it asks about or that its answer depends on, in any order.
        subject: What is asked, whatever the wording: equal for equal questions.
        about: Number of the one thing that a next turn can call "it", if there is one.
        told: The attributes of that thing that question and answer name.
    """

    text: str
    answer: str
    evidence: Collection[int]
    subject: tuple[str, ...]
    about: int | None = None
    told: frozenset[str] = frozenset()


Form = Callable[[SceneView, Chance], Asked | None]


def _exists_together(
    view: SceneView,
    chance: Chance,
    pivot: str,
    other: str,
    numbers: Sequence[int],
    domain: Sequence[str],
    taboo: Collection[tuple[str, str]] = (),
) -> Asked | None:
    """Whether some thing has one value of ``pivot`` and one of ``other``.

    The value of the pivot is chosen among those for which yes and no are both possible with values of ``other`` from
    the scene and were not asked about, so the answer does not go with it; all values of ``other`` are alike to it.
    """
    groups = view.groups(pivot, other, numbers=numbers)
    there = {pair[1] for pair in groups}

    def fresh(value: str, found: bool, names: Collection[str]) -> list[str]:
        """The names that go with the value or not, of which one may still ask."""
        return [
            name
            for name in domain
            if name in names
            and ((value, name) in groups) == found
            and (value, name) not in taboo
            and _subject("exists", {pivot: value, other: name}) not in view.asked
        ]

    values = dict.fromkeys(pair[0] for pair in groups)
    options = {value: (fresh(value, True, there), fresh(value, False, there)) for value in values}
    options = {value: names for value, names in options.items() if all(names)}
    if not options:
        return None
    value = chance.choice(list(options))
    present, absent = options[value]
    if chance.happens(0.5):
        name = chance.choice(present)
    elif chance.happens(_HARD_NEGATIVES):
        name = chance.choice(absent)
    else:
        name = chance.choice(fresh(value, False, set(domain) - there) or absent)
    return _exists({pivot: value, other: name}, groups.get((value, name), []), chance)


def _exists(look: dict[str, str], found: list[int], chance: Chance) -> Asked:
    """Whether there is something that looks so, with the numbers of what does."""
    text = put("exists", chance, a=a(phrase(look, chance)))
    about = found[0] if len(found) == 1 else None
    return Asked(text, "yes" if found else "no", found, _subject("exists", look), about, frozenset(look))


def _subject(form: str, look: dict[str, str]) -> tuple[str, ...]:
    return form, *(f"{name} {look[name]}" for name in sorted(look))


def exists_colour(view: SceneView, chance: Chance) -> Asked | None:
    return _exists_together(view, chance, "shape", "colour", range(len(view.looks)), COLOURS, taboo=view.taboo)


def exists_pattern(view: SceneView, chance: Chance) -> Asked | None:
    return _exists_together(view, chance, "pattern", "shape", view.shapes, SHAPES)


def exists_size(view: SceneView, chance: Chance) -> Asked | None:
    return _exists_together(view, chance, "size", "shape", view.shapes, SHAPES)


def exists_coloured_pattern(view: SceneView, chance: Chance) -> Asked | None:
    patterned = [number for number in view.shapes if view.value(number, "pattern") != "plain"]
    return _exists_together(view, chance, "pattern", "colour", patterned, COLOURS)


def exists_symbol(view: SceneView, chance: Chance) -> Asked | None:
    """``is there a red thing with the letter A``; most "no" have the letter on things of other colours."""
    lettered = [number for number in view.shapes if view.value(number, "text")]
    return _exists_together(view, chance, "text", "colour", lettered, COLOURS)


def exists_sign(view: SceneView, chance: Chance) -> Asked | None:
    """``is there a sign that says cat``; most "no" name a colour that no sign with that text has, or another text."""
    if not view.signs:
        return None
    number = chance.choice(view.signs)
    look = view.pick(number, ("shape", "text"))
    is_word = look["text"] in WORDS
    with_colour = chance.happens(0.5)
    if with_colour:
        look["colour"] = view.value(number, "colour")
    if chance.happens(0.5):
        if with_colour and chance.happens(0.5):
            taken = {view.value(sign, "colour") for sign in view.signs if view.value(sign, "text") == look["text"]}
            look["colour"] = chance.choice([colour for colour in COLOURS if colour not in taken])
        else:
            taken = set(view.values("text", view.signs))
            look["text"] = chance.choice([text for text in (WORDS if is_word else NUMBERS) if text not in taken])
    found = [sign for sign in view.signs if view.pick(sign, look) == look]
    return _exists(look, found, chance)


def attribute(view: SceneView, chance: Chance) -> Asked | None:
    """One attribute of the one thing that one or two others describe, its values about equally often."""
    for name in chance.shuffle(ATTRIBUTES):
        numbers = range(len(view.looks)) if name == "colour" else view.shapes
        if name == "text":
            numbers = [number for number in numbers if view.value(number, "text")]
        by_value = view.groups(name, numbers=view.describable(_DESCRIBED_BY[name], numbers))
        if not by_value or (name in ("pattern", "size") and len(by_value) < 2):
            continue  # where all are small, as in hard scenes, the answer is known
        values = [value for (value,) in by_value]
        value = chance.weighted(values, [_WEIGHTS.get(value, 1.0) for value in values])
        number = chance.choice(by_value[value,])
        the, told = view.describe(number, chance, _DESCRIBED_BY[name])
        if name == "text":
            text = put("symbol", chance, symbol=symbol_of(value), the=the)
        else:
            text = put("attribute", chance, attribute=name, the=the)
        return Asked(text, value, [number], (name, str(number)), number, told | {name})
    return None


def _count(
    view: SceneView, chance: Chance, names: Sequence[tuple[str, ...]], attributes: tuple[str, ...]
) -> Asked | None:
    """How many things have the values of some name, which is chosen by its count."""
    groups = view.groups(*attributes)
    by_count: dict[int, list[tuple[str, ...]]] = {}
    for name in names:
        by_count.setdefault(len(groups.get(name, ())), []).append(name)
    counts = [count for count in sorted(by_count) if count <= MAX_COUNT]
    count = chance.weighted(counts, [_COUNT_WEIGHTS[count] for count in counts])
    name = chance.choice(by_count[count])
    group = phrase(dict(zip(attributes, name, strict=True)), chance, plural=True)
    return Asked(put("count", chance, group=group), str(count), groups.get(name, ()), ("count", *name))


def count_shape(view: SceneView, chance: Chance) -> Asked | None:
    return _count(view, chance, [(shape,) for shape in SHAPES], ("shape",))


def count_colour(view: SceneView, chance: Chance) -> Asked | None:
    return _count(view, chance, [(colour,) for colour in COLOURS], ("colour",))


def count_pattern(view: SceneView, chance: Chance) -> Asked | None:
    if not any(pattern != "plain" for pattern in view.values("pattern")):
        return None
    return _count(view, chance, [(pattern,) for pattern in PATTERNS[1:]], ("pattern",))


def count_coloured_shape(view: SceneView, chance: Chance) -> Asked | None:
    """A zero has both the shape and the colour in the scene."""
    shapes, colours = sorted(set(view.values("shape", view.shapes))), sorted(set(view.values("colour")))
    names = [(shape, colour) for shape in shapes for colour in colours if (shape, colour) not in view.taboo]
    return _count(view, chance, names, ("shape", "colour"))


def count_things(view: SceneView, chance: Chance) -> Asked | None:
    count = len(view.looks)
    if count > MAX_COUNT:
        return None
    text = put("count", chance, group=phrase({}, chance, plural=True))
    return Asked(text, str(count), range(count), ("count",))


def where(view: SceneView, chance: Chance) -> Asked | None:
    return _place("where", view.third, view, chance)


def cell(view: SceneView, chance: Chance) -> Asked | None:
    return _place("cell", view.cell, view, chance)


def _place(form: str, place_of: Callable[[int], str | None], view: SceneView, chance: Chance) -> Asked | None:
    places = [(number, place) for number in view.describable() if (place := place_of(number))]
    if not places:
        return None
    number, place = chance.choice(places)
    the, told = view.describe(number, chance)
    return Asked(put(form, chance, the=the), place, [number], (form, str(number)), number, told | {"where"})


def read(view: SceneView, chance: Chance) -> Asked | None:
    """What a sign says; it is meant by being the only one, by its colour, or by lying farthest to one side."""
    options: list[tuple[int, str, frozenset[str]]] = []
    for number in view.signs:
        for names in view.descriptions(number, ("shape", "colour")):
            if "shape" in names:
                options.append((number, phrase(view.pick(number, names), chance), frozenset(names)))
    if len(view.signs) > 1:
        for across, sides in ((True, FARTHEST[:2]), (False, FARTHEST[2:])):
            order = sorted(view.signs, key=lambda number: view.at(number, across))
            for side, outer, inner in ((sides[0], *order[:2]), (sides[1], *order[:-3:-1])):
                if abs(view.at(outer, across) - view.at(inner, across)) >= APART:
                    options.append((outer, f"{side} {SIGN}", frozenset(("shape", "where"))))
    if not options:
        return None
    number, the, told = chance.choice(options)
    text = put("read", chance, the=f"the {the}")
    return Asked(text, view.value(number, "text"), [number], ("read", str(number)), number, told | {"text"})


def caption(view: SceneView, chance: Chance) -> Asked | None:
    """The large things that are no signs, in reading order: ``red star , blue ring``."""
    large = [number for number in view.shapes if view.value(number, "size") == "large"]
    if not 1 <= len(large) <= MAX_LISTED:
        return None
    answer = " , ".join(f"{view.value(number, 'colour')} {view.value(number, 'shape')}" for number in large)
    return Asked(put("caption", chance), answer, large, ("caption",))


def about_it(view: SceneView, before: Asked, chance: Chance) -> Asked | None:
    """What the turn before did not tell about the one thing it was about, if it was about one."""
    number, told = before.about, before.told
    if number is None:
        return None
    options = []
    for name in (*ATTRIBUTES, "where"):
        if name in told or (number in view.signs and name not in ("colour", "where")):
            continue
        if name in _DESCRIBED_BY and not told <= {*_DESCRIBED_BY[name], "where"}:
            continue
        if name in ("size", "pattern") and not view.varies(name):
            continue
        answer = view.third(number) if name == "where" else view.value(number, name)
        if answer and chance.happens(_WEIGHTS_OF_IT.get(answer, 1.0)):
            options.append((name, answer))
    if not options:
        return None
    name, answer = chance.choice(options)
    if name == "text":
        text = put("it symbol", chance, symbol=symbol_of(answer))
    else:
        text = put("it where" if name == "where" else "it", chance, attribute=name)
    return Asked(text, answer, [number], (name, str(number)), number, told | {name})


def first_of(forms: Sequence[Callable[..., Asked | None]], chance: Chance, *about: object) -> Asked | None:
    """A question of one of the forms, in random order; None if there is no question of any."""
    for form in chance.shuffle(forms):
        asked = form(*about, chance)
        if asked is not None:
            return asked
    return None
