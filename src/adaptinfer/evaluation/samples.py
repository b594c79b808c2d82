"""What a task is: samples with pictures, turns of question and reference answers, and where the evidence lies.

A task's samples are cheap to list; pictures are made or read when a batch needs them, so that a task may be larger than
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from adaptinfer.errors import InputError

Cell = tuple[int, int, int]
"""Picture, row, column of a piece of evidence, on the task's grid."""

DRAWN = 500
"""Default number of samples of a drawn task; there are some hundred thousand."""


class SampleError(InputError):
    """A sample that cannot be used; the evaluation skips it, names it and counts it."""


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        question: the whole text of the user's turn, with the instruction on how to answer if there is one.
        answers: references, at least one; what several mean is up to the metric.
        kind: of question; the report has the accuracy of each kind.
        evidence: cells that hold what is asked about. Only the `evidence` control looks at it.
    """

    question: str
    answers: tuple[str, ...]
    kind: str = "all"
    evidence: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class TaskSample:
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
        grid: rows and columns of the cells of evidence; None where there is no evidence.
    """

    name: str
    metric: str
    max_new_tokens: int
    grid: tuple[int, int] | None

    def samples(self, count: int | None) -> Sequence[TaskSample]:
        """The first ``count`` samples, None for all (`DRAWN` of drawn ones): always the same ones in the same order."""
        ...

    def pictures(self, sample: TaskSample) -> list[Image.Image]:
        """Its pictures, RGB, in the order of the prompt. Raises SampleError if one cannot be read."""
        ...

    def identity(self) -> str:
        """Changes whenever the content does; a run is not resumed across such a change."""
        ...
