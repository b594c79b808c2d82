"""What is asked in training only: plain and dense, so that the language model learns to find things.

A question about one thing among a dozen gives a model that cannot find things yet hardly anything to learn from. Each
word of a full description does: what comes after "red star" is on the one thing that "red star" means. Drills are the
same for what is harder to learn: counts, groups of like things, and what stands beside a thing or shares something
with it.
"""

from __future__ import annotations

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.describe import SceneView
from adaptinfer.embedded.world.forms import MAX_COUNT
from adaptinfer.embedded.world.questions import Question
from adaptinfer.embedded.world.things import COLOURS, PATTERNS, SHAPES, SIGN, Scene
from adaptinfer.embedded.world.wordings import a, phrase, put

_MOST = 12
"""Entries of a drill at most; the answer to a question has hardly more than four words, a drill's has fifty."""


def describe_all(scene: Scene, chance: Chance) -> Question:
    """All things of a scene in random order, each with all of its attributes in one random order, and its places."""
    view = SceneView(scene)
    order = chance.shuffle(("shape", "colour", "pattern", "size", "text", "third", "cell"))
    words = []
    for number in chance.shuffle(range(len(scene.things))):
        said = {**view.pick(number, ("shape", "colour", "pattern", "size", "text"))}
        said["third"], said["cell"] = view.third(number) or "", view.cell(number) or ""
        words.append(" ".join(said[name] for name in order if said[name]))
    return Question("describe", "list the things", " , ".join(words), ())


def roll_call(scene: Scene, chance: Chance, count: int) -> list[Question]:
    """Whether there is a thing of some shape or colour, as often with yes as with no."""
    view = SceneView(scene)
    options = []
    for name, domain in (("shape", (*SHAPES, SIGN)), ("colour", COLOURS)):
        there = set(view.values(name))
        absent = [value for value in domain if value not in there]
        if absent:  # a scene can have all colours
            options.append((name, [value for value in domain if value in there], absent))
    asked = []
    for _ in range(count if options else 0):
        name, there, absent = chance.choice(options)
        found = chance.happens(0.5)
        text = put("exists", chance, a=a(phrase({name: chance.choice(there if found else absent)}, chance)))
        asked.append(Question("roll", text, "yes" if found else "no", ()))
    return asked


def tally(scene: Scene, chance: Chance) -> Question:
    """How many there are of several shapes, colours, patterns, or shapes in a colour: ``red 3 , green 0 , blue 1``."""
    view = SceneView(scene)
    names = chance.choice((("shape",), ("colour",), ("pattern",), ("colour", "shape")))
    groups = view.groups(*names)
    if len(names) == 2:
        domain = [(c, s) for c in view.values("colour") for s in view.values("shape") if (s, c) not in view.taboo]
    else:
        domain = [(value,) for value in {"shape": SHAPES, "colour": COLOURS, "pattern": PATTERNS[1:]}[names[0]]]
    counts = {value: len(groups.get(value, ())) for value in dict.fromkeys(domain)}
    there = [value for value, count in counts.items() if 0 < count <= MAX_COUNT]
    absent = chance.shuffle([value for value, count in counts.items() if not count])
    said = chance.shuffle([*there, *absent[: max(2, len(there) // 2)]])[:_MOST]
    answer = " , ".join(f"{' '.join(value)} {counts[value]}" for value in said)
    return Question("tally", f"count the {' '.join(names)}", answer, ())


def muster(scene: Scene, chance: Chance) -> list[Question]:
    """What there is of one shape, colour, pattern or size, in reading order, for several of these.

    As in captions, "shapes" are no signs.
    """
    view = SceneView(scene)
    asked = []
    for name in ("shape", "colour", "pattern", "size"):
        numbers = view.shapes if name in ("pattern", "size") else None
        for (value,), group in view.groups(name, numbers=numbers).items():
            if value == "plain" or len(group) > MAX_COUNT:
                continue
            said = [part for part in ("colour", "shape") if part != name]
            answer = " , ".join(" ".join(view.pick(number, said).values()) for number in group)
            group_name = f"{value} shapes" if numbers else phrase({name: value}, chance, plural=True)
            asked.append(Question("muster", f"list the {group_name}", answer, ()))
    return chance.shuffle(asked)[:_MOST]


def hops(scene: Scene, chance: Chance) -> Question:
    """What stands directly beside things, and which is the one other thing with the same shape, colour or pattern."""
    view = SceneView(scene)
    steps = []
    for number in view.describable():
        for side in ("left", "right", "above", "below"):
            other = view.neighbour(number, side)
            if other is not None:
                steps.append((number, side, other, ()))
        for link in ("shape", "colour", "pattern"):
            value = view.value(number, link)
            others = [other for other in view.groups(link)[value,] if other != number]
            if len(others) == 1 and value != "plain":
                steps.append((number, f"same {link}", others[0], (link,)))
    words = []
    for number, way, other, link in chance.shuffle(steps)[:_MOST]:
        start = chance.choice([names for names in view.descriptions(number) if not set(names) & set(link)] or [()])
        if start:
            end = [part for part in ("colour", "shape") if part not in link]
            words.append(f"{phrase(view.pick(number, start), chance)} {way} {' '.join(view.pick(other, end).values())}")
    return Question("hops", "name the other things", " , ".join(words), ())


def drill(scene: Scene, chance: Chance) -> list[Question]:
    """One of the drills; for a scene without hops a tally."""
    which = chance.choice(("tally", "muster", "hops"))
    if which == "muster" and (asked := muster(scene, chance)):
        return asked
    if which == "hops" and (hopped := hops(scene, chance)).answer:
        return [hopped]
    return [tally(scene, chance)]
