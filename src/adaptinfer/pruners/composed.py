"""A selection before the language model and stages inside it as one pruner: ``DivPrune(...) >> AdaptInfer(...)``."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from adaptinfer.pruners.base import Need, Pruner, PrunerError, Selection
from adaptinfer.pruners.before import Read, Selector, SelectsBefore
from adaptinfer.schedule import Budget, Schedule, ScheduleError, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from adaptinfer.engine.selection import FeatureView
    from adaptinfer.engine.stage import StageView

__all__ = ["Composed", "TwoPart"]


@dataclasses.dataclass(frozen=True)
class TwoPart(SelectsBefore, Pruner):
    """A pruner whose stage at layer -1 is one method's and whose stages inside are another's."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Any, Pruner]:
        """The method before the language model, a `SelectsBefore`, and the one inside it."""

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.parts[0].reads

    def __rshift__(self, other: Any) -> Any:
        raise PrunerError(f"{self.name} >> ...: it has both parts already; compose its selection with another method")

    @property
    def needs(self) -> frozenset[Need]:
        return self.parts[1].needs

    @property
    def varies(self) -> bool:
        return self.parts[1].varies

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
