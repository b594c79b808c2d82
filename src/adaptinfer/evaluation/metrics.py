"""One answer against its references, as a score from 0 to 1. Pure functions on text.

========= ============================================================= ==================================
name      score                                                         used by
========= ============================================================= ==================================
exact     1 if the normalised answer is a normalised reference          GQA, ScienceQA, the drawn scenes
yes_no    1 if the answer's first word is the reference's (yes or no)   POPE, MME
vqa       min(1, agreeing annotators / 3), averaged leaving one out     VQAv2, VizWiz, TextVQA
anls      1 - edit distance / longer length, 0 up to 0.5; best          DocVQA
========= ============================================================= ==================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

RIGHT = 0.5
"""Scores from here on count as right where a count of right and wrong answers is made (flips)."""

_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)}
_ANLS_THRESHOLD = 0.5


def normalise(text: str) -> str:
    """Lower case, no marks at the edges of words, no articles before words, small numbers as digits, single blanks.

    Inner marks stay, so that ``2.5`` and ``x-ray`` are what they are, and so does an ``a`` that is no article, as alone
    or before a number.
    """
    words = [word for word in (word.strip(".,;:!?\"'()[]{}`") for word in text.lower().split()) if word]
    following = [*words, "0"][1:]
    kept = [word for word, after in zip(words, following, strict=True) if word not in _ARTICLES or after.isdigit()]
    return " ".join(_NUMBERS.get(word, word) for word in kept)


def yes_or_no(text: str) -> str | None:
    """The first word if it is yes or no; None for any other answer."""
    found = re.match(r"\W*(yes|no)\b", text.lower())
    return found.group(1) if found else None


def _exact(answer: str, references: Sequence[str]) -> float:
    return float(normalise(answer) in {normalise(reference) for reference in references})


def _yes_no(answer: str, references: Sequence[str]) -> float:
    said = yes_or_no(answer)
    return float(said is not None and said in {yes_or_no(reference) for reference in references})


def _vqa(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy. With one reference it is an exact match; with n, each is left out once and three of the others
    that agree are enough."""
    said, others = normalise(answer), [normalise(reference) for reference in references]
    agreeing = sum(other == said for other in others)
    if len(others) == 1:
        return float(agreeing)
    return sum(min(1.0, (agreeing - (other == said)) / 3) for other in others) / len(others)


def _anls(answer: str, references: Sequence[str]) -> float:
    return max(_similarity(_spaced(answer), _spaced(reference)) for reference in references)


def _similarity(first: str, second: str) -> float:
    longer = max(len(first), len(second))
    similarity = 1.0 - _edits(first, second) / longer if longer else 1.0
    return similarity if similarity > _ANLS_THRESHOLD else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _edits(first: str, second: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements of characters."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": _exact,
    "yes_no": _yes_no,
    "vqa": _vqa,
    "anls": _anls,
}
"""Each metric: (answer, references) -> score."""
