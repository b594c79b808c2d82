"""The forms of questions that compare things or lead from one to another, with the rules of :mod:`.forms`."""

from collections import Counter

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.describe import SceneView
from adaptinfer.embedded.world.forms import APART, Asked
from adaptinfer.embedded.world.things import COLOURS, SHAPES, SIGN
from adaptinfer.embedded.world.wordings import COMPARATIVES, RELATIONS, THINGS, phrase, put, symbol_of


def relation(view: SceneView, chance: Chance) -> Asked | None:
    """Whether one thing is left of, right of, above or below another."""
    numbers = view.describable()
    across = chance.happens(0.5)
    at = {number: view.at(number, across) for number in numbers}
    pairs = [(low, high) for low in numbers for high in numbers if at[high] - at[low] >= APART]
    if not pairs:
        return None
    low, high = chance.choice(pairs)
    name = chance.choice(("left", "right") if across else ("above", "below"))
    yes = chance.happens(0.5)
    first, second = (low, high) if (name in ("left", "above")) == yes else (high, low)
    text = put(
        "relation",
        chance,
        the=view.describe(first, chance)[0],
        other=view.describe(second, chance)[0],
        relation=chance.choice(RELATIONS[name]),
    )
    return Asked(text, "yes" if yes else "no", (low, high), ("relation", name, str(first), str(second)))


def compare_counts(view: SceneView, chance: Chance) -> Asked | None:
    """Whether there are more of one shape or colour than of another; one of the two can be missing."""
    attribute, names = chance.choice((("shape", SHAPES), ("colour", COLOURS)))
    groups = {name: view.groups(attribute).get((name,), []) for name in names}
    pairs = [(more, less) for more in names for less in names if len(groups[more]) > len(groups[less])]
    if chance.happens(0.75):
        pairs = [pair for pair in pairs if groups[pair[1]]] or pairs
    if not pairs:
        return None
    more, less = chance.choice(pairs)
    yes = chance.happens(0.5)
    names = (more, less) if yes else (less, more)
    group, others = (phrase({attribute: name}, chance, plural=True) for name in names)
    text = put("more", chance, group=group, others=others)
    return Asked(text, "yes" if yes else "no", groups[more] + groups[less], ("more", *names))


def compare_things(view: SceneView, chance: Chance) -> Asked | None:
    """Which of two things of different shape is bigger, smaller, higher or lower."""
    by_size = chance.happens(0.5)
    names = {
        number: [n for n in view.descriptions(number, ("shape", "colour")) if "shape" in n] for number in view.shapes
    }
    numbers = [number for number in view.shapes if names[number]]
    rank = {number: view.size_rank(number) if by_size else -view.at(number, across=False) for number in numbers}
    pairs = [
        (low, high)
        for low in numbers
        for high in numbers
        if rank[high] - rank[low] >= APART and view.value(low, "shape") != view.value(high, "shape")
    ]
    if not pairs:
        return None
    low, high = chance.choice(pairs)
    more, less = COMPARATIVES["size" if by_size else "height"]
    comparative = chance.choice((more, less))
    first, second = chance.shuffle((low, high))
    the, other = (f"the {phrase(view.pick(n, chance.choice(names[n])), chance)}" for n in (first, second))
    text = put("which", chance, the=the, other=other, comparative=comparative)
    answer = view.value(high if comparative == more else low, "shape")
    return Asked(text, answer, (low, high), ("which", comparative, str(low), str(high)))


def odd(view: SceneView, chance: Chance) -> Asked | None:
    """The one value of an attribute that differs among three or more things which share another."""
    options = []
    for shared, name in (("shape", "colour"), ("colour", "shape"), ("pattern", "colour"), ("pattern", "shape")):
        for (value,), group in view.groups(shared).items():
            counts = Counter(view.values(name, group))
            if len(counts) != 2 or value == "plain" or (name == "shape" and SIGN in counts):
                continue
            rare, often = sorted(counts, key=counts.__getitem__)
            if counts[rare] == 1 and counts[often] > 1:
                options.append((shared, value, name, rare, group))
    if not options:
        return None
    shared, value, name, answer, group = chance.choice(options)
    text = put("odd", chance, attribute=name, group=phrase({shared: value}, chance, plural=True))
    return Asked(text, answer, group, ("odd", name, value))


def two_hop_same(view: SceneView, chance: Chance) -> Asked | None:
    """An attribute of the one other thing that shares something with a thing described by something else."""
    options = []
    for link in ("shape", "colour", "pattern", "text"):
        for (value,), group in view.groups(link, numbers=view.shapes if link == "text" else None).items():
            if len(group) != 2 or value in ("plain", ""):
                continue
            for one, other in (group, group[::-1]):
                for name in _hops(view, other):
                    # Only some shapes have text, so a shape is not asked for by it.
                    if link != name and (link, name) != ("text", "shape"):
                        options += [(one, other, link, name, names) for names in _starts(view, one, name, link)]
    if not options:
        return None
    one, other, link, name, names = chance.choice(options)
    the = f"the {phrase(view.pick(one, names), chance)}"
    link_name = symbol_of(view.value(one, "text")) if link == "text" else link
    text = put("same", chance, attribute=name, thing=chance.choice(THINGS), link=link_name, the=the)
    return Asked(text, view.value(other, name), (one, other), ("same", name, link, str(one)))


def two_hop_near(view: SceneView, chance: Chance) -> Asked | None:
    """An attribute of the thing directly beside, above or below a thing."""
    options = []
    for one in view.describable():
        for side, relations in _BESIDE.items():
            other = view.neighbour(one, side)
            if other is not None:
                for name in _hops(view, other):
                    options += [(one, other, side, relations, name, names) for names in _starts(view, one, name)]
    if not options:
        return None
    one, other, side, relations, name, names = chance.choice(options)
    the = f"the {phrase(view.pick(one, names), chance)}"
    text = put("near", chance, attribute=name, thing=chance.choice(THINGS), relation=chance.choice(relations), the=the)
    return Asked(text, view.value(other, name), (one, other), ("near", name, side, str(one)))


def _hops(view: SceneView, number: int) -> tuple[str, ...]:
    """The attributes that are asked of a thing that has to be found first."""
    return ("colour",) if number in view.signs else ("colour", "shape")


def _starts(view: SceneView, number: int, asked: str, link: str = "") -> list[tuple[str, ...]]:
    """Descriptions of the thing to start from that do not name the link.

    Nor, with something else, what is asked for: that ``red`` does not suffice for ``the red star`` says that there is
    more red, and the thing looked for is likely to be.
    """
    return [
        names for names in view.descriptions(number) if link not in names and (asked not in names or len(names) == 1)
    ]


_BESIDE = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
