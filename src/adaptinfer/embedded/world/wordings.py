"""Every word of the scene world's questions and answers, and how each form of question is put.

All is lower case but for the letters painted on things, and words are separated by single spaces, so that splitting a
text at its spaces gives members of :data:`VOCABULARY`. Which question is asked about which thing is decided in
:mod:`adaptinfer.embedded.world.questions`; nothing here knows about scenes.
"""

from adaptinfer.embedded.world.chance import Chance
from adaptinfer.embedded.world.things import COLOURS, DIGITS, LETTERS, NUMBERS, PATTERNS, SHAPES, SIGN, SIZES, WORDS

THINGS = ("thing", "object")
"""Words for a thing whose shape is not named. Signs are things too; ``shapes`` (in captions) leaves them out."""

PLURALS: dict[str, str] = {
    name: f"{name}es" if name == "cross" else f"{name}s" for name in (*SHAPES, SIGN, *THINGS)
}  # fmt: skip
"""The plural of each noun."""

THIRDS = (("top left", "top", "top right"), ("left", "middle", "right"), ("bottom left", "bottom", "bottom right"))
"""Names of the places of the 3 x 3 grid: ``THIRDS[row][col]``."""

COLUMNS = "abcdefgh"
"""Names of the columns of the 8 x 8 grid, left to right; its rows are ``1`` to ``8``, top to bottom."""

RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
"""Ways to say where one thing is against another."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "exists": ("is there {a}", "can you see {a}", "does the picture show {a}"),
    "attribute": (
        "what {attribute} is {the}",
        "what is the {attribute} of {the}",
        "what {attribute} does {the} have",
        "name the {attribute} of {the}",
    ),
    "symbol": ("which {symbol} is on {the}", "what {symbol} is written on {the}", "read the {symbol} on {the}"),
    "count": ("how many {group} are there", "how many {group} do you see", "count the {group}"),
    "where": ("where is {the}", "in which part of the picture is {the}", "what is the position of {the}"),
    "cell": ("in which cell is {the}", "which cell holds {the}", "give the cell of {the}"),
    "relation": (
        "is {the} {relation} {other}",
        "does {the} lie {relation} {other}",
        "is it true that {the} is {relation} {other}",
    ),
    "more": (
        "are there more {group} than {others}",
        "do you see more {group} than {others}",
        "does the picture have more {group} than {others}",
    ),
    "which": (
        "is {the} or {other} {comparative}",
        "which of {the} and {other} is {comparative}",
        "name the {comparative} one of {the} and {other}",
    ),
    "odd": (
        "what is the odd {attribute} among the {group}",
        "which {attribute} is the odd one out among the {group}",
        "name the odd {attribute} among the {group}",
    ),
    "read": ("what does {the} say", "what is written on {the}", "read {the}"),
    "caption": (
        "name the large shapes", "list the large shapes", "which large shapes are there", "what are the large shapes",
    ),
    "same": (
        "what {attribute} is the other {thing} with the same {link} as {the}",
        "what is the {attribute} of the other {thing} with the same {link} as {the}",
        "name the {attribute} of the other {thing} that has the same {link} as {the}",
    ),
    "near": (
        "what {attribute} is the {thing} directly {relation} {the}",
        "what is the {attribute} of the {thing} directly {relation} {the}",
        "name the {attribute} of the {thing} that is directly {relation} {the}",
    ),
    "it": ("what {attribute} is it", "and what {attribute}", "what {attribute} does it have", "name its {attribute}"),
    "it symbol": ("which {symbol} is on it", "and which {symbol}", "what {symbol} is written on it"),
    "it where": ("where is it", "and where", "in which part of the picture is it"),
    "both": ("do both pictures have {a}", "is there {a} in both pictures", "can you see {a} in both pictures"),
    "which picture": (
        "which picture has more {group}",
        "in which picture are there more {group}",
        "which of the two pictures has more {group}",
    ),
    "alike": (
        "does {the} have the same {attribute} in both pictures",
        "is {the} in both pictures of the same {attribute}",
        "is the {attribute} of {the} the same in both pictures",
    ),
}  # fmt: skip
"""The wordings of each form of question."""


def put(form: str, chance: Chance, **slots: str) -> str:
    """A form of question in one of its wordings; "colour" is spelt "color" in half of them."""
    text = chance.choice(WORDINGS[form]).format(**slots)
    return text.replace("colour", "color") if chance.happens(0.5) else text


def phrase(look: dict[str, str], chance: Chance, plural: bool = False) -> str:
    """A noun phrase without an article for what has these attributes, such as ``large red star with the letter A``.

    Args:
        look: Any of ``shape``, ``colour``, ``pattern``, ``size`` and ``text`` with their values.
        chance: Chooses between ``thing`` and ``object`` where no shape is named.
        plural: ``red stars`` rather than ``red star``.
    """
    text = look.get("text", "")
    noun = look.get("shape") or chance.choice(THINGS)
    words = [look[name] for name in ("size", "colour", "pattern") if name in look]
    words.append(PLURALS[noun] if plural else noun)
    if text:
        words.append(f"that says {text}" if noun == SIGN else f"with the {symbol_of(text)} {text}")
    return " ".join(words)


def a(noun_phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if noun_phrase.startswith(_VOWELS) else 'a'} {noun_phrase}"


def symbol_of(text: str) -> str:
    """What a text on a thing is called: ``letter`` or ``number``."""
    return "number" if text in DIGITS else "letter"


_VOWELS = ("orange", "object", "arrow")

ATTRIBUTES = ("shape", "colour", "pattern", "size", "text")
"""The attributes by which a thing is described or about which one asks, in this order."""

FARTHEST = ("leftmost", "rightmost", "highest", "lowest")
"""How a sign is called that lies farther to one side than any other."""

COMPARATIVES = {"size": ("bigger", "smaller"), "height": ("higher", "lower")}
PICTURES = ("first", "second", "same")
"""Answers to which of two pictures has more of something."""


def _vocabulary() -> tuple[str, ...]:
    templates = [word for wordings in WORDINGS.values() for wording in wordings for word in wording.split()]
    words = {word for word in templates if not word.startswith("{")}
    words.update((*SHAPES, SIGN, *COLOURS, *PATTERNS, *SIZES, *THINGS, *PLURALS.values()))
    words.update((*WORDS, *NUMBERS, *LETTERS, *DIGITS, *COLUMNS, *PICTURES, *FARTHEST))
    words.update(word for phrase in sum((*THIRDS, *RELATIONS.values()), ()) for word in phrase.split())
    words.update(word for pair in COMPARATIVES.values() for word in pair)
    words.update(("a", "an", "the", "with", "that", "says", "letter", "number"))
    words.update(("shape", "colour", "color", "pattern", "size", "yes", "no", ","))
    return tuple(sorted(words))


VOCABULARY = _vocabulary()
"""Every word that a question or an answer can contain, sorted. Letters painted on things are upper case, those that
name a column are lower case, and a number is one word, on a sign as in a count.
"""
