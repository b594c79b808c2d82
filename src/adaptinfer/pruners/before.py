"""What methods that select vision tokens before the language model are, alone or with stages inside it.

The engine calls `select_before` with rows of one shape only: the same number of vision tokens, of text tokens and of
tokens to keep in each. A method never meets a filler or a mask.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from adaptinfer.pruners.contracts import Capabilities, Pruner, PrunerError, Selection, published_schedules
from adaptinfer.pruners.views import FeatureView, StageView
from adaptinfer.schedule import BEFORE, Budget, Schedule, ScheduleError, Stage


@dataclasses.dataclass(frozen=True)
class Selector(Pruner):
    """A method with one stage, before the language model; it defines `select_before`.

    Every layer is given what it keeps, so a budget is met to half a token.

    ``selector >> pruner`` is both, one after the other, as one pruner; the budget of the second is then the true
    average of the whole.
    """

    published = published_schedules({label: {BEFORE: label} for label in (192, 128, 64)})
    published_positions = "compact"
    """Authors drop tokens before their LLaVA numbers any."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(before=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is not None and any(stage.layer != BEFORE for stage in self.schedule.stages):
            raise PrunerError(
                f"schedule: {self.name} selects before the language model, so its only stage is at layer {BEFORE}; "
                "for stages inside, put a second method after it: selector >> pruner"
            )

    def plan(self, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None) -> Schedule:
        if self.schedule is not None:
            return super().plan(num_layers, vision_tokens, scoring)
        assert self.budget is not None
        keep = Budget(self.budget).whole_tokens(vision_tokens)
        return Schedule((Stage(BEFORE, keep),) if keep < vision_tokens else (), num_layers, vision_tokens)

    def __rshift__(self, inside: Pruner) -> Composed:
        return Composed(before=self, inside=inside)


@dataclasses.dataclass(frozen=True)
class TwoPart(Pruner, ABC):
    """A pruner whose stage at layer -1 is one method's and whose stages inside are another's."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Any, Pruner]:
        """The method before the language model and the one inside it."""

    @property
    def capabilities(self) -> Capabilities:
        first = self.parts[0].capabilities
        return dataclasses.replace(self.parts[1].capabilities, before=True, reads=first.reads, merging=first.merging)

    def __rshift__(self, other: Any) -> Any:
        raise PrunerError(f"{self.name} >> ...: it has both parts already; compose its selection with another method")

    def select_before(self, view: FeatureView) -> Selection:
        return self.parts[0].select_before(view)

    def score(self, view: StageView) -> Tensor:
        return self.parts[1].score(view)

    def select(self, view: StageView, keeps: tuple[int, ...]) -> Selection:
        return self.parts[1].select(view, keeps)


@dataclasses.dataclass(frozen=True)
class Composed(TwoPart):
    """Two methods, one after the other. Made by ``before >> inside``.

    Each plans its own stages. The tokens that `before` keeps are the prompt of `inside`: shares of an explicit schedule
    count from there. A *budget* of `inside` is the true average of the whole: tokens given to a decoder layer, or a
    share of all vision tokens in the prompt.

    Attributes:
        before: the selection before the language model.
        inside: the method inside it.
    """

    name: ClassVar[str] = "composed"
    reference: ClassVar[str] = "composition"

    budget: float | None = dataclasses.field(default=None, init=False, repr=False)
    schedule: Schedule | None = dataclasses.field(default=None, init=False, repr=False)
    positions: Any = dataclasses.field(default="keep", init=False, repr=False)
    before: Selector = dataclasses.field(kw_only=True)
    inside: Pruner = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.before, Selector):
            raise PrunerError(f"before: must select before the language model, as DivPrune does, not {self.before!r}")
        if not isinstance(self.inside, Pruner) or isinstance(self.inside, (Selector, TwoPart)):
            raise PrunerError(f"inside: must prune inside the language model, as AdaptInfer does, not {self.inside!r}")
        if self.before.positions != self.inside.positions:
            raise PrunerError("positions: both methods must treat positions alike")
        object.__setattr__(self, "positions", self.inside.positions)

    @property
    def parts(self) -> tuple[Selector, Pruner]:
        return self.before, self.inside

    def plan(self, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None = None) -> Schedule:
        before = self.before.plan(num_layers, vision_tokens, scoring)
        entering = before.tokens_per_layer(vision_tokens)[0]
        stages = self._inside(entering, num_layers, vision_tokens, scoring)
        return Schedule((*before.stages, *stages), num_layers, vision_tokens)

    def _inside(
        self, entering: int, num_layers: int, vision_tokens: int, scoring: Sequence[int] | None
    ) -> tuple[Stage, ...]:
        """The stages inside, with keeps as whole tokens."""
        inside, budget = self.inside, self.inside.budget
        if not entering:
            return ()
        if budget is not None:
            within = Budget(budget).within(vision_tokens, entering).amount
            if within > entering:
                raise ScheduleError(
                    f"budget: a true average of {within:.4g} vision tokens cannot be met, for {self.before.name} lets "
                    f"only {entering} into the language model; let it keep more, or take a smaller budget"
                )
            if within == entering:
                return ()
            inside = dataclasses.replace(inside, budget=within)
        schedule = inside.plan(num_layers, entering, scoring)
        return tuple(
            Stage(stage.layer, keep) for stage, keep in zip(schedule.stages, schedule.keeps(entering), strict=True)
        )
