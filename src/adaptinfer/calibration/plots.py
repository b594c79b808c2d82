"""Why this schedule, in six panels, drawn from the document that ``curves.json`` holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptinfer.charts import BAND, BLUE, GREEN, INK, QUIET, RED, label, new_figure, save
from adaptinfer.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(curves: dict[str, Any], path: Path) -> None:
    """Draw and save `Calibration.curves`.

    Raises:
        InputError: the file cannot be written, or is no .png, .pdf or .svg.
    """
    about = curves["provenance"]
    figure = new_figure(
        15.5,
        8.6,
        f"{Path(about['model']['name']).name}: {about['samples']} samples, {budget_in_words(about['budget'])}, "
        f"scores of {about['method']['name']}",
    )
    panels = (_mass, _histogram, _shifts, _frontier, _candidates, _staircase)
    for panel, axes in zip(panels, figure.subplots(2, 3).flat, strict=True):
        panel(axes, curves)
        if panel is not _candidates:  # it names its bars itself
            axes.legend(loc="best", edgecolor="none", framealpha=0.85, fontsize=8.5, labelcolor=INK)
    save(figure, "plot", path)


def budget_in_words(told: dict[str, Any]) -> str:
    """What was asked for, from `provenance`."""
    if "flops_share" in told:
        return f"FLOPs share {told['flops_share']:.3g}"
    return f"true average {told['true_average']:.1f} of {told['vision_tokens']} ({100 * told['share']:.3g} %)"


def _mass(axes: Axes, curves: dict[str, Any]) -> None:
    mass = curves["mass_by_layer"]
    layers = np.arange(len(mass["mean"]))
    axes.fill_between(layers, mass["q10"], mass["q90"], color=BAND, label="10–90 % of samples")
    axes.plot(layers, mass["mean"], color=BLUE, marker="o", markersize=4, label="mean")
    for number, stage in enumerate(_schedule(curves["candidates"][-1]).stages):
        axes.axvline(stage.layer, color=RED, linewidth=1.2, label="" if number else "stages of the schedule")
    axes.set_ylim(0)
    label(axes, "Text-to-vision attention by layer", "layer", "share of the mass of all layers")


def _histogram(axes: Axes, curves: dict[str, Any]) -> None:
    found = curves["published_detector"]
    layers, (low, high) = found["layers"], found["null_band"]
    axes.bar(layers, found["counts"], color=BLUE, width=0.7, label="found")
    axes.fill_between(layers, low, high, color=RED, alpha=0.25, step="mid")
    axes.step(layers, found["null_mean"], where="mid", color=RED, label="null: layers in random order, 95 % band")
    axes.axvline(found["constant_curve"], color=QUIET, linestyle=":", label="what a constant curve yields")
    axes.set_ylim(0, 1.6 * max(*found["counts"], *high))
    label(axes, "The published detector and its null", "layer", "tokens × samples")


def _shifts(axes: Axes, curves: dict[str, Any]) -> None:
    js, rank = curves["shifts"]["js"], curves["shifts"]["rank"]
    for shifts, colour, name in ((js, BLUE, "Jensen–Shannon"), (rank, GREEN, "rank")):
        axes.plot(shifts["layers"][1:], shifts["steps"], color=colour, marker="o", markersize=4, label=name)
        axes.axhspan(*shifts["null_band"], color=colour, alpha=0.15)
    top = 1.45 * max(*js["steps"], *rank["steps"])
    for shift in js["found"]:
        axes.axvline(shift["layer"] - 0.5, color=RED, linewidth=1.2)
        text = f"{shift['explained']:.0%}, in {shift['confidence']:.0%}\nof resamples"
        axes.annotate(text, (shift["layer"] - 0.4, 0.03 * top), color=RED, fontsize=8)
    axes.set_ylim(0, top)
    label(
        axes,
        "Distance of each layer to the one before; shifts",
        "layer",
        "distance (bands: layers in random order)",
    )


def _frontier(axes: Axes, curves: dict[str, Any]) -> None:
    points, chosen = curves["frontier"], curves["candidates"][-1]
    for name, key, colour, marker in (
        ("optimised", "optimised", BLUE, "o"),
        ("published shape", "published", QUIET, "s"),
    ):
        shown = [(point["true_average"], point[key]) for point in points if point[key] is not None]
        if shown:
            axes.plot(*zip(*shown, strict=True), color=colour, marker=marker, markersize=4, label=name)
    average = _schedule(chosen).true_average()
    axes.plot(average, chosen["kept_mass"], color=RED, marker="*", markersize=13, linewidth=0, label="this schedule")
    axes.set_ylim(0, 1)
    label(
        axes,
        "Kept attention mass against budget",
        "vision tokens given to a layer (true average)",
        "share of the mass that survives",
    )


def _candidates(axes: Axes, curves: dict[str, Any]) -> None:
    shown = [each for each in curves["candidates"] if each["schedule"] is not None]
    rows = np.arange(len(shown))[::-1]
    means, lows, highs = (np.array([each[name] for each in shown]) for name in ("kept_mass", "low", "high"))
    colours = [QUIET] * (len(shown) - 1) + [BLUE]  # the last is the one that was chosen
    axes.barh(rows, means, xerr=[means - lows, highs - means], color=colours, ecolor=INK, height=0.55, capsize=3)
    for row, each in zip(rows, shown, strict=True):
        axes.annotate(f"{each['name']}: {_schedule_in_words(each)}", (0, row + 0.33), color=INK, fontsize=8.5)
    axes.set_yticks([])
    axes.set_ylim(-0.6, len(shown) - 0.3)
    axes.set_xlim(0, 1.15 * means.max())
    label(axes, "Ways to choose, at the same budget", "share of the mass that survives, 95 % CI over samples")


def _staircase(axes: Axes, curves: dict[str, Any]) -> None:
    lines = {"published shape": (QUIET, 1.6, "--"), "optimised": (BLUE, 2.4, "-")}
    for each in curves["candidates"]:
        if each["name"] in lines and each["schedule"] is not None:
            colour, width, style = lines[each["name"]]
            tokens = _schedule(each).tokens_per_layer()
            layers = np.arange(len(tokens) + 1) - 0.5
            axes.stairs(
                tokens, layers, color=colour, linewidth=width, linestyle=style, label=each["name"], baseline=None
            )
    chosen = _schedule(curves["candidates"][-1])
    tokens = chosen.tokens_per_layer()
    axes.stairs(tokens, np.arange(len(tokens) + 1) - 0.5, color=BLUE, alpha=0.12, fill=True)
    for stage in chosen.stages:
        axes.annotate(
            f"{stage.keep} after {stage.layer}",
            (stage.layer + 0.6, float(stage.keep)),
            xytext=(3, 6),
            textcoords="offset points",
            color=BLUE,
            fontsize=8.5,
            bbox={"color": "white", "alpha": 0.7, "pad": 1, "linewidth": 0},
        )
    axes.set_ylim(0)
    label(axes, "The schedule", "layer", "vision tokens given to it")


def _schedule(candidate: dict[str, Any]) -> Schedule:
    return Schedule.from_json(json.dumps(candidate["schedule"]))


def _schedule_in_words(candidate: dict[str, Any]) -> str:
    stages = _schedule(candidate).stages
    return ", ".join(f"{stage.keep} after {stage.layer}" for stage in stages) or "nothing dropped"
