"""The schedule that keeps the most attention mass under a budget.

With one stage the best is found at once: in a given layer it is the largest keep that the budget allows. With more, a
dynamic programme over (layer, keep, cost) finds, for each number of stages, the best stages on a grid of keeps; it is
exact if every stage is judged by its own score over all vision tokens, for then a segment's mass depends on nothing
before it. In a run a stage can only keep what the stage before kept. So the programme's answers, the published shape
and its stages, and the best schedules so far with one stage more are then judged as they would run, and improved step
by step (a layer to either side, some tokens from one stage to another) until no step helps. What is returned is the
best of all, so it is never worse than the published shape, nor than with fewer stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from adaptinfer.calibration.objective import Cost, KeptMass
from adaptinfer.calibration.programme import Programme
from adaptinfer.schedule import Schedule, ScheduleError, solve

MOST_STAGES = 4
"""Stages that are tried when their number is left open."""

ENOUGH = 0.99
"""Left open, it is the fewest stages that keep this share of what the best number keeps."""

_STEPS = 100  # of improvement at most
_LOOKED_AT = 128  # samples that steps are judged on
_BRANCHES = 3  # places for a further stage that are followed up
_SHARES = (0.2, 0.4, 0.6, 0.8)  # of the way from the keep after a new stage to the one before it


@dataclass(frozen=True)
class Choice:
    """A schedule and the attention mass that survives it.

    Attributes:
        schedule: for the objective's vision tokens.
        kept_mass: mean over samples, in [0, 1].
    """

    schedule: Schedule
    kept_mass: float


def optimise(mass: KeptMass, cost: Cost, budget: int, stages: int | None = None) -> tuple[Choice, dict[int, Choice]]:
    """The best schedule that costs no more than the budget.

    One stage is the best there is. With more, it is the best that was met: never worse than with fewer, nor than the
    published shape, as a whole or with some of its stages alone, as long as these are no more than may be used.

    Args:
        mass: what survives.
        cost: of a layer.
        budget: in its unit, over all layers.
        stages: how many, at most; None lets the data choose: the fewest that keep 99 % of what the best number keeps.

    Returns:
        The choice, and for each number of stages that was tried the best with no more of them.

    Raises:
        ScheduleError: no schedule costs so little, or less than one stage is asked for.
    """
    check_stages(stages)
    check_budget(mass, cost, budget)
    if budget >= mass.cost(cost, (), ()):
        everything = _judged(mass, mass.schedule((), ()))
        return everything, {0: everything}
    most = min(stages or MOST_STAGES, len(mass.possible))
    search = _Search(mass, cost, budget)
    published = published_shape(mass, cost, budget)
    programme = Programme(mass, cost, budget, most) if most > 1 else None
    met = [_judged(mass, _one_stage(mass, cost, budget))]
    for number in range(2, most + 1):
        planned = programme.best(number, budget) if programme is not None else None
        starts = [
            *search.with_one_more([each.schedule for each in met]),
            planned,
            _topped_up(mass, cost, budget, planned),
        ]
        starts += _published_stages(mass, cost, budget, published, number)
        found = {each for start in starts if start is not None for each in (start, search.improved(start))}
        met += [_judged(mass, each) for each in sorted(found, key=_parts)]
    tried = {
        number: _best([each for each in met if len(each.schedule.stages) <= number]) for number in range(1, most + 1)
    }
    best = tried[most]
    enough = max(ENOUGH * best.kept_mass, 0.0 if published is None else _judged(mass, published).kept_mass)
    chosen = best if stages else next((each for each in tried.values() if each.kept_mass >= enough), best)
    return chosen, tried


def frontier(mass: KeptMass, cost: Cost, budgets: Sequence[int], stages: int) -> list[Choice]:
    """What can be kept at several budgets: the best of one stage, the programme and the published shape, unimproved.

    Args:
        mass: what survives.
        cost: of a layer.
        budgets: each one that `check_budget` lets pass.
        stages: at most.
    """
    found = []
    programme = Programme(mass, cost, max(budgets, default=0), stages)
    for budget in budgets:
        best = (programme.best(number, budget) for number in range(1, stages + 1))
        candidates = [_one_stage(mass, cost, budget), *(_topped_up(mass, cost, budget, each) for each in best)]
        candidates += _published_stages(mass, cost, budget, published_shape(mass, cost, budget), stages)
        found.append(_best([_judged(mass, each) for each in candidates if each is not None]))
    return found


def check_stages(stages: int | None) -> None:
    """Refuse what is no number of stages. Raises ScheduleError."""
    if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int) or stages < 1):
        raise ScheduleError(
            f"stages: must be a whole number from 1 on, or None for as many as the data ask for, not {stages!r}"
        )


def check_budget(mass: KeptMass, cost: Cost, budget: int) -> None:
    """Refuse a budget below what the first layers cost if nothing is kept after them.

    Raises:
        ScheduleError: saying what the least is.
    """
    layers = mass.possible[:1]
    least = mass.cost(cost, layers, [0] * len(layers))
    if budget < least:
        where = f"layer {layers[0]}, the first that can prune" if layers else "every layer, since none can prune"
        raise ScheduleError(
            f"budget: no schedule meets {cost.words(budget, mass.num_layers)}: all {mass.vision_tokens} vision tokens "
            f"pass through {where}, which comes to {cost.words(least, mass.num_layers)} even if none is kept after"
            f"{cost.hint}"
        )


def published_shape(mass: KeptMass, cost: Cost, budget: int) -> Schedule | None:
    """The published layers and keeps in proportion, at no more than the budget; None where they cannot meet it."""
    return with_layers(mass, cost, budget, None)


def with_layers(mass: KeptMass, cost: Cost, budget: int, layers: Sequence[int] | None) -> Schedule | None:
    """Keeps in the published proportions for up to three stages in given layers (None: the published ones).

    Costs no more than the budget, and as little less as the last stage allows; None where the layers cannot meet it.
    """
    everything = mass.cost(cost, (), ())
    average = min(1.0, budget / everything) * mass.vision_tokens
    for _ in range(_STEPS):  # a solved budget may be exceeded a little, and FLOPs are no plain multiple of tokens
        try:
            found = solve(max(average, 1.0), mass.num_layers, mass.vision_tokens, layers, None, mass.possible)
        except ScheduleError:
            return None
        spent = mass.cost(cost, *_parts(found))
        if spent <= budget:
            return _filled(mass, cost, budget, *_parts(found), len(found.stages) - 1)
        average *= min(0.998, budget / spent)
    return None


def _judged(mass: KeptMass, schedule: Schedule) -> Choice:
    return Choice(schedule, float(mass.of(schedule).mean()))


def _best(met: Sequence[Choice]) -> Choice:
    return max(met, key=lambda choice: choice.kept_mass)


def _one_stage(mass: KeptMass, cost: Cost, budget: int) -> Schedule:
    """The best schedule with one stage: in a given layer that is the largest keep, so one look a layer finds it."""
    found = [_filled(mass, cost, budget, (layer,), (0,), 0) for layer in mass.possible]
    return max((each for each in found if each is not None), key=lambda each: _judged(mass, each).kept_mass)


def _published_stages(
    mass: KeptMass, cost: Cost, budget: int, published: Schedule | None, number: int
) -> list[Schedule | None]:
    """So many of the published shape's stages, with keeps in the published proportions; all if they are no more."""
    if published is None:
        return []
    if len(published.stages) <= number:
        return [published]
    layers, _ = _parts(published)
    return [with_layers(mass, cost, budget, some) for some in itertools.combinations(layers, number)]


class _Search:
    """Small steps from a schedule to better ones, judged as they would run, on some of the samples."""

    def __init__(self, mass: KeptMass, cost: Cost, budget: int) -> None:
        self._mass, self._cost, self._budget = mass, cost, budget
        samples = np.unique(np.linspace(0, len(mass) - 1, min(len(mass), _LOOKED_AT)).astype(int))
        self._looked_at = mass if len(samples) == len(mass) else mass.some(samples)
        self._known: dict[Schedule, float] = {}
        self._ends: dict[Schedule, Schedule] = {}

    def value(self, schedule: Schedule) -> float:
        """Kept mass, mean over the samples that are looked at."""
        if schedule not in self._known:
            self._known[schedule] = float(self._looked_at.of(schedule).mean())
        return self._known[schedule]

    def improved(self, start: Schedule) -> Schedule:
        """Take steps as long as one helps."""
        best, way = start, [start]
        for _ in range(_STEPS):
            steps = _steps(self._mass, self._cost, self._budget, *_parts(best))
            better = next((step for step in steps if self.value(step) > self.value(best) + 1e-9), None)
            if better is None or better in self._ends:
                best = self._ends.get(better, best) if better else best
                break
            best = better
            way.append(best)
        self._ends |= dict.fromkeys(way, best)
        return best

    def with_one_more(self, met: Sequence[Schedule]) -> list[Schedule]:
        """A stage put into a free layer of the best few, paid by what it saves: the best of these, layers distinct."""
        found: dict[tuple[int, ...], Schedule] = {}
        for start in sorted(set(met), key=lambda each: (-self.value(each), _parts(each)))[:_BRANCHES]:
            for each in self._inserted(*_parts(start)):
                layers, _ = _parts(each)
                found[layers] = max(found.get(layers, each), each, key=self.value)
        return sorted(found.values(), key=self.value, reverse=True)[:_BRANCHES]

    def _inserted(self, layers: tuple[int, ...], keeps: tuple[int, ...]) -> Iterator[Schedule]:
        for layer, share in itertools.product(self._mass.possible, _SHARES):
            if layer not in layers:
                at = sum(each < layer for each in layers)
                before, after = [self._mass.vision_tokens, *keeps][at], [*keeps, 0][at]
                more = [*layers[:at], layer, *layers[at:]]
                fewer = [*keeps[:at], after + round(share * (before - after)), *keeps[at:]]
                for other in sorted({max(at - 1, 0), min(at + 1, len(layers))}):
                    if found := _filled(self._mass, self._cost, self._budget, more, fewer, other):
                        yield found


def _steps(
    mass: KeptMass, cost: Cost, budget: int, layers: tuple[int, ...], keeps: tuple[int, ...]
) -> Iterator[Schedule]:
    """Every schedule that moves one stage, or a few tokens from one stage to another, and spends the budget."""
    for stage, other in itertools.product(range(len(layers)), repeat=2):
        at = mass.possible.index(layers[stage])
        for place in (at - 2, at - 1, at + 1, at + 2):
            if 0 <= place < len(mass.possible):
                moved = [*layers[:stage], mass.possible[place], *layers[stage + 1 :]]
                if sorted(set(moved)) == moved and (found := _filled(mass, cost, budget, moved, keeps, other)):
                    yield found
        # In place there is nothing to move, but what others have left of the budget may do for a token more.
        few = [1 << power for power in range(max(keeps[stage] // 4, 2).bit_length())] if other != stage else [0]
        for keep in (keeps[stage] + sign * each for each in few for sign in (-1, 1)):
            changed = [*keeps[:stage], keep, *keeps[stage + 1 :]]
            if found := _filled(mass, cost, budget, layers, changed, other):
                yield found


def _filled(
    mass: KeptMass, cost: Cost, budget: int, layers: Sequence[int], keeps: Sequence[int], stage: int
) -> Schedule | None:
    """The schedule with one stage's keep as large as the budget and its neighbours allow; None if that cannot be."""
    keeps = list(keeps)
    if not keeps:
        return mass.schedule((), ())
    low = keeps[stage + 1] if stage + 1 < len(keeps) else 0
    high = keeps[stage - 1] if stage else mass.vision_tokens

    def spent(keep: int) -> int:
        return mass.cost(cost, layers, [*keeps[:stage], keep, *keeps[stage + 1 :]])

    if low > high or low < 0 or spent(low) > budget:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle - 1)
    keeps[stage] = low
    if any(after > before for before, after in itertools.pairwise([mass.vision_tokens, *keeps, 0])):
        return None  # a keep that grows, or lies below 0
    return mass.schedule(layers, keeps)


def _topped_up(mass: KeptMass, cost: Cost, budget: int, schedule: Schedule | None) -> Schedule | None:
    """The last stage takes what rounding has left of the budget."""
    if schedule is None:
        return None
    return _filled(mass, cost, budget, *_parts(schedule), len(schedule.stages) - 1) or schedule


def _parts(schedule: Schedule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(stage.layer for stage in schedule.stages), tuple(int(stage.keep) for stage in schedule.stages)
