"""AdaptInfer+: a set that suits the question goes in, then stages in which every word has a say. Found by search."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from adaptinfer.pruners.before import TwoPart
from adaptinfer.pruners.cdpruner import CDPruner
from adaptinfer.pruners.contracts import Pruner, check_setting
from adaptinfer.pruners.textguided import TextGuided
from adaptinfer.schedule import BEFORE, Budget, Schedule, Stage, solve

_STAGES = Schedule((Stage(1, 192), Stage(10, 96), Stage(20, 48)), 32, 576)
"""Where the stages sit and the proportions of what they keep, as far as that many enter: milder than AdaptInfer's."""


@dataclasses.dataclass(frozen=True)
class AdaptInferPlus(TwoPart):
    """AdaptInfer with what a search on validation scenes added to it (docs/results/search.md has the ablation).

    `CDPruner` lets a little more than the budget into the language model, so that layer 0 is not given tokens that
    resemble others or have nothing to do with the question: a small budget that layer 0 alone would spend is left to
    the later layers. That takes the place of AdaptInfer's first stage; the later ones drop what was let in beyond the
    budget, once the model has read the question. Inside, a vision token's score is the largest attention that any word
    of the question gives it (the sum over heads, `TextGuided` with ``words="max"``), in place of the mean weighed by a
    prior: a token that matters to one word need not matter to all.

    Attributes:
        entering: what enters the language model, in budgets; less where the first layer that can hold a stage comes so
            late that the budget could not be met, and 1 (no stages inside) where there is none.
    """

    name: ClassVar[str] = "adaptinfer+"
    reference: ClassVar[str] = "arXiv 2508.06084, extended here"

    entering: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("entering", self.entering, 1, 1000)

    @property
    def parts(self) -> tuple[Any, Pruner]:
        return CDPruner(budget=1), TextGuided(budget=1, words="max")

    def plan(self, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None) -> Schedule:
        if self.budget is None:
            return super().plan(num_layers, vision_tokens, scoring)
        # All that enters passes through the layers up to the first stage: no more than 3/4 of the budget is for them.
        earliest = 0 if scoring is None else min(scoring, default=num_layers)
        entering = min(self.entering, 0.75 * num_layers / (earliest + 1))
        wanted = Budget(self.budget)
        first = wanted.whole_tokens(vision_tokens, max(1.0, entering))
        within = wanted.within(vision_tokens, first)
        before = (Stage(BEFORE, first),) if first < vision_tokens else ()
        if within.amount >= first:  # all of the budget is spent before layer 0
            return Schedule(before, num_layers, vision_tokens)
        inside = solve(within, num_layers, first, possible=scoring, like=_STAGES)
        return Schedule((*before, *inside.stages), num_layers, vision_tokens)
