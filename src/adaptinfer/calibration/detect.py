"""The published shift detector, and what it finds where there is nothing to find.

As arXiv 2508.06084 has it: of each sample the tenth of the vision tokens with the most attention; each token's curve
over layers cumulated; one change point by binary segmentation with l2 cost; the layer before it counted in a histogram.
The paper reads its stages off by eye; here a rule does, and the histogram stands beside its null.

Known artefacts: constant attention yields layer 15 of 32; attention paid in layer 0 alone cannot be seen (the cumulated
curve is constant, and of equal gains the last is taken); 1 is the smallest answer there is; a spike in layer s yields
s - 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from adaptinfer.calibration.record import Reading
from adaptinfer.errors import InputError

LEAST_LAYERS = 4
"""A change point leaves two layers on either side."""

_SALIENT = 0.1
_BAND = (0.025, 0.975)
_SPACING = 8  # peaks nearer than an eighth of the depth are one


@dataclass(frozen=True, eq=False)
class Histogram:
    """Layers that the published detector finds, over tokens and samples.

    Attributes:
        layers: the n layers that have attention of their own.
        counts: int64 [n], how often each was found.
        null_mean: float64 [n], the same for the samples' layers in random order, mean of the repeats.
        null_low: float64 [n], lower end of their 95 % band.
        null_high: float64 [n], its upper end.
        flat: the layer that a constant curve yields.
        samples: how many there were.
    """

    layers: tuple[int, ...]
    counts: np.ndarray
    null_mean: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    flat: int
    samples: int


def salient_curves(mass: np.ndarray) -> np.ndarray:
    """The cumulated curves, float64 [n, L], of the tenth of the vision tokens with the most attention (at least one).

    Args:
        mass: [L, V]; scale does not matter, so mean or sum over rows and heads are the same here.
    """
    count = max(1, int(_SALIENT * mass.shape[1]))
    totals = mass.sum(axis=0, dtype=np.float64)
    chosen = np.sort(np.argsort(-totals, kind="stable")[:count])
    return np.cumsum(mass[:, chosen].T, axis=1, dtype=np.float64)


def published_layers(mass: np.ndarray) -> list[int]:
    """What the published detector says of each salient token of one sample: [L, V] -> layers, by ``ruptures`` itself.

    Raises:
        InputError: fewer than four layers.
    """
    import ruptures

    if mass.shape[0] < LEAST_LAYERS:
        raise InputError(f"a change point needs at least {LEAST_LAYERS} layers, the model has {mass.shape[0]}")
    detector = ruptures.Binseg(model="l2", jump=1)
    return [detector.fit(curve).predict(n_bkps=1)[0] - 1 for curve in salient_curves(mass)]


def breakpoints(cumulated: np.ndarray) -> np.ndarray:
    """The same change points, less one, of many cumulated curves at once: [..., L] -> int64 [...].

    The gain of splitting n values into a and b is ab/n times the squared difference of the means. Two values at least
    on either side; of equal gains the last, as in ruptures.
    """
    depth = cumulated.shape[-1]
    values = cumulated - cumulated[..., :1]  # exact zeros for a constant curve
    sums = np.cumsum(values, axis=-1)
    left = np.arange(2, depth - 1)
    before, whole = sums[..., left - 1], sums[..., -1:]
    gain = left * (depth - left) / depth * (before / left - (whole - before) / (depth - left)) ** 2
    return depth - 2 - np.argmax(gain[..., ::-1], axis=-1) - 1


def histogram(readings: Iterable[Reading], layers: Sequence[int], repeats: int = 200, seed: int = 0) -> Histogram:
    """Run the published detector on every sample, and on every sample with its layers in random order.

    Args:
        readings: of one model.
        layers: those that have attention of their own; the curves go over these.
        repeats: of the random order, which is one for all tokens of a sample.
        seed: of that order; sample by sample, so that it does not depend on how many there are.

    Raises:
        InputError: no readings, or fewer than four layers.
    """
    depth, samples = len(layers), 0
    counts, null = np.zeros(depth, dtype=np.int64), np.zeros((repeats, depth), dtype=np.int64)
    for reading in readings:
        mass = reading.mass[list(layers)]
        np.add.at(counts, published_layers(mass), 1)
        rng = np.random.default_rng((seed, reading.index))
        order = np.argsort(rng.random((repeats, depth)), axis=1)
        curves = np.diff(salient_curves(mass), axis=1, prepend=0.0)
        for found in breakpoints(np.cumsum(curves[:, order], axis=2)):
            null[np.arange(repeats), found] += 1
        samples += 1
    if not samples:
        raise InputError("no sample could be used")
    low, high = np.quantile(null, _BAND, axis=0)
    flat = layers[int(breakpoints(np.arange(1.0, 1 + depth)))]
    return Histogram(tuple(layers), counts, null.mean(axis=0), low, high, flat, samples)


def read_off(found: Histogram, stages: int, num_layers: int) -> tuple[int, ...]:
    """The stages' layers by a rule in place of an eye.

    A layer qualifies if its count lies above the null's 95 % band. Layers are taken by their excess over the null's
    mean, the largest first, unless one is taken already less than an eighth of the depth away.

    Args:
        found: the histogram.
        stages: how many layers at most.
        num_layers: depth of the model; no stage sits in its last layer.

    Returns:
        Ascending; fewer than ``stages``, or none, if the histogram holds no more.
    """
    excess = found.counts - found.null_mean
    taken: list[int] = []
    for at in sorted(range(len(found.layers)), key=lambda at: (-excess[at], at)):
        layer = found.layers[at]
        apart = all(abs(layer - other) >= max(2, num_layers / _SPACING) for other in taken)
        if layer < num_layers - 1 and found.counts[at] > found.null_high[at] and apart and len(taken) < stages:
            taken.append(layer)
    return tuple(sorted(taken))
