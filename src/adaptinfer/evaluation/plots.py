"""Accuracy against what it costs: true tokens, FLOPs, latency. One figure per task, as PNG."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes

from adaptinfer.evaluation.conditions import VANILLA

_PAPER, _INK, _QUIET, _GRID = "white", "#1d2733", "#6b7785", "#e4e8ec"
_COLOURS = (
    "#0b6e99",
    "#c8553d",
    "#5b8c5a",
    "#8e6c8a",
    "#b7892c",
    "#3d5a80",
    "#a23e48",
    "#4f9d9d",
    "#7a6c5d",
    "#d17a22",
)
_MARKERS = "osD^vPX*h"
_CONTROLS = {"random": ("x", "--"), "evidence": ("+", ":"), "evidence-before": ("4", ":"), "resized": ("1", "-.")}


def draw(task: dict[str, Any], latency: dict[str, Any] | None) -> bytes:
    """Draw one task of a summary; a PNG."""
    from matplotlib.figure import Figure

    times = latency["conditions"] if latency else {}
    panels = [
        ("vision tokens given to a layer, of vanilla's, %", lambda entry: 100 * entry["true_average_share"]),
        ("FLOPs of the decoder's prefill, of vanilla's, %", lambda entry: 100 * entry["flops_share"]),
    ]
    if times:
        panels.append(("time to first token, ms, one prompt", lambda entry: _median_ttft(times, entry["name"])))
    height = 4.6 if len(_series(task)) <= len(_COLOURS) else 7.2  # many lines need room
    figure = Figure(figsize=(4.6 * len(panels), height), layout="constrained", facecolor=_PAPER)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (label, cost) in zip(axes, panels, strict=True):
        _panel(axis, task, cost, label)
    axes[0].set_ylabel("accuracy, %", color=_INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9, labelcolor=_INK)
    figure.suptitle(
        f"{task['name']}: accuracy, 95 % intervals over {task['groups']} groups of pictures, {task['answers']} answers",
        color=_INK,
        fontsize=11,
    )
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130, facecolor=_PAPER)
    return target.getvalue()


def _panel(axes: Axes, task: dict[str, Any], cost: Any, label: str) -> None:
    vanilla = next(entry for entry in task["conditions"] if entry["name"] == VANILLA)
    whole = vanilla["accuracy"]
    axes.axhspan(100 * whole["low"], 100 * whole["high"], color=_QUIET, alpha=0.12, linewidth=0)
    axes.axhline(100 * whole["value"], color=_QUIET, linestyle=":", linewidth=1.3, label=VANILLA)
    methods = 0
    for series, entries in _series(task).items():
        points = [(cost(entry), entry["accuracy"]) for entry in entries]
        points = sorted(((x, accuracy) for x, accuracy in points if x is not None), key=lambda point: point[0])
        if not points:
            continue
        if series in _CONTROLS:
            colour, (marker, line) = _QUIET, _CONTROLS[series]
        else:
            colour, marker, line = _COLOURS[methods % len(_COLOURS)], _MARKERS[methods % len(_MARKERS)], "-"
            methods += 1
        values = [100 * accuracy["value"] for _, accuracy in points]
        spread = [
            [100 * (accuracy["value"] - accuracy["low"]) for _, accuracy in points],
            [100 * (accuracy["high"] - accuracy["value"]) for _, accuracy in points],
        ]
        axes.errorbar(
            [x for x, _ in points],
            values,
            spread,
            color=colour,
            marker=marker,
            markersize=5.5,
            linestyle=line,
            linewidth=2.6 if methods == 1 and colour != _QUIET else 1.3,  # the method that the others are held against
            elinewidth=1.0,
            capsize=2.5,
            label=series,
            zorder=3 if methods == 1 else 2,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel(label, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.tick_params(colors=_QUIET)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_QUIET)


def _median_ttft(times: dict[str, Any], name: str) -> float | None:
    return times[name]["ttft_ms"]["median"] if name in times else None


def _series(task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows with a budget or a schedule, by the line they belong to; blank, shuffled and wrong pictures have no cost."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in task["conditions"]:
        if entry["pruned"] or entry["budget"] is not None:
            found.setdefault(entry["series"], []).append(entry)
    return found
