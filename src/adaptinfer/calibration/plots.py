"""Why this schedule, in six panels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptinfer.errors import InputError
from adaptinfer.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from adaptinfer.calibration.result import Calibration
    from adaptinfer.schedule import Schedule

__all__ = ["PLOT_SUFFIXES", "draw"]

PLOT_SUFFIXES = (".png", ".pdf", ".svg")

_PAPER, _INK, _QUIET, _BAND = "white", "#1d2733", "#6b7785", "#d5dbe1"
_BLUE, _RED, _GREEN = "#0b6e99", "#c8553d", "#5b8c5a"


def draw(calibration: Calibration, path: Path) -> None:
    """Draw and save. Raises InputError if the file cannot be written, or for another kind of file."""
    from matplotlib.figure import Figure

    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"plot {str(path)!r}: must end in one of {', '.join(PLOT_SUFFIXES)}")
    figure = Figure(figsize=(15.5, 8.6), layout="constrained", facecolor=_PAPER)
    axes = figure.subplots(2, 3)
    panels = (_mass, _histogram, _shifts, _frontier, _stages, _staircase)
    for panel, place in zip(panels, axes.flat, strict=True):
        panel(place, calibration)
        _tidy(place)
    about = calibration.provenance
    figure.suptitle(
        f"{Path(about['model']['name']).name}: {about['samples']} samples, {budget_in_words(about['budget'])}, "
        f"scores of {about['method']['name']}",
        color=_INK,
        fontsize=12,
    )
    target = io.BytesIO()
    figure.savefig(target, format=path.suffix[1:].lower(), dpi=130, facecolor=_PAPER, metadata=_undated(path))
    try:
        write_whole(path, target.getvalue())
    except OSError as error:
        raise InputError(f"plot {str(path)!r}: cannot be written ({error.strerror})") from None


def budget_in_words(told: dict[str, Any]) -> str:
    if "flops_share" in told:
        return f"FLOPs share {told['flops_share']:.3g}"
    return f"true average {told['true_average']:.1f} of {told['vision_tokens']} ({100 * told['share']:.3g} %)"


def _mass(axes: Axes, calibration: Calibration) -> None:
    low, mean, high = calibration.mass_by_layer
    layers = np.arange(len(mean))
    axes.fill_between(layers, low, high, color=_BAND, label="10–90 % of samples")
    axes.plot(layers, mean, color=_BLUE, marker="o", markersize=4, label="mean")
    _mark_stages(axes, calibration.schedule)
    axes.set_ylim(0)
    axes.set_title("Text-to-vision attention by layer")
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the mass of all layers")
    _legend(axes)


def _histogram(axes: Axes, calibration: Calibration) -> None:
    found = calibration.histogram
    axes.bar(found.layers, found.counts, color=_BLUE, width=0.7, label="found")
    axes.fill_between(found.layers, found.null_low, found.null_high, color=_RED, alpha=0.25, step="mid")
    axes.step(found.layers, found.null_mean, where="mid", color=_RED, label="null: layers in random order, 95 % band")
    axes.axvline(found.flat, color=_QUIET, linestyle=":", label="what a constant curve yields")
    axes.set_title("The published detector and its null")
    axes.set_xlabel("layer")
    axes.set_ylabel("tokens x samples")
    axes.set_ylim(0, 1.6 * max(found.counts.max(), found.null_high.max()))
    _legend(axes)


def _shifts(axes: Axes, calibration: Calibration) -> None:
    for shifts, colour, label in (
        (calibration.shifts, _BLUE, "Jensen–Shannon"),
        (calibration.rank_shifts, _GREEN, "rank"),
    ):
        axes.plot(shifts.layers[1:], shifts.steps, color=colour, marker="o", markersize=4, label=label)
        axes.axhspan(shifts.null_low, shifts.null_high, color=colour, alpha=0.15)
    top = 1.45 * max(calibration.shifts.steps.max(), calibration.rank_shifts.steps.max())
    for shift in calibration.shifts.found:
        axes.axvline(shift.layer - 0.5, color=_RED, linewidth=1.2)
        text = f"{shift.explained:.0%}, in {shift.confidence:.0%}\nof resamples"
        axes.annotate(text, (shift.layer - 0.4, 0.03 * top), color=_RED, fontsize=8)
    axes.set_ylim(0, top)
    axes.set_title("Distance of each layer to the one before; shifts")
    axes.set_xlabel("layer")
    axes.set_ylabel("distance (bands: layers in random order)")
    _legend(axes)


def _frontier(axes: Axes, calibration: Calibration) -> None:
    points = calibration.frontier
    averages = [point.true_average for point in points]
    shown = [(point.true_average, point.published) for point in points if point.published is not None]
    axes.plot(averages, [point.optimised for point in points], color=_BLUE, marker="o", markersize=4, label="optimised")
    if shown:
        axes.plot(*zip(*shown, strict=True), color=_QUIET, marker="s", markersize=4, label="published shape")
    chosen = calibration.chosen
    axes.plot(calibration.schedule.true_average(), chosen.kept_mass, color=_RED, marker="*", markersize=13, linewidth=0)
    axes.set_title("Kept attention mass against budget")
    axes.set_xlabel("vision tokens given to a layer (true average)")
    axes.set_ylabel("share of the mass that survives")
    axes.set_ylim(0, 1)
    _legend(axes)


def _stages(axes: Axes, calibration: Calibration) -> None:
    shown = [each for each in calibration.candidates if each.schedule is not None]
    rows = np.arange(len(shown))[::-1]
    means = np.array([each.kept_mass for each in shown])
    errors = np.array([[each.kept_mass - each.low, each.high - each.kept_mass] for each in shown]).T
    colours = [_BLUE if each is calibration.chosen else _QUIET for each in shown]
    axes.barh(rows, means, xerr=errors, color=colours, ecolor=_INK, height=0.55, capsize=3)
    for row, each in zip(rows, shown, strict=True):
        axes.annotate(f"{each.name}: {_words(each.schedule)}", (0, row + 0.33), color=_INK, fontsize=8.5)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(shown) - 0.3)
    axes.set_xlim(0, 1.15 * means.max())
    axes.set_title("Ways to choose, at the same budget")
    axes.set_xlabel("share of the mass that survives, 95 % interval over samples")


def _staircase(axes: Axes, calibration: Calibration) -> None:
    lines = {"optimised": (_BLUE, 2.4, "-"), "published shape": (_QUIET, 1.6, "--")}
    for each in calibration.candidates:
        if each.name in lines and each.schedule is not None:
            colour, width, style = lines[each.name]
            tokens = each.schedule.tokens_per_layer()
            layers = np.arange(len(tokens) + 1) - 0.5
            axes.stairs(tokens, layers, color=colour, linewidth=width, linestyle=style, label=each.name, baseline=None)
            if each is calibration.chosen:
                axes.stairs(tokens, layers, color=colour, alpha=0.12, fill=True)
                for stage in each.schedule.stages:
                    axes.annotate(
                        f"{stage.keep} after {stage.layer}",
                        (stage.layer + 0.6, float(stage.keep)),
                        xytext=(3, 6),
                        textcoords="offset points",
                        color=colour,
                        fontsize=8.5,
                    )
    axes.set_ylim(0)
    axes.set_title("The schedule")
    axes.set_xlabel("layer")
    axes.set_ylabel("vision tokens given to it")
    _legend(axes)


def _mark_stages(axes: Axes, schedule: Schedule) -> None:
    for number, stage in enumerate(schedule.stages):
        axes.axvline(stage.layer, color=_RED, linewidth=1.2, label="" if number else "stages of the schedule")


def _words(schedule: Schedule | None) -> str:
    stages = () if schedule is None else schedule.stages
    return ", ".join(f"{stage.keep} after {stage.layer}" for stage in stages) or "nothing dropped"


def _legend(axes: Axes) -> None:
    axes.legend(loc="best", frameon=False, fontsize=8.5, labelcolor=_INK)


def _tidy(axes: Axes) -> None:
    axes.title.set_color(_INK)
    axes.title.set_fontsize(11)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_QUIET)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_QUIET)


def _undated(path: Path) -> dict[str, None] | None:
    """The same calibration makes the same file."""
    return {"Date": None} if path.suffix.lower() == ".svg" else None
