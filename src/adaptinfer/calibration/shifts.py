"""Where in depth the attention over vision tokens shifts: change points between distributions, with their own null.

A layer's attention over the vision tokens is a distribution. Two layers differ by their Jensen-Shannon divergence
(bits), or by how differently they rank the tokens (half of one minus Spearman's correlation). Both are squared
distances in a Euclidean space, so that the dispersion of the layers splits into parts within and between segments of
depth, and a shift is the split that explains most (the energy statistic of Székely and Rizzo, segment by segment as in
Matteson and James, 2014). Every boundary is looked at, that between layers 0 and 1 included.

Two shifts lie at least an eighth of the depth apart, and two layers.

Null: the layers of every sample in a random order of its own, inside the segment that is to be split. Confidence: how
often resampled samples give the same layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Distance = Literal["js", "rank"]

_BAND = (0.025, 0.975)
_SPACING = 8


@dataclass(frozen=True)
class Shift:
    """One shift.

    Attributes:
        layer: the first layer after it, whose scores are the new ones: a stage belongs there.
        explained: share of the dispersion of all layers that this split explains.
        p_value: of as large a gain in the segment under the null.
        confidence: share of resamples of the samples that have a shift at this very layer.
        nearby: share of those that have one here or one layer off.
    """

    layer: int
    explained: float
    p_value: float
    confidence: float
    nearby: float


@dataclass(frozen=True, eq=False)
class Shifts:
    """All shifts of a model on its samples.

    Attributes:
        found: by what they explain, the largest first.
        layers: the layers that were compared, [n].
        steps: float64 [n - 1], mean distance between each layer and the one before (root of the divergence).
        null_low: the lower end of the 95 % band of the steps under the null, one for all.
        null_high: its upper end.
    """

    found: tuple[Shift, ...]
    layers: tuple[int, ...]
    steps: np.ndarray
    null_low: float
    null_high: float


def distances(mass: np.ndarray, kind: Distance = "js") -> np.ndarray:
    """Squared distances between the layers of one sample: [n, V] -> float64 [n, n] in [0, 1]."""
    if kind == "rank":
        ranks = np.argsort(np.argsort(mass, axis=1, kind="stable"), axis=1).astype(np.float64)
        ranks -= ranks.mean(axis=1, keepdims=True)
        norm = np.maximum(np.sqrt((ranks**2).sum(axis=1)), 1e-30)
        return np.clip((1 - ranks @ ranks.T / np.outer(norm, norm)) / 2, 0, 1) * (1 - np.eye(len(mass)))
    values = mass.astype(np.float64)
    totals = values.sum(axis=1, keepdims=True)
    shares = np.where(totals > 0, values / np.where(totals > 0, totals, 1), 1 / mass.shape[1])
    entropy = _entropy(shares)
    mixed = np.stack([_entropy((shares + row) / 2) for row in shares])  # a row at a time: n x V, not n x n x V
    return np.clip(mixed - (entropy[:, None] + entropy) / 2, 0, 1)


def detect_shifts(
    matrices: np.ndarray,
    layers: Sequence[int],
    most: int = 3,
    alpha: float = 0.05,
    repeats: int = 199,
    resamples: int = 200,
    seed: int = 0,
) -> Shifts:
    """Split the depth where that explains most, as long as the null does not explain as much.

    Args:
        matrices: [N, n, n] from `distances`, one per sample.
        layers: the n layers that they compare.
        most: shifts to find at most.
        alpha: level of the test of each split.
        repeats: of the null.
        resamples: of the samples, for confidence.
        seed: of both.
    """
    samples, depth = matrices.shape[:2]
    rng = np.random.default_rng(seed)
    mean = matrices.mean(axis=0)
    whole = mean.sum() / (2 * depth)
    splits: list[tuple[int, float, float]] = []
    while len(splits) < most:
        best = _best_split(mean, [split[0] for split in splits])
        if best is None:
            break
        start, at, stop, gain = best
        null = np.array(
            [split_gains(_shuffled(matrices[:, start:stop, start:stop], rng)).max() for _ in range(repeats)]
        )
        p_value = (1 + int((null >= gain).sum())) / (1 + repeats)
        if p_value > alpha:
            break
        splits.append((at, gain / whole, p_value))
    again = np.zeros((resamples, depth), dtype=bool)
    for row in again:
        picked = np.bincount(rng.integers(samples, size=samples), minlength=samples) / samples
        row[_segment(np.tensordot(picked, matrices, axes=1), len(splits))] = True
    near = again.copy()
    near[:, 1:] |= again[:, :-1]
    near[:, :-1] |= again[:, 1:]
    found = tuple(
        Shift(layers[at], float(explained), p_value, float(again[:, at].mean()), float(near[:, at].mean()))
        for at, explained, p_value in splits
    )
    beside = np.arange(depth - 1)
    roots = np.sqrt(matrices)
    null = np.array([_shuffled(roots, rng)[beside, beside + 1].mean() for _ in range(repeats)])
    low, high = np.quantile(null, _BAND)
    steps = roots[:, beside, beside + 1].mean(axis=0)
    return Shifts(found, tuple(layers), steps, float(low), float(high))


def _entropy(shares: np.ndarray) -> np.ndarray:
    """In bits, over the last axis."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=-1)


def split_gains(matrix: np.ndarray) -> np.ndarray:
    """Dispersion between the two sides of each split of n layers, [n, n] -> [n - 1]; entry i splits before layer i + 1.

    With squared distances d the dispersion of a set is Σ d / (2 size), and that between is all less that within.
    """
    size = len(matrix)
    corner = matrix.cumsum(axis=0).cumsum(axis=1)
    left = np.arange(1, size)
    upper = corner[left - 1, left - 1]
    lower = corner[-1, -1] - corner[left - 1, -1] - corner[-1, left - 1] + upper
    return (corner[-1, -1] / size - upper / left - lower / (size - left)) / 2


def _best_split(matrix: np.ndarray, taken: Sequence[int]) -> tuple[int, int, int, float] | None:
    """The split of any present segment with the largest gain: (segment's start, split, segment's end, gain)."""
    edges = [0, *sorted(taken), len(matrix)]
    apart = max(2, -(-len(matrix) // _SPACING))
    best = None
    for start, stop in itertools.pairwise(edges):
        if stop - start > 1:
            gains = split_gains(matrix[start:stop, start:stop])
            if start:
                gains[: apart - 1] = -np.inf
            if stop < len(matrix):
                gains[len(gains) - apart + 1 :] = -np.inf
            at = int(gains.argmax())
            if gains[at] > 0 and (best is None or gains[at] > best[3]):
                best = start, start + at + 1, stop, float(gains[at])
    return best


def _segment(matrix: np.ndarray, count: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < count and (best := _best_split(matrix, taken)) is not None:
        taken.append(best[1])
    return taken


def _shuffled(matrices: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean of [N, n, n] with the layers of every sample in an order of its own: [n, n]."""
    samples, size = matrices.shape[:2]
    order = np.argsort(rng.random((samples, size)), axis=1)
    rows = np.arange(samples)[:, None, None]
    return matrices[rows, order[:, :, None], order[:, None, :]].mean(axis=0)
