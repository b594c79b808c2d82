"""What a schedule is judged by: the attention mass that survives it, and what its layers cost.

Kept mass: a guiding token's attention to vision tokens in the unpruned model, over all layers; the share of it that is
paid to tokens which are still there. Who is there follows the rule of a pruned run: a stage keeps the best by its own
layer's score among those that the stage before kept. Each sample counts the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from adaptinfer.calibration.record import Reading
from adaptinfer.errors import InputError
from adaptinfer.schedule import ModelShape, Schedule, Stage

_MEMORY = 2**30  # bytes of readings that are held at once


@dataclass(frozen=True)
class TokenCost:
    """A layer costs the vision tokens that it is given: the budget is a true average."""

    hint: ClassVar[str] = " (a budget below 1 is a share of them, from 1 on a number)"

    def layer(self, given: int, kept: int) -> int:
        """Of one layer that is given some vision tokens and hands on ``kept``."""
        return given

    def words(self, total: int, num_layers: int) -> str:
        """A cost over all layers for people."""
        return f"{total / num_layers:.4g} vision tokens a layer"


@dataclass(frozen=True)
class FlopCost:
    """A layer costs its FLOPs, with early drop.

    Attributes:
        shape: of the language model.
        text_tokens: in the prompt.
    """

    hint: ClassVar[str] = ""

    shape: ModelShape
    text_tokens: int

    def layer(self, given: int, kept: int) -> int:
        """Of one layer that is given some vision tokens and hands on ``kept``."""
        return self.shape.layer_flops(given + self.text_tokens, kept + self.text_tokens)

    def words(self, total: int, num_layers: int) -> str:
        """A cost over all layers for people."""
        return f"{total / 1e9:.4g} GFLOPs"


Cost = TokenCost | FlopCost


class KeptMass:
    """Readings, ready to judge schedules on.

    Samples may differ in their number of vision tokens; keeps are meant for the most frequent one, and scale with the
    others as in `Schedule`. Readings beyond 1 GiB are left out evenly.

    Args:
        readings: of one model.
        possible: layers in which a stage may sit; never the last of the model.

    Raises:
        InputError: no reading, or no attention in any.
    """

    def __init__(self, readings: Iterable[Reading], possible: Sequence[int]) -> None:
        held = _within_memory(readings)
        held = [reading for reading in held if reading.vision_tokens and reading.mass.sum() > 0]
        if not held:
            raise InputError("no sample could be used")
        sizes = [reading.vision_tokens for reading in held]
        self.num_layers = held[0].mass.shape[0]
        self.possible = tuple(layer for layer in possible if layer < self.num_layers - 1)
        self.vision_tokens = max(sorted(set(sizes)), key=sizes.count)
        self.text_tokens = int(np.median([reading.text_tokens for reading in held]))
        self.kinds = tuple(reading.kind for reading in held)
        self._sizes = np.array(sizes)
        self._tables: dict[tuple[int, ...], np.ndarray] = {}
        width = max(sizes)
        shape = (len(held), self.num_layers, width)
        self._mass = np.zeros(shape, dtype=np.float32)
        self._rank = np.full(shape, width, dtype=np.int32)  # 0 is the best token by the layer's score
        for row, reading in enumerate(held):
            self._mass[row, :, : sizes[row]] = reading.mass / reading.mass.sum(dtype=np.float64)
            order = np.argsort(-reading.score, axis=1, kind="stable")
            np.put_along_axis(self._rank[row], order, np.arange(sizes[row], dtype=np.int32)[None], axis=1)

    def __len__(self) -> int:
        return len(self._sizes)

    @cached_property
    def by_layer(self) -> np.ndarray:
        """Share of a sample's mass that is paid in each layer, float64 [N, L]."""
        return self._mass.sum(axis=2, dtype=np.float64)

    def some(self, samples: np.ndarray) -> KeptMass:
        """The same for a few samples, by their numbers; schedules stay meant for `vision_tokens`."""
        fewer = object.__new__(KeptMass)
        fewer.num_layers, fewer.possible = self.num_layers, self.possible
        fewer.vision_tokens, fewer.text_tokens = self.vision_tokens, self.text_tokens
        fewer.kinds = tuple(self.kinds[each] for each in samples)
        fewer._sizes, fewer._mass, fewer._rank = self._sizes[samples], self._mass[samples], self._rank[samples]
        fewer._tables = {}
        return fewer

    def of(self, schedule: Schedule) -> np.ndarray:
        """Kept mass of each sample, float64 [N], in [0, 1].

        Args:
            schedule: for `vision_tokens`.
        """
        layers = [stage.layer for stage in schedule.stages]
        keeps = [int(stage.keep) for stage in schedule.stages]
        alive, kept, start = None, np.zeros(len(self)), 0  # None: all of them
        for layer, keep in zip([*layers, self.num_layers - 1], [*keeps, 0], strict=True):
            mass = self._sums[layer + 1] - self._sums[start]
            kept += (mass if alive is None else mass * alive).sum(axis=1, dtype=np.float64)
            if layer < self.num_layers - 1:
                alive = self._survivors(layer, alive, keep)
            start = layer + 1
        return kept

    def segments(self, grid: Sequence[int]) -> np.ndarray:
        """Mean mass after one stage alone: float64 [L, K, L + 1].

        Entry [l, k, j] is what the ``grid[k]`` best tokens by layer l's score hold of the layers l + 1 ... j - 1.
        """
        key = tuple(grid)
        if key in self._tables:
            return self._tables[key]
        table = np.zeros((self.num_layers, len(grid), self.num_layers + 1))
        counts = np.stack([_scaled(keep, self._sizes, self.vision_tokens) for keep in grid], axis=1)
        for layer in self.possible:
            order = np.argsort(self._rank[:, layer], axis=1)
            for later in range(layer + 1, self.num_layers):
                held = np.take_along_axis(self._mass[:, later], order, axis=1).cumsum(axis=1, dtype=np.float64)
                held = np.concatenate([np.zeros((len(self), 1)), held], axis=1)
                table[layer, :, later + 1] = np.take_along_axis(held, counts, axis=1).mean(axis=0)
        self._tables[key] = table.cumsum(axis=2)
        return self._tables[key]

    def schedule(self, layers: Sequence[int], keeps: Sequence[int], name: str | None = None) -> Schedule:
        """A schedule for these readings; stages that drop nothing are left out."""
        stages, entering = [], self.vision_tokens
        for layer, keep in zip(layers, keeps, strict=True):
            if keep < entering:
                stages.append(Stage(int(layer), int(keep)))
                entering = keep
        return Schedule(tuple(stages), self.num_layers, self.vision_tokens, name=name)

    def cost(self, cost: Cost, layers: Sequence[int], keeps: Sequence[int]) -> int:
        """What a prompt of `vision_tokens` costs over all layers."""
        kept_at = dict(zip(layers, keeps, strict=True))
        given, total = self.vision_tokens, 0
        for layer in range(self.num_layers):
            kept = kept_at.get(layer, given)
            total += cost.layer(given, kept)
            given = kept
        return total

    @cached_property
    def _sums(self) -> np.ndarray:
        """Mass of the layers before each, [L + 1, N, V]: the mass of a range of layers is one difference."""
        sums = np.zeros((self.num_layers + 1, *self._rank[:, 0].shape), dtype=np.float32)
        np.cumsum(self._mass.swapaxes(0, 1), axis=0, out=sums[1:])
        return sums

    def _survivors(self, layer: int, alive: np.ndarray | None, keep: int) -> np.ndarray:
        counts = _scaled(keep, self._sizes, self.vision_tokens)
        ranks = self._rank[:, layer]
        if alive is None:
            return ranks < counts[:, None]
        rank = np.where(alive, ranks, alive.shape[1])
        counts = np.minimum(counts, alive.sum(axis=1))
        # Ranks are distinct, so the keep-th smallest is a bound that exactly so many meet.
        bound = np.take_along_axis(np.sort(rank, axis=1), np.maximum(counts - 1, 0)[:, None], axis=1)
        return alive & (rank <= bound) & (counts > 0)[:, None]


def _scaled(keep: int, sizes: np.ndarray, reference: int) -> np.ndarray:
    """A keep for each sample, as `Schedule.keeps` scales it: halves are rounded up, int64 [N]."""
    return np.minimum(sizes, (2 * keep * sizes + reference) // (2 * reference))


def _within_memory(readings: Iterable[Reading]) -> list[Reading]:
    """Readings that fit: every second one of those read so far is let go whenever they do not."""
    held: list[Reading] = []
    step = 1
    for number, reading in enumerate(readings):
        if number % step == 0:
            held.append(reading)
            if len(held) * 3 * math.prod(reading.mass.shape) * 4 > _MEMORY:
                held, step = held[::2], 2 * step
    return held
