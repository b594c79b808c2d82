"""Questions about scenes with their answers and the things that hold the evidence.

=========== ====================================================== ================ ====================================
kind        example                                                answer           asked when
=========== ====================================================== ================ ====================================
exists      ``is there a red star``                                ``yes``          always; most "no" have red and stars
attribute   ``what pattern does the green circle have``            ``striped``      the description fits one thing alone
count       ``how many red things are there``                      ``3``            up to 6; rare numbers are preferred
where       ``where is the star``                                  ``top left``     clearly inside a third
cell        ``which cell holds the star``                          ``c 4``          clearly inside a cell of the 8 x 8
relation    ``is the star left of the red circle``                 ``no``           a patch or more apart
compare     ``is the star or the ring bigger``                     ``ring``         sizes, counts or heights differ
odd         ``what is the odd colour among the circles``           ``blue``         all but one of three or more agree
read        ``what does the red sign say``                         ``42``           one sign is meant
caption     ``name the large shapes``                              ``red star``     one to four, in reading order
two_hop     ``what colour is the thing directly above the star``   ``white``        each hop leads to one thing
follow_up   ``and what shape``                                     ``heart``        the turn before was about one thing
pair        ``which picture has more stars``                       ``first``        there are two pictures
=========== ====================================================== ================ ====================================

No question is ambiguous, and the words of a question tell nothing about its answer: yes and no are decided before
it is known what is asked about, and what would give an attribute away (only large things are striped) is not said.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adaptinfer.embedded.world import comparisons, forms, pairs
from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.describe import SceneView
from adaptinfer.embedded.world.forms import Asked, about_it, first_of
from adaptinfer.embedded.world.things import VERSION, Scene
from adaptinfer.embedded.world.wordings import VOCABULARY

__all__ = ["KINDS", "VOCABULARY", "Question", "conversation", "pair_questions", "questions_for"]

KINDS = (
    "exists", "attribute", "count", "where", "cell", "relation", "compare", "odd", "read", "caption", "two_hop",
    "follow_up", "pair",
)  # fmt: skip

FORMS: dict[str, tuple[forms.Form, ...]] = {
    "exists": (
        forms.exists_colour, forms.exists_colour, forms.exists_pattern, forms.exists_size,
        forms.exists_coloured_pattern, forms.exists_symbol, forms.exists_sign,
    ),
    "attribute": (forms.attribute,),
    "count": (
        forms.count_shape, forms.count_shape, forms.count_colour, forms.count_colour,
        forms.count_coloured_shape, forms.count_coloured_shape, forms.count_pattern, forms.count_things,
    ),
    "where": (forms.where,),
    "cell": (forms.cell,),
    "relation": (comparisons.relation,),
    "compare": (comparisons.compare_counts, comparisons.compare_things),
    "odd": (comparisons.odd,),
    "read": (forms.read,),
    "caption": (forms.caption,),
    "two_hop": (comparisons.two_hop_same, comparisons.two_hop_near),
}  # fmt: skip
"""The forms of each kind that needs no other turn or picture. One that is there twice is asked twice as often."""

_FOLLOW_UPS = 0.7  # share of the turns after one about one thing that go on about it
_TRIES = 6  # for a question that was not asked yet


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one scene, or about two.

    Attributes:
        kind: One of :data:`KINDS`.
        text: The question: lower case, words of :data:`VOCABULARY` separated by single spaces.
        answer: One or more words of :data:`VOCABULARY`, separated by single spaces.
        evidence: Numbers, ascending, of the things in ``scene.things`` that the question asks about or that its answer
            depends on; empty if there is none, as for ``is there a red star`` without a red star. For the kind "pair"
            the numbers go on through both pictures: the first thing of the second scene follows the last of the first.
        picture: Number of the picture that ``evidence`` begins in.
        refers: Whether the text refers to the turn before and means nothing without it.
    """

    kind: str
    text: str
    answer: str
    evidence: tuple[int, ...]
    picture: int = 0
    refers: bool = False


def questions_for(scene: Scene, seed: int, count: int, kinds: Sequence[str] | None = None) -> list[Question]:
    """``count`` questions about a scene, none referring to another, the kinds in about equal shares and random order.

    The same arguments always give the same questions. A kind that the scene cannot be asked about (no sign to read,
    say) is replaced by the others; questions repeat only when the scene offers nothing new.

    Args:
        scene: The scene.
        seed: Which questions of the many.
        count: How many.
        kinds: The kinds to ask, all but "follow_up" and "pair" if None. The list is empty if the scene has no
            question of these kinds.

    Raises:
        ValueError: ``count`` is negative, or a kind is unknown or needs another turn or picture.
    """
    if kinds is not None and (unknown := sorted(set(kinds) - set(FORMS))):
        raise ValueError(f"kinds must be among {', '.join(FORMS)}; got {', '.join(unknown)}")
    chance = Chance("questions", VERSION, *_key(scene), seed)
    return _interview(scene, chance, count, list(FORMS if kinds is None else kinds), 0.0)


def conversation(scene: Scene, seed: int, turns: int) -> list[Question]:
    """``turns`` questions about a scene, as :func:`questions_for`, but about a fifth of them refer to the turn before.

    The same arguments always give the same conversation.

    Raises:
        ValueError: ``turns`` is negative.
    """
    chance = Chance("conversation", VERSION, *_key(scene), seed)
    return _interview(scene, chance, turns, list(FORMS), _FOLLOW_UPS)


def pair_questions(first: Scene, second: Scene, seed: int, count: int) -> list[Question]:
    """Up to ``count`` questions that compare two scenes, fewer where they offer no more, none twice.

    The same arguments always give the same questions.

    Raises:
        ValueError: ``count`` is negative.
    """
    _check(count)
    chance = Chance("pair", VERSION, *_key(first), *_key(second), seed)
    views = SceneView(first), SceneView(second)
    questions: list[Question] = []
    for _ in range(count * _TRIES):
        asked = first_of(pairs.FORMS, chance, *views)
        if asked is None or len(questions) == count:
            break
        if asked.subject not in views[0].asked:
            views[0].asked.add(asked.subject)
            questions.append(_question("pair", asked))
    return questions


def _interview(scene: Scene, chance: Chance, count: int, kinds: list[str], follow_ups: float) -> list[Question]:
    """Questions of the kinds in turns, nothing twice while there is something new.

    ``follow_ups`` is the share of turns about one thing that the next goes on about.
    """
    _check(count)
    view = SceneView(scene)
    questions: list[Question] = []
    queue: list[str] = []
    exhausted: list[str] = []
    last: Asked | None = None
    while len(questions) < count and kinds:
        kind, found = "follow_up", None
        if last is not None and chance.happens(follow_ups):
            found = about_it(view, last, chance)
        if found is None or found.subject in view.asked:
            queue = queue or chance.shuffle(kinds)
            kind = queue.pop()
            found = first_of(FORMS[kind], chance, view)
            for _ in range(_TRIES):
                if found is None or found.subject not in view.asked:
                    break
                found = first_of(FORMS[kind], chance, view)
            if found is None or found.subject in view.asked:
                kinds.remove(kind)
                exhausted += [kind] if view.asked else []  # or else the scene has no such question at all
                if not kinds:
                    kinds, exhausted = exhausted, []
                    view.asked.clear()
                continue
        questions.append(_question(kind, found))
        view.asked.add(found.subject)
        last = found
    return questions


def _question(kind: str, asked: Asked) -> Question:
    return Question(kind, asked.text, asked.answer, tuple(sorted(asked.evidence)), refers=kind == "follow_up")


def _key(scene: Scene) -> tuple[int, int, bool]:
    return scene.seed, scene.grid, scene.hard


def _check(count: int) -> None:
    if count < 0:
        raise ValueError(f"the number of questions must be 0 or more, got {count}")
