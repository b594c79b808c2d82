"""Paired bootstrap over groups of samples, and precision and recall. Arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from adaptinfer.evaluation.metrics import yes_or_no

LEVEL = 0.95
RESAMPLES = 2000
_CHUNK = 2**22  # weights held at once
LEAST_GROUPS = 6  # 2 x 0.5 ** 6 is the first below 0.05
_SAME = 1e-9  # sums over seeds are no further apart than this if they are equal

Array = np.ndarray


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; the bounds are NaN where there is nothing to resample."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference, and in how many groups there is one at all."""

    groups: int


class Resamples:
    """Means of columns, and what they are in resamples of the groups. All columns share the resamples: that pairs them.

    Not `scipy.stats.bootstrap`: it refuses a single group, has no interval for a column that some resamples lack, and
    would gather all columns for each resample where a matrix product does.

    Args:
        sums: float [G, C], per group and column the sum of its scores.
        counts: float [G, C], of how many answers. A column's mean is its sum over all groups by its count.
        seed: of the resamples; the same for the same data.
    """

    def __init__(self, sums: Array, counts: Array, seed: int = 0, resamples: int = RESAMPLES) -> None:
        groups = len(sums)
        self._sums, self._counts = sums, counts
        rng = np.random.default_rng(seed)
        means = []
        step = max(1, _CHUNK // groups)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.values: Array = sums.sum(axis=0) / counts.sum(axis=0)
            for start in range(0, resamples, step):
                drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(step, resamples - start))
                means.append((drawn @ sums) / (drawn @ counts))
        self.means: Array = np.concatenate(means)

    def mean(self, column: int) -> Interval:
        """Of one column. Where all groups agree on 0 or 1, which no resample can doubt, by Wilson over the groups."""
        value, groups = float(self.values[column]), int((self._counts[:, column] > 0).sum())
        if value in (0.0, 1.0):
            found = binomtest(round(value * groups), groups).proportion_ci(LEVEL, method="wilson")
            return Interval(value, float(found.low), float(found.high))
        return Interval(value, *_bounds(self.means[:, column]))

    def difference(self, column: int, other: int) -> Difference:
        """Of one column less another, resample by resample."""
        low, high = _bounds(self.means[:, column] - self.means[:, other])
        apart = np.abs(self._sums[:, column] - self._sums[:, other]) > _SAME
        return Difference(float(self.values[column] - self.values[other]), low, high, int(apart.sum()))

    def ratio(self, column: int, other: int) -> Interval:
        """Of one column over another."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = float(self.values[column] / self.values[other])
            return Interval(ratio, *_bounds(self.means[:, column] / self.means[:, other]))


def verdict(difference: Difference) -> str:
    """``better`` or ``worse`` if the interval of the paired difference excludes 0 and enough groups differ.

    Otherwise ``open``: with all differing groups on one side, a bootstrap excludes 0 from four on, a two-sided sign
    test from six.
    """
    if difference.groups < LEAST_GROUPS:
        return "open"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "open"


@dataclass(frozen=True)
class YesNo:
    """Answers to yes/no questions, with "yes" as the positive and every other answer, such as "red", as a no.

    Attributes:
        questions: how many, over all seeds.
        precision: of the answers "yes" that many were right; NaN if there was none.
        recall: of the questions to be answered "yes" that many were; NaN if there was none.
        yes_share: how often the answer was "yes".
    """

    questions: int
    precision: float
    recall: float
    yes_share: float


def yes_no(answers: Sequence[str], references: Sequence[str]) -> YesNo:
    """Precision, recall and the share of "yes"."""
    said = np.array([yes_or_no(answer) == "yes" for answer in answers])
    true = np.array([yes_or_no(reference) == "yes" for reference in references])
    hits = int((said & true).sum())

    def share(of: int) -> float:
        return hits / of if of else float("nan")

    return YesNo(len(said), share(int(said.sum())), share(int(true.sum())), float(said.mean()))


def _bounds(resampled: Array) -> tuple[float, float]:
    found = resampled[np.isfinite(resampled)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
