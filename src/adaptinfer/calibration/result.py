"""What a calibration comes to: the schedule, what it was chosen from, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptinfer.calibration.detect import Histogram
from adaptinfer.calibration.plots import draw
from adaptinfer.calibration.shifts import Shifts
from adaptinfer.errors import InputError
from adaptinfer.files import write_whole
from adaptinfer.schedule import Schedule

FORMAT, VERSION = "adaptinfer.calibration", 1
_RESAMPLES = 2000


@dataclass(frozen=True)
class Candidate:
    """One way to choose a schedule, and how it did on the calibration samples.

    Attributes:
        name: of the way.
        schedule: None if it found no stages, or none that meet the budget.
        layers: that a detector found; empty for the other ways.
        kept_mass: mean share of attention mass that survives.
        low: lower end of its 95 % interval over samples.
        high: the upper end.
        gain: mean difference to the published shape at the same budget, sample by sample; None (as its ends) where that
            cannot meet the budget.
        gain_low: lower end of its 95 % interval.
        gain_high: the upper end.
    """

    name: str
    schedule: Schedule | None
    layers: tuple[int, ...] = ()
    kept_mass: float = 0.0
    low: float = 0.0
    high: float = 0.0
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None


@dataclass(frozen=True)
class FrontierPoint:
    """Kept mass at one budget, of the published shape (None: it cannot meet it) and of the best that was found."""

    true_average: float
    published: float | None
    optimised: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """A schedule from data.

    Attributes:
        schedule: the optimised one.
        candidates: it, the published shape, and the stages of both detectors with the published proportions of keeps.
        by_stages: kept mass of the best schedule for each number of stages.
        mass_by_layer: float64 [3, L], share of the mass that each layer holds: 10 % quantile over samples, mean, 90 %.
        histogram: the published detector's, with its null.
        shifts: of the attention distributions (Jensen-Shannon).
        rank_shifts: of the order in which they put the tokens.
        frontier: kept mass against budget.
        provenance: model, data, samples, budget, versions; also in ``schedule.json``.
        skipped: samples that could not be used, each with its reason.
    """

    schedule: Schedule
    candidates: tuple[Candidate, ...]
    by_stages: dict[int, float]
    mass_by_layer: np.ndarray
    histogram: Histogram
    shifts: Shifts
    rank_shifts: Shifts
    frontier: tuple[FrontierPoint, ...]
    provenance: dict[str, Any]
    skipped: tuple[str, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate whose schedule it is."""
        return self.candidates[-1]

    @property
    def curves(self) -> dict[str, Any]:
        """Everything that the plots show, in JSON."""
        shifts = {
            name: {
                "steps": each.steps.tolist(),
                "null_band": [each.null_low, each.null_high],
                "layers": list(each.layers),
                "found": [vars(shift) for shift in each.found],
            }
            for name, each in (("js", self.shifts), ("rank", self.rank_shifts))
        }
        detector = {
            "layers": list(self.histogram.layers),
            "counts": self.histogram.counts.tolist(),
            "null_mean": self.histogram.null_mean.tolist(),
            "null_band": [self.histogram.null_low.tolist(), self.histogram.null_high.tolist()],
            "constant_curve": self.histogram.flat,
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "provenance": self.provenance,
            "skipped": list(self.skipped),
            "candidates": [
                {**vars(each), "schedule": None if each.schedule is None else json.loads(each.schedule.to_json())}
                for each in self.candidates
            ],
            "kept_mass_by_stages": {str(number): kept for number, kept in self.by_stages.items()},
            "mass_by_layer": dict(zip(("q10", "mean", "q90"), self.mass_by_layer.tolist(), strict=True)),
            "published_detector": detector,
            "shifts": shifts,
            "frontier": [vars(point) for point in self.frontier],
        }

    def plot(self, path: str | Path) -> None:
        """Draw why this schedule (.png, .pdf or .svg). Raises InputError if the file cannot be written."""
        draw(self.curves, Path(path))

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``schedule.json``, ``curves.json`` and ``calibration.png`` into a folder (made if missing).

        Raises:
            InputError: it cannot be written.
        """
        folder = Path(folder)
        schedule = {**json.loads(self.schedule.to_json()), "provenance": self.provenance}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in (("schedule.json", schedule), ("curves.json", self.curves)):
                write_whole(folder / name, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise InputError(f"{str(folder)!r}: cannot be written ({error.strerror})") from None
        self.plot(folder / "calibration.png")
        return [folder / name for name in ("schedule.json", "curves.json", "calibration.png")]


def interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean over samples, by resampling them."""
    numbers = np.asarray(values, dtype=np.float64)
    picked = np.random.default_rng(seed).integers(len(numbers), size=(_RESAMPLES, len(numbers)))
    low, high = np.quantile(numbers[picked].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
