"""What every method is: a frozen dataclass that plans stages and scores vision tokens. No model is known here."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from adaptinfer.errors import AdaptInferError
from adaptinfer.schedule import Schedule, solve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from adaptinfer.engine.attach import Handle
    from adaptinfer.engine.stage import StageView

__all__ = ["Positions", "Pruner", "PrunerError"]

Positions = Literal["keep", "compact"]


class PrunerError(AdaptInferError, ValueError):
    """A pruner was configured with values that make no sense together."""


@dataclasses.dataclass(frozen=True)
class Pruner(ABC):
    """A pruning method: how many vision tokens stay after which layer, and which.

    Give exactly one of ``budget`` and ``schedule``.

    Attributes:
        budget: wanted true average of vision tokens given to a decoder layer: a number of tokens, or, below 1, a share
            of the prompt's vision tokens. The stages and keeps are solved for each number of vision tokens.
        schedule: stages and keeps, spelled out.
        positions: what happens to rotary positions of the survivors: ``keep`` leaves every token its own;
            ``compact`` renumbers them 0..n-1 after each stage and per layer in decoding, as the published LLaVA code
            of several methods does.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    observes: ClassVar[bool] = False
    """Whether it only looks: it is asked to score in every layer that has keys of its own, and nothing is dropped."""

    budget: float | None = None
    schedule: Schedule | None = None
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.schedule is None):
            raise PrunerError("give exactly one of budget (tokens, or a share below 1) and schedule")
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise PrunerError(f"schedule: must be a Schedule, not {type(self.schedule).__name__}")
        if self.positions not in get_args(Positions):
            raise PrunerError(f"positions: must be one of {get_args(Positions)}, not {self.positions!r}")
        budget = self.budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0):
            raise PrunerError(f"budget: must be a positive number of tokens (or a share below 1), not {budget!r}")

    @abstractmethod
    def score(self, view: StageView) -> Tensor:
        """Score the vision tokens that entered a stage; the largest stay.

        Returns:
            [B, V], aligned with ``view.vision_index``; entries outside ``view.vision_mask`` are ignored.
        """

    def plan(self, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None) -> Schedule:
        """The schedule for a prompt with that many vision tokens; a function of these counts alone.

        Args:
            num_layers: depth of the model.
            vision_tokens: in the prompt.
            scoring: layers in which a stage may sit; None for all.

        Raises:
            ScheduleError: the budget cannot be met, or the schedule is for a model of another depth.
        """
        if self.schedule is not None:
            self.schedule.check(num_layers)
            return self.schedule
        assert self.budget is not None
        return solve(self.budget, num_layers, vision_tokens, possible=scoring)

    def __call__(self, model: Any) -> Handle:
        """Attach to a model for the length of a ``with`` block: ``with pruner(model) as handle: ...``."""
        from adaptinfer.engine.attach import attach

        return attach(model, self)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``adaptinfer_config.json`` into a folder; `adaptinfer.from_pretrained` reads it back."""
        from adaptinfer.pruners.config import save

        save(self, path)
