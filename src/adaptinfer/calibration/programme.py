"""The dynamic programme over (layer, keep, cost): the best stages on a grid of keeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from adaptinfer.calibration.objective import Cost, KeptMass
from adaptinfer.schedule import Schedule

_GRID = 40  # keeps that the programme looks at
_UNITS = 4096  # of cost; whole tokens as long as the budget has no more of them


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
