"""What each layer is given in one step of the engine: arithmetic on counts, no tensors, no vLLM.

A request's counts are a function of its prompt alone, so they are worked out anew wherever they are needed, in the
scheduler, in every worker, in the front end. Nothing is remembered from one step to the next: there is no entry that a
preempted, aborted or finished request could leave over for a later one to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from adaptinfer.errors import UnsupportedError
from adaptinfer.schedule import Budget

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adaptinfer.pruners import Pruner


@dataclass(frozen=True)
class Prompt:
    """A prompt as pruning sees it.

    Attributes:
        length: tokens.
        spans: where its vision tokens stand, half-open, ascending, disjoint.
        given: vision tokens given to each layer.
    """

    length: int
    spans: tuple[tuple[int, int], ...]
    given: tuple[int, ...]

    @cached_property
    def vision(self) -> int:
        """Vision tokens."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def first(self) -> int:
        """Position of the first vision token."""
        return self.spans[0][0]

    @property
    def text(self) -> tuple[int, int]:
        """The guiding tokens: from after the last vision token to the end of the prompt."""
        return self.spans[-1][1], self.length

    @cached_property
    def prunes(self) -> bool:
        """Whether any layer is given fewer vision tokens than there are."""
        return self.given[-1] < self.vision

    def dropped(self, layer: int) -> int:
        """Tokens that the layer is not given."""
        return self.vision - self.given[layer]


class Planner:
    """Plans prompts for one model and one pruner."""

    def __init__(self, pruner: Pruner, num_layers: int) -> None:
        """Raises:
        ScheduleError: the pruner's schedule is for a model of another depth.
        """
        self.pruner = pruner
        self.num_layers = num_layers
        self._given: dict[int, tuple[int, ...]] = {}
        if pruner.schedule is not None:
            pruner.schedule.check(num_layers)

    def prompt(self, length: int, spans: Iterable[tuple[int, int]]) -> Prompt:
        """The plan of a prompt.

        Vision tokens that no text follows are all kept, since nothing guides the choice. So are those of a picture
        smaller than a budget in tokens.

        Args:
            length: tokens of the prompt.
            spans: half-open ranges of vision tokens, in any order.

        Raises:
            ScheduleError: the budget cannot be met for that many vision tokens.
        """
        ordered = tuple(sorted(span for span in spans if span[0] < span[1]))
        vision = sum(stop - start for start, stop in ordered)
        guided = bool(ordered) and ordered[-1][1] < length
        return Prompt(length, ordered, self._layers(vision) if guided else (vision,) * self.num_layers)

    def _layers(self, vision: int) -> tuple[int, ...]:
        if vision not in self._given:
            budget = self.pruner.budget
            if budget is not None and Budget(budget).share(vision) >= 1:
                return (vision,) * self.num_layers
            schedule = self.pruner.plan(self.num_layers, vision)
            self._given[vision] = schedule.tokens_per_layer(vision)
        return self._given[vision]


@dataclass(frozen=True)
class Row:
    """One request in one step.

    Attributes:
        prompt: its prompt.
        computed: its tokens that are in the KV cache already, counted as if none was ever dropped.
        new: its tokens in this step.
    """

    prompt: Prompt
    computed: int
    new: int

    def __post_init__(self) -> None:
        if self.prompt.prunes and not self.decodes and not self.prefills:
            raise UnsupportedError(
                f"a prompt with vision tokens must be computed in one step, but {self.new} of its {self.prompt.length} "
                f"tokens came after {self.computed} others; the scheduler of this plug-in is not the one that runs"
            )

    @property
    def prefills(self) -> bool:
        """Whether the whole prompt is in this step; after a preemption its answer so far comes with it."""
        return self.computed == 0 and self.new >= self.prompt.length

    @property
    def decodes(self) -> bool:
        """Whether the prompt was computed in an earlier step."""
        return self.computed >= self.prompt.length

    def given(self, layer: int) -> int:
        """New tokens that the layer is given."""
        return self.new - self.prompt.dropped(layer) if self.prompt.prunes and self.prefills else self.new

    def missing(self, layer: int) -> int:
        """Tokens of this request that the layer's part of the KV cache lacks after this step."""
        return self.prompt.dropped(layer) if self.prompt.prunes else 0


@dataclass(frozen=True)
class Segment:
    """Consecutive layers that are given the same tokens.

    Attributes:
        layers: half-open range.
        given: new tokens of each row.
        missing: tokens of each row that the KV cache of these layers lacks.
        stage: rows that drop tokens in the last of these layers, with the vision tokens they keep.
    """

    layers: tuple[int, int]
    given: tuple[int, ...]
    missing: tuple[int, ...]
    stage: dict[int, int]


def plan_step(rows: Sequence[Row], num_layers: int) -> list[Segment]:
    """The segments of one step. One segment means that no row was ever pruned."""
    segments: list[Segment] = []
    start = 0
    for stop in range(1, num_layers + 1):
        missing = tuple(row.missing(start) for row in rows)
        if stop < num_layers and tuple(row.missing(stop) for row in rows) == missing:
            continue
        stage = {}
        if stop < num_layers:
            stage = {
                number: row.prompt.given[stop] for number, row in enumerate(rows) if row.given(stop) < row.given(start)
            }
        segments.append(Segment((start, stop), tuple(row.given(start) for row in rows), missing, stage))
        start = stop
    return segments
