"""What a task is: samples with pictures, turns of question and reference answers, and where the evidence lies.

A task's samples are cheap to list; pictures are made or read when a batch needs them, so that a task may be larger than
memory. Tasks are named on the command line by a word (`world`) or a file (`mine.jsonl:anls`), see `load_task`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adaptinfer.errors import InputError
from adaptinfer.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

__all__ = ["DRAWN", "FORMS", "Cell", "Sample", "SampleError", "Task", "Turn", "load_task"]

Cell = tuple[int, int, int]
"""Picture, row, column of a piece of evidence, on the task's grid."""


FORMS = {
    "world": "single questions of every kind about one picture, four a picture",
    "world-hard": "the same about pictures in which everything is small",
    "world-turns": "conversations of four questions, some of which refer to the one before",
    "world-pair": "questions that compare two pictures",
}
"""Tasks of drawn scenes by name, and what they are."""

DRAWN = 500
"""Samples of a drawn task where nobody says how many; there are some hundred thousand."""


class SampleError(InputError):
    """A sample that cannot be used; the evaluation skips it, names it and counts it."""


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        question: the whole text of the user's turn, with the instruction on how to answer if there is one.
        answers: references, at least one; what several mean is up to the metric.
        kind: of question; accuracy is told by kind.
        evidence: cells that hold what is asked about. Only the `evidence` control looks at it.
    """

    question: str
    answers: tuple[str, ...]
    kind: str = "all"
    evidence: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One conversation about one or more pictures.

    Attributes:
        id: unique in its task.
        group: samples that share a picture share a group; intervals are over groups, as such samples go wrong together.
        turns: asked one after the other; later ones read what pruning left of the first one's prompt.
    """

    id: str
    group: str
    turns: tuple[Turn, ...]


class Task(Protocol):
    """What a run needs of a task.

    Attributes:
        name: in records and tables.
        metric: a name in `METRICS`.
        max_new_tokens: longest answer.
        grid: rows and columns of the cells that evidence is told in; None where there is no evidence.
    """

    name: str
    metric: str
    max_new_tokens: int
    grid: tuple[int, int] | None

    def samples(self, count: int | None) -> Sequence[Sample]:
        """The first ``count`` samples, None for all (`DRAWN` of drawn ones): always the same ones in the same order."""
        ...

    def pictures(self, sample: Sample) -> list[Image.Image]:
        """Its pictures, RGB, in the order of the prompt. Raises SampleError if one cannot be had."""
        ...

    def identity(self) -> str:
        """Changes whenever the content does; a run is not resumed across such a change."""
        ...


def load_task(spec: str) -> Task:
    """A task by its name or file.

    Args:
        spec: a name in `FORMS`, perhaps with ``:validation`` behind it; or the path of a JSONL file, perhaps with ``:``
            and the name of a metric behind it.

    Raises:
        InputError: no such task, split, metric or file, or a file that is malformed.
    """
    from adaptinfer.evaluation.jsonl import JsonlTask
    from adaptinfer.evaluation.world import WorldTask

    name, _, option = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if name in FORMS:
        return WorldTask(name, option or "test")
    if name.endswith(".jsonl") and option in ("", *METRICS):
        return JsonlTask(name, option or "exact")
    if spec.endswith(".jsonl"):  # a path with a colon in it
        return JsonlTask(spec, "exact")
    if name.endswith(".jsonl"):
        raise InputError(f"task {spec!r}: there is no metric {option!r}; there are {', '.join(METRICS)}")
    raise InputError(
        f"task {spec!r}: there is none of that name; there are {', '.join(FORMS)}, or give a file that ends in .jsonl"
    )
