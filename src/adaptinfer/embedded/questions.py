"""Questions about scenes, with their answers and the cells that hold the evidence.

Four kinds, all unambiguous and answered in one word:

========= ================================ ======================= =================================================
kind      example                          answer                  asked when
========= ================================ ======================= =================================================
exists    ``Is there a red star?``         ``yes`` / ``no``        always; most "no" have red things and stars
colour    ``What colour is the star?``     one of eight colours    exactly one object has the shape
shape     ``What shape is the red thing?`` one of eight shapes     exactly one object has the colour
count     ``How many stars are there?``    ``0`` to ``5``          always; rare numbers are preferred
========= ================================ ======================= =================================================
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from adaptinfer.embedded.scenes import COLOURS, SHAPES, Scene, SceneObject

KINDS = ("exists", "colour", "shape", "count")

WORDINGS: dict[str, tuple[str, ...]] = {
    "exists": ("Is there {a} {colour} {shape}?", "Can you see {a} {colour} {shape}?", "Is any {shape} {colour}?"),
    "colour": ("What colour is the {shape}?", "What is the colour of the {shape}?", "Which colour is the {shape}?"),
    "shape": ("What shape is the {colour} {thing}?", "What is the shape of the {colour} {thing}?"),
    "count_shape": ("How many {shape} are there?", "How many {shape} do you see?", "Count the {shape}."),
    "count_colour": (
        "How many {colour} {thing}s are there?",
        "How many {thing}s are {colour}?",
        "Count the {colour} {thing}s.",
    ),
}
"""The wordings of each kind. "colour" is spelt "color" in half of the questions."""

PLURALS: dict[str, str] = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
"""The plural of each shape's name."""

THINGS = ("thing", "object")
"""Words for an object whose shape is not named."""

MAX_COUNT = 5
"""The largest number that is ever the answer."""

# How much a number is preferred as the answer of a count, against how rare it is in scenes.
_COUNT_WEIGHTS = {0: 0.8, 1: 1.0, 2: 1.1, 3: 1.9, 4: 2.4, 5: 2.6}
_HARD_NEGATIVE_SHARE = 0.8
_TRIES = 6  # for a question that was not asked yet


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
        kind: One of :data:`KINDS`.
        text: The question, as a user would type it.
        answer: One word: ``yes``, ``no``, a colour, a shape or a digit.
        evidence: (row, col) of every object the question is about, in reading order; empty if there is none, as for
            ``Is there a red star?`` without a red star.
    """

    kind: str
    text: str
    answer: str
    evidence: tuple[tuple[int, int], ...]


def questions_for(scene: Scene, seed: int, count: int) -> list[Question]:
    """``count`` questions about a scene, the kinds in about equal shares and in random order.

    The same scene, seed and count always give the same questions. A kind that the scene cannot be asked about (no
    shape is unique, say) is replaced by others; questions repeat only when the scene offers nothing new.

    Raises:
        ValueError: ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    rng = random.Random(f"questions/{scene.seed}/{seed}")
    askable = [kind for kind in KINDS if _ASK[kind](scene, random.Random(0)) is not None]
    questions: list[Question] = []
    asked: set[tuple] = set()
    while len(questions) < count:
        for kind in rng.sample(askable, len(askable)):
            for _ in range(_TRIES):
                question, subject = _ASK[kind](scene, rng)  # pyright: ignore[reportGeneralTypeIssues]
                if (kind, *subject) not in asked:
                    break
            asked.add((kind, *subject))  # pyright: ignore[reportPossiblyUnboundVariable]
            questions.append(question)  # pyright: ignore[reportPossiblyUnboundVariable]
    return questions[:count]


_Asked = (
    tuple[Question, tuple[str, ...]] | None
)  # a question and what it is about; None: the scene has no such question


def _ask_exists(scene: Scene, rng: random.Random) -> _Asked:
    present = {(item.shape, item.colour) for item in scene.objects}
    if rng.random() < 0.5:
        shape, colour = rng.choice(sorted(present))
    else:
        shapes, colours = (sorted({pair[part] for pair in present}) for part in range(2))
        hard = [(shape, colour) for shape in shapes for colour in colours if (shape, colour) not in present]
        if not hard or rng.random() >= _HARD_NEGATIVE_SHARE:
            hard = [(shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in present]
        shape, colour = rng.choice(hard)
    found = [item for item in scene.objects if (item.shape, item.colour) == (shape, colour)]
    text = _word("exists", rng, a="an" if colour == "orange" else "a", colour=colour, shape=shape)
    return Question("exists", text, "yes" if found else "no", _cells(found)), (shape, colour)


def _ask_colour(scene: Scene, rng: random.Random) -> _Asked:
    shapes = Counter(item.shape for item in scene.objects)
    unique = [item for item in scene.objects if shapes[item.shape] == 1]
    if not unique:
        return None
    item = rng.choice(unique)
    return Question("colour", _word("colour", rng, shape=item.shape), item.colour, (item.cell,)), (item.shape,)


def _ask_shape(scene: Scene, rng: random.Random) -> _Asked:
    colours = Counter(item.colour for item in scene.objects)
    unique = [item for item in scene.objects if colours[item.colour] == 1]
    if not unique:
        return None
    item = rng.choice(unique)
    text = _word("shape", rng, colour=item.colour, thing=rng.choice(THINGS))
    return Question("shape", text, item.shape, (item.cell,)), (item.colour,)


def _ask_count(scene: Scene, rng: random.Random) -> _Asked:
    by_shape = rng.random() < 0.5
    counts = Counter(item.shape if by_shape else item.colour for item in scene.objects)
    names: dict[int, list[str]] = {}
    for name in SHAPES if by_shape else COLOURS:
        if counts[name] <= MAX_COUNT:
            names.setdefault(counts[name], []).append(name)
    number = rng.choices(sorted(names), [_COUNT_WEIGHTS[number] for number in sorted(names)])[0]
    name = rng.choice(names[number])
    if by_shape:
        text = _word("count_shape", rng, shape=PLURALS[name])
    else:
        text = _word("count_colour", rng, colour=name, thing=rng.choice(THINGS))
    found = [item for item in scene.objects if (item.shape if by_shape else item.colour) == name]
    return Question("count", text, str(number), _cells(found)), (name,)


def _word(form: str, rng: random.Random, **words: str) -> str:
    wording = rng.choice(WORDINGS[form])
    if rng.random() < 0.5:
        wording = wording.replace(" colour ", " color ")
    return wording.format(**words)


def _cells(items: list[SceneObject]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(item.cell for item in items))


_ASK: dict[str, Callable[[Scene, random.Random], _Asked]] = {
    "exists": _ask_exists,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
}
