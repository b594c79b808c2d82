"""The schedule that keeps the most attention mass under a budget.

Two steps. A dynamic programme over (layer, keep, cost) finds, for each number of stages, the best stages on a grid of
keeps; it is exact if every stage is judged by its own score over all vision tokens, for then a segment's mass depends
on nothing before it. In a run a stage can only keep what the stage before kept. So the programme's answers, and the
published shape at the same budget, are then judged as they would run, and improved step by step (a layer to either
side, a few tokens from one stage to another) until no step helps. What is returned is the best of all, so it is never
worse than the published shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from adaptinfer.schedule import Schedule, ScheduleError, solve

if TYPE_CHECKING:
    from adaptinfer.calibration.objective import FlopCost, KeptMass, TokenCost

    Cost = TokenCost | FlopCost

__all__ = [
    "MOST_STAGES",
    "Choice",
    "Programme",
    "check_budget",
    "frontier",
    "keep_grid",
    "optimise",
    "published_shape",
    "with_layers",
]

MOST_STAGES = 4
"""Stages that are tried when their number is left open."""

ENOUGH = 0.99
"""Left open, it is the fewest stages that keep this share of what the best number keeps."""

_GRID = 40  # keeps that the programme looks at
_UNITS = 4096  # of cost; whole tokens as long as the budget has no more of them
_STEPS = 100  # of improvement at most
_LOOKED_AT = 128  # samples that steps are judged on


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

    Args:
        mass: what survives.
        cost: of a layer.
        budget: in its unit, over all layers.
        stages: how many, at most; None lets the data choose: the fewest that keep 99 % of what the best number keeps.

    Returns:
        The choice, and the best for each number of stages that was tried.

    Raises:
        ScheduleError: no schedule costs so little.
    """
    check_budget(mass, cost, budget)
    if budget >= mass.cost(cost, (), ()):
        everything = _judged(mass, mass.schedule((), ()))
        return everything, {0: everything}
    tried: dict[int, Choice] = {}
    published = published_shape(mass, cost, budget)
    most = stages or MOST_STAGES
    programme = Programme(mass, cost, budget, most)
    for number in range(1, most + 1):
        starts = [programme.best(number, budget), tried[number - 1].schedule if number - 1 in tried else None]
        if published is not None and len(published.stages) <= number:
            starts.append(published)
        candidates = [start for start in starts if start is not None]
        candidates += [_improved(mass, cost, budget, start) for start in candidates]
        if candidates:
            tried[number] = max((_judged(mass, each) for each in candidates), key=lambda choice: choice.kept_mass)
    best = max(tried.values(), key=lambda choice: choice.kept_mass)
    enough = max(ENOUGH * best.kept_mass, 0.0 if published is None else _judged(mass, published).kept_mass)
    chosen = best if stages else next(choice for choice in tried.values() if choice.kept_mass >= enough)
    return chosen, tried


def frontier(mass: KeptMass, cost: Cost, budgets: Sequence[int], stages: int) -> list[Choice]:
    """What can be kept at several budgets: the programme's best or the published shape, without further steps.

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
        candidates = [published_shape(mass, cost, budget), *(_topped_up(mass, cost, budget, each) for each in best)]
        judged = [_judged(mass, each) for each in candidates if each is not None]
        found.append(max(judged, key=lambda choice: choice.kept_mass))
    return found


def check_budget(mass: KeptMass, cost: Cost, budget: int) -> None:
    """Refuse a budget below what the first layers cost if nothing is kept behind them.

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


def keep_grid(vision_tokens: int) -> list[int]:
    """Keeps that the dynamic programme looks at: all if there are few, else some at even ratios; 0 is one of them."""
    if vision_tokens <= 2 * _GRID:
        return list(range(vision_tokens))
    return sorted({0, *np.round(np.geomspace(1, vision_tokens - 1, _GRID)).astype(int).tolist()})


class Programme:
    """The dynamic programme: the best schedules with 1, 2, ... stages, each stage judged by its own score alone.

    settled[l, k][c] is the largest mass of the layers 0 ... l if the last stage so far sits in layer l, keeps
    ``grid[k]``, and those layers cost c; arrived[l, k][c] the same for a layer l that is given ``grid[k]`` tokens,
    before it prunes or is paid for. Costs are whole units, rounded up, so that a budget holds.

    Args:
        mass: what survives.
        cost: of a layer.
        budget: over all layers; the largest that will be asked about.
        stages: the largest number of stages.
        grid: ascending keeps below the vision tokens; None for `keep_grid`.
    """

    def __init__(self, mass: KeptMass, cost: Cost, budget: int, stages: int, grid: Sequence[int] | None = None) -> None:
        self._mass, self._cost, self._grid = mass, cost, list(grid or keep_grid(mass.vision_tokens))
        self._unit = max(1, -(-budget // _UNITS))
        self._held = mass.segments(self._grid)
        room = budget // self._unit
        settled = self._first_stage(room)
        self._trail: list[tuple[_States, _States]] = [({}, settled)]
        for _ in range(stages - 1):
            arrived = self._arrive(settled, room)
            settled = self._settle(arrived, room)
            self._trail.append((arrived, settled))

    def best(self, stages: int, budget: int) -> Schedule | None:
        """The best schedule with exactly so many stages at no more than a budget; None where so many do not fit."""
        end = self._end(self._trail[stages - 1][1], budget // self._unit)
        if end is None:
            return None
        layer, k, spent = end
        way = [(layer, self._grid[k])]
        for arrived, settled in self._trail[stages - 1 : 0 : -1]:
            before = int(settled[layer, k].origin[spent])
            spent -= self._units(before, k)
            earlier = int(arrived[layer, before].origin[spent])
            spent -= self._units(before, before, layer - earlier - 1)
            layer, k = earlier, before
            way.append((layer, self._grid[k]))
        return self._mass.schedule([at for at, _ in reversed(way)], [keep for _, keep in reversed(way)])

    def _units(self, given: int, kept: int, layers: int = 1) -> int:
        """Of some layers that are given and hand on keeps with these numbers in the grid; -1 is all tokens."""
        entering = [*self._grid, self._mass.vision_tokens]
        return -(-layers * self._cost.layer(entering[given], entering[kept]) // self._unit)

    def _first_stage(self, room: int) -> _States:
        settled: _States = {}
        head = self._mass.by_layer.mean(axis=0).cumsum()
        for layer, k in itertools.product(self._mass.possible, range(len(self._grid))):
            start = np.full(room + 1, -np.inf)
            start[0] = head[layer]
            settled[layer, k] = _Best(room)
            settled[layer, k].offer(start, self._units(-1, -1, layer) + self._units(-1, k), -1)
        return settled

    def _arrive(self, settled: _States, room: int) -> _States:
        arrived: _States = {}
        for (layer, k), best in settled.items():
            for later in self._mass.possible:
                if later > layer:
                    values = best.values + self._held[layer, k, later + 1]
                    between = self._units(k, k, later - layer - 1)
                    arrived.setdefault((later, k), _Best(room)).offer(values, between, layer)
        return arrived

    def _settle(self, arrived: _States, room: int) -> _States:
        settled: _States = {}
        for (layer, k), best in arrived.items():
            for fewer in range(k):
                settled.setdefault((layer, fewer), _Best(room)).offer(best.values, self._units(k, fewer), k)
        return settled

    def _end(self, settled: _States, room: int) -> tuple[int, int, int] | None:
        """The last stage's layer and keep, and the cost up to it, of the best way through all layers."""
        end, value, depth = None, -np.inf, self._mass.num_layers
        for (layer, k), best in settled.items():
            left = room - self._units(k, k, depth - 1 - layer)
            if left >= 0:
                spent = int(best.values[: left + 1].argmax())
                total = best.values[spent] + self._held[layer, k, depth]
                if total > value:
                    end, value = (layer, k, spent), total
        return end


class _Best:
    """The largest mass at each cost, and where it came from."""

    def __init__(self, room: int) -> None:
        self.values = np.full(room + 1, -np.inf)
        self.origin = np.full(room + 1, -1, dtype=np.int16)

    def offer(self, values: np.ndarray, spent: int, origin: int) -> None:
        """Take what is better than before, at a cost larger by ``spent``."""
        if spent < len(values):
            shifted, present = values[: len(values) - spent], self.values[spent:]
            better = shifted > present
            np.copyto(present, shifted, where=better)
            self.origin[spent:][better] = origin


_States = dict[tuple[int, int], _Best]  # by layer and number in the grid of keeps


def _judged(mass: KeptMass, schedule: Schedule) -> Choice:
    return Choice(schedule, float(mass.of(schedule).mean()))


def _improved(mass: KeptMass, cost: Cost, budget: int, start: Schedule) -> Schedule:
    """Take steps as long as one helps, judged as the schedule would run, on some of the samples."""
    samples = np.unique(np.linspace(0, len(mass) - 1, min(len(mass), _LOOKED_AT)).astype(int))
    best, value = start, float(mass.of(start, samples).mean())
    for _ in range(_STEPS):
        for step in _steps(mass, cost, budget, *_parts(best)):
            if (reached := float(mass.of(step, samples).mean())) > value + 1e-9:
                best, value = step, reached
                break
        else:
            break
    return best


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
        if other != stage:
            large = max(2, keeps[stage] // 8)
            for keep in (keeps[stage] + each for each in (-large, -1, 1, large)):
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
