"""Accuracy against what it costs, one figure per task, as PNG: a panel per kind of method, then FLOPs and latency.

Ours, the oracles and the best three of the others are coloured and labelled at the end of their lines; the rest is
grey. Each panel shows AdaptInfer+ (or the run's first method), so that panels can be compared.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from adaptinfer import charts
from adaptinfer.charts import INK, QUIET
from adaptinfer.evaluation.conditions import VANILLA, stage_of
from adaptinfer.evaluation.controls import ORACLES
from adaptinfer.pruners import METHODS

OURS = ("adaptinfer+", "adaptinfer")
"""Series that every plot and report brings out, if the run has them."""

_REST = "#b4bcc4"
_OWN_COLOURS = ("#0b5fa5", "#3aa0d8")
_ORACLE_COLOUR = "#2f8a4e"
_BEST_COLOURS = ("#c8553d", "#8c5ba6", "#c08a1e")
_BEST = len(_BEST_COLOURS)
_LINE_HEIGHT = 0.056  # of a label, as a share of a panel's height
_PANELS = {
    "inside": "inside the language model",
    "before": "before the language model",
    "both": "before and inside",
    "control": "controls",
}

Entry = dict[str, Any]
Cost = Callable[[Entry], float | None]


@dataclass(frozen=True)
class _Line:
    """One series: its rows, dearest first, its panel, and its colour (None: one of the rest)."""

    name: str
    rows: Sequence[Entry]
    panel: str
    colour: str | None


def draw(task: dict[str, Any], latency: dict[str, Any] | None) -> bytes:
    """Draw one task of a summary; a PNG that is readable about 850 pixels wide."""
    lines = _lines(task)
    times = latency["conditions"] if latency else {}
    kinds = [kind for kind in _PANELS if any(line.panel == kind for line in lines)]
    shown = [line for line in lines if line.colour]
    tokens: Cost = lambda row: 100 * row["true_average_share"]  # noqa: E731
    panels = [
        (_PANELS[kind], "vision tokens per layer, % of vanilla's", tokens, _members(lines, kind)) for kind in kinds
    ]
    flops: Cost = lambda row: 100 * row["flops_share"]  # noqa: E731
    panels.append(("by FLOPs", "FLOPs of the prefill, % of vanilla's", flops, shown))
    if times:
        ttft: Cost = lambda row: _median_ttft(times, row["name"])  # noqa: E731
        panels.append(("by latency", "median time to first token, ms", ttft, shown))
    rows = math.ceil(len(panels) / 2)
    title = (
        f"{task['name']}: {task['answers']} answers about {task['groups']} groups of pictures. Bars and band: 95 % "
        f"intervals.\nIn colour: ours ({lines[0].name if lines else VANILLA} in every panel), the best three others, "
        "controls that know the evidence."
    )
    figure = charts.new_figure(8.5, 0.8 + 3.1 * rows, "")
    figure.suptitle(title, color=INK, fontsize=9.5)
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    whole = next(row for row in task["conditions"] if row["name"] == VANILLA)["accuracy"]
    for number, (axis, (title, label, cost, members)) in enumerate(zip(axes, panels, strict=False)):
        axis.set_ylim(*_range(lines if cost is tokens else members, whole))
        _panel(axis, members, cost, whole, logarithmic=cost is tokens)
        charts.label(axis, title, label, "" if number % 2 else "accuracy, %")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=200, facecolor="white")
    return target.getvalue()


def file_of(task_name: str) -> str:
    """The file that a task's plot goes into, beside the summary."""
    return f"{task_name.replace(':', '-')}.png"


def _lines(task: dict[str, Any]) -> list[_Line]:
    """Rows with a budget or a schedule by series; blank, shuffled and wrong pictures have no cost."""
    found: dict[str, list[Entry]] = {}
    for row in task["conditions"]:
        if (row["pruned"] or row["budget"] is not None) and row["accuracy"]["value"] is not None:
            found.setdefault(row["series"], []).append(row)
    methods = [name for name, rows in found.items() if not rows[0]["control"]]
    own = [name for name in OURS if name in methods] or methods[:1]
    others = [name for name in methods if name not in own]
    best = sorted(others, key=lambda name: (-len(found[name]), -_mean(found[name])))[:_BEST]
    colours = dict(zip(own, _OWN_COLOURS, strict=False)) | dict(zip(best, _BEST_COLOURS, strict=False))
    colours |= dict.fromkeys(ORACLES, _ORACLE_COLOUR)
    order = {name: number for number, name in enumerate([*own, *best])}
    ranked = sorted(found, key=lambda name: order.get(name, len(order)))
    return [
        _Line(
            name,
            sorted(found[name], key=lambda row: -row["true_average_share"]),
            _panel_of(found[name][0]),
            colours.get(name),
        )
        for name in ranked
    ]


def _panel_of(row: Entry) -> str:
    return "control" if row["control"] else row.get("stage") or stage_of(METHODS.get(row["method"]))


def _range(lines: Sequence[_Line], whole: dict[str, float]) -> tuple[float, float]:
    """Of an axis that has room for all intervals."""
    accuracies = [whole, *(row["accuracy"] for line in lines for row in line.rows)]
    known = [100 * each[bound] for each in accuracies for bound in ("low", "high") if each[bound] is not None]
    return min(known, default=0) - 2, max(known, default=100) + 2


def _mean(rows: Sequence[Entry]) -> float:
    return sum(row["accuracy"]["value"] for row in rows) / len(rows)


def _members(lines: Sequence[_Line], panel: str) -> list[_Line]:
    """The lines of a panel, and the first line of all, which is in each."""
    return [line for line in lines if line.panel == panel or line is lines[0]]


def _panel(axes: Axes, lines: Sequence[_Line], cost: Cost, whole: dict[str, float], logarithmic: bool) -> None:
    if None not in (whole["low"], whole["high"]):
        axes.axhspan(100 * whole["low"], 100 * whole["high"], color=QUIET, alpha=0.12, linewidth=0)
    axes.axhline(100 * whole["value"], color=QUIET, linestyle=":", linewidth=1.2)
    coloured = [line for line in lines if line.colour]
    ends = []
    for line in sorted(lines, key=lambda line: line.colour is not None):
        points = [(x, row["accuracy"]) for row in line.rows if (x := cost(row)) is not None]
        if not points:
            continue
        xs, values = [x for x, _ in points], [100 * accuracy["value"] for _, accuracy in points]
        spread = None
        if line.colour:
            spread = [[100 * abs(each["value"] - each[bound]) for _, each in points] for bound in ("low", "high")]
            if logarithmic:  # methods of one budget cost the same; their bars stand beside each other
                xs = [x * (1 + 0.025 * (coloured.index(line) - (len(coloured) - 1) / 2)) for x in xs]
        dashed = bool(line.colour) and line.panel == "control"
        axes.errorbar(
            xs,
            values,
            spread,
            color=line.colour or _REST,
            marker="o",
            markersize=3.6 if line.colour else 2,
            linestyle="--" if dashed else "-",
            linewidth=2 if line.colour and not dashed else 1.1,
            elinewidth=1.1,
            zorder=3 if line.colour else 2,
        )
        ends.append((values[-1], xs[-1], line))
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        ticks = [tick for row in lines[0].rows if (tick := cost(row)) is not None]
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.invert_xaxis()
    _labels(axes, [(100 * whole["value"], None, None), *ends])


def _labels(axes: Axes, ends: Sequence[tuple[float, float | None, _Line | None]]) -> None:
    """Names on the right of a panel, spread so that none covers another, each joined to the end of its line."""
    low, high = axes.get_ylim()
    step = _LINE_HEIGHT * (high - low)
    ranked = sorted(ends, key=lambda end: end[0])
    places = _spread([value for value, _, _ in ranked], step, low + step / 2, high - step / 2)
    right = axes.get_yaxis_transform()
    for (value, x, line), place in zip(ranked, places, strict=True):
        colour = QUIET if line is None else line.colour or QUIET
        bold = "bold" if line is not None and line.colour else "normal"
        name = VANILLA if line is None else line.name
        axes.text(1.05, place, name, transform=right, fontsize=8, color=colour, va="center", fontweight=bold)
        axes.annotate(
            "",
            (1.045, place),
            (1 if x is None else x, value),
            xycoords=right,
            textcoords=right if x is None else "data",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6},
        )


def _spread(values: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Ascending places at least a step apart and within bounds, as near as possible to ascending values."""
    places: list[float] = []
    for value in values:
        places.append(max(value, low, places[-1] + step if places else low))
    for number in range(len(places) - 1, -1, -1):
        places[number] = min(places[number], high if number == len(places) - 1 else places[number + 1] - step)
    return places


def _median_ttft(times: dict[str, Any], name: str) -> float | None:
    return times[name]["ttft_ms"]["median"] if name in times else None
