"""Questions about scenes: right, never in doubt, balanced, and not to be answered from their words alone."""

import re
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import world_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptinfer.embedded.world.questions import (
    KINDS,
    VOCABULARY,
    Question,
    conversation,
    pair_questions,
    questions_for,
)
from adaptinfer.embedded.world.scene import sample_scene
from adaptinfer.embedded.world.things import (
    COLOURS,
    HELD_OUT,
    NUMBERS,
    PATTERNS,
    SHAPES,
    SIZES,
    SPLITS,
    Background,
    Scene,
    Thing,
)
from adaptinfer.embedded.world.wordings import WORDINGS

SINGLE = tuple(kind for kind in KINDS if kind not in ("follow_up", "pair"))
SCENES = 1000  # of the training split, in the tests of shares

seeds = st.one_of(*(st.integers(split.start, split.stop - 1) for split in SPLITS.values()))
scenes = st.builds(sample_scene, seeds, st.sampled_from((16, 24)), st.booleans())
numbers = st.integers(0, 2**31)


@settings(max_examples=100, deadline=None)
@given(scenes, numbers)
def test_a_second_opinion_on_every_answer(scene: Scene, seed: int) -> None:
    for question in questions_for(scene, seed, 22):
        assert (question.answer, set(question.evidence)) == world_oracle.answer(scene, question.text), question
        assert question.evidence == tuple(sorted(question.evidence)) and not question.refers


@settings(max_examples=100, deadline=None)
@given(scenes, numbers)
def test_a_second_opinion_on_every_turn(scene: Scene, seed: int) -> None:
    before: Question | None = None
    it: int | None = None
    for question in conversation(scene, seed, 12):
        assert question.refers == (question.kind == "follow_up")
        if question.refers:
            assert before is not None and len(before.evidence) == 1 and question.evidence == before.evidence
        assert (question.answer, set(question.evidence)) == world_oracle.answer(scene, question.text, it), question
        before, it = question, question.evidence[0] if len(question.evidence) == 1 else None


@settings(max_examples=100, deadline=None)
@given(scenes, scenes, numbers)
def test_a_second_opinion_on_every_pair(first: Scene, second: Scene, seed: int) -> None:
    questions = pair_questions(first, second, seed, 6)
    for question in questions:
        expected = world_oracle.answer(first, question.text, second=second)
        assert (question.answer, set(question.evidence)) == expected, question
    assert len({(q.text, q.evidence) for q in questions}) == len(questions) <= 6


def thing(
    x: float, y: float, colour: str, shape: str, size: str = "small", pattern: str = "plain", text: str = ""
) -> Thing:
    width = {"small": 1.0, "medium": 1.6, "large": 2.6}[size]
    width, height = (3.0, 1.0) if shape == "sign" else (width, width)
    return Thing(x, y, width, height, shape, colour, pattern, size, "none", text, 0)


BACKDROP = Background("gradient", (120, 120, 120), (120, 120, 120), 3.0, 0.5, 0, 0.0, 0, ())
HAND_MADE = Scene(
    4_000_000,
    16,
    False,
    (
        thing(2.5, 2.5, "red", "star", "large", "striped"),  # 0
        thing(13.5, 2.5, "blue", "circle"),  # 1
        thing(8.5, 7.5, "red", "circle", "medium", text="A"),  # 2
        thing(11.5, 7.5, "green", "heart"),  # 3
        thing(4.5, 10.5, "white", "sign", text="cat"),  # 4
        thing(2.5, 14.5, "blue", "sign", text="42"),  # 5
        thing(13.5, 13.5, "blue", "circle", "large", "dotted"),  # 6
    ),
    BACKDROP,
)


@pytest.mark.parametrize(
    ("text", "answer", "evidence"),
    [
        ("is there a red star", "yes", (0,)),
        ("is there a blue star", "no", ()),
        ("is there a striped circle", "no", ()),
        ("is there a dotted circle", "yes", (6,)),
        ("is there a sign that says cat", "yes", (4,)),
        ("is there a blue sign that says cat", "no", ()),
        ("what colour is the star", "red", (0,)),
        ("what shape is the green thing", "heart", (3,)),
        ("what pattern is the red star", "striped", (0,)),
        ("what size is the red circle", "medium", (2,)),
        ("which letter is on the red circle", "A", (2,)),
        ("how many circles are there", "3", (1, 2, 6)),
        ("how many blue things are there", "3", (1, 5, 6)),
        ("how many crosses are there", "0", ()),
        ("how many blue circles are there", "2", (1, 6)),
        ("where is the heart", "right", (3,)),
        ("where is the star", "top left", (0,)),
        ("where is the red circle", "middle", (2,)),
        ("which cell holds the heart", "f 4", (3,)),
        ("which cell holds the sign that says 42", "b 8", (5,)),
        ("is the star left of the heart", "yes", (0, 3)),
        ("is the star below the heart", "no", (0, 3)),
        ("are there more circles than hearts", "yes", (1, 2, 3, 6)),
        ("is the star or the heart bigger", "star", (0, 3)),
        ("is the star or the heart lower", "heart", (0, 3)),
        ("what is the odd colour among the circles", "red", (1, 2, 6)),
        ("what does the white sign say", "cat", (4,)),
        ("what does the lowest sign say", "42", (5,)),
        ("name the large shapes", "red star , blue circle", (0, 6)),
        ("what colour is the other thing with the same shape as the white thing", "blue", (4, 5)),
        ("what shape is the other thing with the same colour as the star", "circle", (0, 2)),
        ("what shape is the thing directly left of the heart", "circle", (2, 3)),
    ],
)
def test_the_second_opinion_on_a_scene_made_by_hand(text: str, answer: str, evidence: tuple[int, ...]) -> None:
    assert world_oracle.answer(HAND_MADE, text) == (answer, set(evidence))


@pytest.mark.parametrize(
    "text",
    [
        "what colour is the circle",  # there are three
        "where is the blue circle",  # there are two
        "what shape is the large thing",  # there are two, and signs are wide
        "what size is the white sign",  # a matter of opinion
        "what is the odd shape among the blue things",  # one of them is a sign, which is no shape
        "what shape is the thing directly right of the star",  # too far away
        "what colour is the thing directly above the dotted thing",  # nothing is in line
        "is the heart above the red circle",  # they are side by side
        "are there more hearts than stars",  # as many
    ],
)
def test_the_second_opinion_doubts(text: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        world_oracle.answer(HAND_MADE, text)


def test_all_that_can_be_read_and_listed_in_a_scene_made_by_hand() -> None:
    read = {q.text for seed in range(25) for q in questions_for(HAND_MADE, seed, 8, ("read",))}
    assert {text.removeprefix("read the ") for text in read if text.startswith("read")} == {
        f"{which} sign" for which in ("white", "blue", "leftmost", "rightmost", "highest", "lowest")
    }
    captions = {q.text for seed in range(25) for q in questions_for(HAND_MADE, seed, 2, ("caption",))}
    assert captions == set(WORDINGS["caption"])


@pytest.fixture(scope="module")
def corpus() -> list[tuple[Scene, Question]]:
    """Ten questions on each of many scenes, conversations and pairs too."""
    drawn = [sample_scene(seed) for seed in range(SCENES)]
    asked = [(scene, question) for scene in drawn for question in questions_for(scene, 0, 10)]
    asked += [(scene, question) for scene in drawn for question in conversation(scene, 1, 5) if question.refers]
    asked += [(one, question) for one, two in pairwise(drawn) for question in pair_questions(one, two, 0, 2)]
    return asked


def by_kind(corpus: list[tuple[Scene, Question]]) -> dict[str, list[Question]]:
    kinds = defaultdict(list)
    for _, question in corpus:
        kinds[question.kind].append(question)
    return kinds


def test_answers_are_balanced(corpus: list[tuple[Scene, Question]]) -> None:
    kinds = by_kind(corpus)
    assert set(kinds) == set(KINDS)
    for kind, questions in kinds.items():
        answers = Counter(question.answer for question in questions)
        decided = answers["yes"] + answers["no"]
        if decided:
            assert abs(answers["yes"] / decided - 0.5) < 2.5 / decided**0.5, kind
        for answer, count in answers.items():
            assert answer in ("yes", "no") or count < 0.35 * len(questions), (kind, answer)


@pytest.mark.parametrize("kind", ["exists", "relation", "compare"])
def test_yes_and_no_are_tossed_for(kind: str) -> None:
    asked = [question for seed in range(800) for question in questions_for(sample_scene(seed), 2, 4, (kind,))]
    answers = Counter(question.answer for question in asked)
    decided = answers["yes"] + answers["no"]
    assert decided > 1500 and abs(answers["yes"] / decided - 0.5) < 1.5 / decided**0.5  # three standard deviations


def test_a_description_does_not_give_an_attribute_away(corpus: list[tuple[Scene, Question]]) -> None:
    """Only medium and large things have patterns and text, and only some shapes have text."""
    telling = {"size": (*PATTERNS, "with"), "pattern": (*SIZES, "with"), "shape": ("with",)}
    seen = Counter()
    for question in by_kind(corpus)["attribute"]:
        for attribute, words in telling.items():
            if re.search(rf"(what|the) {attribute} ", question.text):
                seen[attribute] += 1
                assert not set(words) & set(question.text.split()), question
    assert min(seen[attribute] for attribute in telling) > 50


def test_one_attribute_asked_has_no_usual_answer(corpus: list[tuple[Scene, Question]]) -> None:
    """Not even size and pattern, although most things are small and plain."""
    for kind in ("attribute", "follow_up"):
        for attribute, most in (("size", 0.55), ("pattern", 0.6), ("shape", 0.2), ("colou?r", 0.25)):
            asked = re.compile(rf"(what|its|the) {attribute}\b")
            answers = Counter(q.answer for q in by_kind(corpus)[kind] if asked.search(q.text))
            assert sum(answers.values()) > 15
            assert max(answers.values()) <= most * sum(answers.values()), (kind, attribute, answers)


def test_the_words_do_not_give_the_answer_away(corpus: list[tuple[Scene, Question]]) -> None:
    """No word of a question goes with yes or no, beyond what five standard deviations allow."""
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _, question in corpus:
        if question.answer in ("yes", "no"):
            for word in set(question.text.split()):
                seen[question.kind, word][question.answer] += 1
    tested = 0
    for (kind, word), answers in seen.items():
        total = sum(answers.values())
        if total >= 50:
            tested += 1
            assert abs(answers["yes"] - total / 2) < 5 * total**0.5 / 2, (kind, word, answers)
    assert tested > 100


def test_kinds_have_equal_shares_where_they_can_be_asked(corpus: list[tuple[Scene, Question]]) -> None:
    kinds = Counter(question.kind for _, question in corpus)
    always = [kinds[kind] for kind in ("exists", "attribute", "count", "where", "cell", "relation", "compare")]
    assert max(always) < 1.05 * min(always)
    assert all(kinds[kind] > 0.4 * max(always) for kind in SINGLE)


def test_most_negatives_are_hard(corpus: list[tuple[Scene, Question]]) -> None:
    hard = total = 0
    for scene, question in corpus:
        words = question.text.split()
        if question.kind == "exists" and question.answer == "no" and words[-2] in COLOURS and words[-1] in SHAPES:
            total += 1
            hard += words[-2] in {t.colour for t in scene.things} and words[-1] in {t.shape for t in scene.things}
    assert total > 100 and 0.7 < hard / total < 0.95


def test_training_never_asks_about_what_it_never_shows() -> None:
    def pairs(first: int) -> Counter[tuple[str, str]]:
        asked: Counter[tuple[str, str]] = Counter()
        for seed in range(first, first + 150):
            scene = sample_scene(seed)
            for question in questions_for(scene, 0, 12, kinds=("exists", "count")):
                for shape, colour in HELD_OUT:
                    if re.search(rf"\b{colour} {shape}(e?s)?\b", question.text):
                        asked[shape, question.answer] += 1
        return asked

    assert not pairs(SPLITS["train"].start)
    elsewhere = pairs(SPLITS["test"].start)
    assert sum(elsewhere.values()) > 30 and {answer for _, answer in elsewhere} >= {"yes", "no", "0", "1"}


def test_every_word_is_in_the_vocabulary_and_is_used(corpus: list[tuple[Scene, Question]]) -> None:
    used = {word for _, question in corpus for word in f"{question.text} {question.answer}".split(" ")}
    assert used <= set(VOCABULARY)
    assert set(VOCABULARY) - used <= set(NUMBERS), "words that nobody says"
    assert list(VOCABULARY) == sorted(set(VOCABULARY))


def test_each_kind_has_three_wordings_and_both_spellings(corpus: list[tuple[Scene, Question]]) -> None:
    assert all(len(set(wordings)) >= 3 for wordings in WORDINGS.values())
    spelt = Counter(word for _, question in corpus for word in question.text.split() if word in ("colour", "color"))
    assert 0.45 < spelt["color"] / sum(spelt.values()) < 0.55


def test_a_fifth_of_a_conversation_refers_back() -> None:
    turns = [question for seed in range(150) for question in conversation(sample_scene(seed), 0, 10)]
    assert 0.15 < sum(question.refers for question in turns) / len(turns) < 0.25


def test_a_hard_scene_is_not_asked_what_is_the_same_everywhere() -> None:
    for seed in range(100):
        scene = sample_scene(seed, hard=True)
        for question in [*questions_for(scene, 0, 10), *conversation(scene, 0, 10)]:
            assert question.answer not in ("small", "plain"), question


@settings(max_examples=40, deadline=None)
@given(scenes, numbers, st.integers(0, 25))
def test_the_same_seed_asks_the_same(scene: Scene, seed: int, count: int) -> None:
    questions = questions_for(scene, seed, count)
    assert len(questions) == count
    assert questions == questions_for(scene, seed, count) == questions_for(scene, seed, count + 3)[:count]
    assert conversation(scene, seed, count) == conversation(scene, seed, count)
    assert count < 5 or questions != questions_for(scene, seed + 1, count)


def test_nothing_is_asked_twice_while_there_is_something_new() -> None:
    for seed in range(50):
        questions = questions_for(sample_scene(seed), 0, 25)
        plain = [question.text.replace("color", "colour").replace("object", "thing") for question in questions]
        assert len(set(plain)) == len(plain)
    everything = questions_for(HAND_MADE, 0, 40, kinds=("caption", "odd"))
    assert len(everything) == 40 and Counter(q.kind for q in everything)["caption"] > 5


def test_kinds_are_chosen_and_those_that_do_not_fit_are_refused() -> None:
    assert {question.kind for question in questions_for(HAND_MADE, 0, 9, kinds=("read", "cell"))} == {"read", "cell"}
    signless = Scene(0, 16, False, HAND_MADE.things[1:4], BACKDROP)
    assert questions_for(signless, 0, 9, kinds=("read",)) == [] == questions_for(signless, 0, 9, kinds=())
    with pytest.raises(ValueError, match="kinds must be among exists, .*; got follow_up, riddle"):
        questions_for(HAND_MADE, 0, 1, kinds=("riddle", "read", "follow_up"))
    for ask in (questions_for, conversation):
        with pytest.raises(ValueError, match="the number of questions must be 0 or more, got -1"):
            ask(HAND_MADE, 0, -1)
    with pytest.raises(ValueError, match="got -2"):
        pair_questions(HAND_MADE, HAND_MADE, 0, -2)
