"""Which stages a prompt gets: the pruner's schedule for each sample, checked against the model."""

from __future__ import annotations

from adaptinfer.engine.families import Family
from adaptinfer.engine.layout import PromptLayout
from adaptinfer.pruners.contracts import Pruner
from adaptinfer.schedule import BEFORE, Schedule, ScheduleError


class Planner:
    """Schedules of one pruner on one model, each solved once."""

    def __init__(self, pruner: Pruner, family: Family, num_layers: int) -> None:
        """Raises:
        ScheduleError: the pruner's own schedule does not fit the model.
        """
        self.num_layers = num_layers
        self._pruner, self._model_type, self._scoring = pruner, family.model_type, family.scoring
        self._stage_layers = family.stage_layers(pruner.capabilities.needs)
        self._plans: dict[int, Schedule] = {}
        if pruner.schedule is not None:
            pruner.schedule.check(num_layers)
            self._check(pruner.schedule)

    def plan(self, vision_tokens: int) -> Schedule:
        """The schedule for a prompt with that many vision tokens.

        Raises:
            ScheduleError: the budget cannot be met for such a prompt.
        """
        if vision_tokens not in self._plans:
            schedule = self._pruner.plan(self.num_layers, vision_tokens, self._stage_layers)
            self._check(schedule)
            self._plans[vision_tokens] = schedule
        return self._plans[vision_tokens]

    def _check(self, schedule: Schedule) -> None:
        name = self._pruner.name
        if not self._pruner.capabilities.before and any(stage.layer == BEFORE for stage in schedule.stages):
            raise ScheduleError(
                f"stages: {name} scores inside a layer, so it cannot select before the first one (layer {BEFORE}); put "
                "a method that can before it, as in DivPrune(budget=128) >> AdaptInfer(budget=64)"
            )
        odd = [stage.layer for stage in schedule.stages if stage.layer not in (BEFORE, *self._stage_layers)]
        if odd:
            before_one = ", or stands before one" if self._pruner.capabilities.acts_after else ""
            raise ScheduleError(
                f"stages: layer {odd[0]} has no keys of its own to score with (linear attention, or keys of an earlier "
                f"layer){before_one}; {name} can prune "
                f"{self._model_type} in layers {', '.join(map(str, self._stage_layers))}"
            )

    def stages(self, layout: PromptLayout) -> dict[int, tuple[int, ...]]:
        """Vision tokens that each sample keeps after each stage; stages at which no sample drops any are left out."""
        left = list(layout.vision_counts)
        if self._pruner.capabilities.observes:
            return dict.fromkeys(self._scoring, layout.vision_counts) if any(left) else {}
        planned: dict[int, dict[int, int]] = {}
        for row, count in enumerate(layout.vision_counts):
            if count:
                try:
                    schedule = self.plan(count)
                    keeps = schedule.keeps(count)
                except ScheduleError as error:
                    where = f" (sample {row} of the batch)" if len(left) > 1 else ""
                    raise ScheduleError(f"{error}{where}") from None
                for stage, keep in zip(schedule.stages, keeps, strict=True):
                    planned.setdefault(stage.layer, {})[row] = keep
        stages = {}
        for layer in sorted(planned):
            keeps = [planned[layer].get(row, now) for row, now in enumerate(left)]
            if keeps != left:
                stages[layer] = tuple(keeps)
                left = keeps
        return stages
