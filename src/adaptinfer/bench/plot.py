"""Latency against the true budget, with the FLOPs bound drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptinfer.errors import InputError
from adaptinfer.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLOT_SUFFIXES", "draw"]

PLOT_SUFFIXES = (".png", ".pdf", ".svg")

_PAPER, _INK, _QUIET = "white", "#1d2733", "#6b7785"
_COLOURS = ("#0b6e99", "#c8553d", "#5b8c5a", "#8e6c8a", "#b7892c", "#3d5a80")
_MARKERS = "osD^vP"
_VANILLA = "vanilla"


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw one row per batch size: decoder prefill with its bound, and time to first token. Save it.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    batches, setup = document["batches"], document["setup"]
    figure = Figure(figsize=(11.0, 0.9 + 4.1 * len(batches)), layout="constrained", facecolor=_PAPER)
    axes = figure.subplots(len(batches), 2, squeeze=False)
    for (left, right), batch in zip(axes, batches, strict=True):
        _panel(left, batch, "decoder_prefill_ms")
        left.set_title(f"Decoder prefill, batch {batch['batch']}", loc="left", color=_INK, fontsize=11)
        _panel(right, batch, "ttft_ms")
        right.set_title(f"Time to first token, batch {batch['batch']}", loc="left", color=_INK, fontsize=11)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=_INK)
    environment = document["environment"]
    machine = environment["gpu"] if setup["device"].startswith("cuda") else environment["cpu"]
    threads = "" if setup["device"].startswith("cuda") else f", threads: {environment['torch_threads']}"
    figure.suptitle(
        f"{setup['model']}, {setup['dtype']}, {setup['attention']} on {machine}{threads}; medians and quartiles of "
        f"{setup['rounds']} rounds",
        color=_INK,
        fontsize=12,
    )
    target = io.BytesIO()
    figure.savefig(target, format=path.suffix[1:].lower(), dpi=150, facecolor=_PAPER)
    try:
        write_whole(path, target.getvalue())
    except OSError as error:
        raise InputError(f"--plot {str(path)!r}: cannot be written ({error.strerror})") from None


def _panel(axes: Axes, batch: dict[str, Any], figure: str) -> None:
    vanilla = next(entry for entry in batch["variants"] if entry["name"] == _VANILLA)
    whole = vanilla["summary"][figure]["median"]
    # Pruning inside the decoder leaves all else as it is, so the bound of the TTFT is the bound of its decoder part.
    decoder = vanilla["summary"]["decoder_prefill_ms"]["median"]
    bound = [(average, whole - decoder + decoder * share) for average, share in batch["flops_bound_curve"]]
    axes.plot(*zip(*bound, strict=True), color=_QUIET, linestyle="--", linewidth=1.4, label="FLOPs bound", zorder=1)
    axes.axhline(whole, color=_QUIET, linestyle=":", linewidth=1.2, label=_VANILLA, zorder=1)
    highest = whole
    for number, (label, entries) in enumerate(_series(batch).items()):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        if not entries[0]["stages"]:
            colour, marker = _QUIET, "x"
        averages = [entry["true_average"] for entry in entries]
        summaries = [entry["summary"][figure] for entry in entries]
        medians = [summary["median"] for summary in summaries]
        spread = [
            [summary["median"] - summary["lower_quartile"] for summary in summaries],
            [summary["upper_quartile"] - summary["median"] for summary in summaries],
        ]
        highest = max(highest, *(summary["upper_quartile"] for summary in summaries))
        axes.errorbar(
            averages,
            medians,
            spread,
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.5 if len(entries) > 1 else 0,
            elinewidth=1.2,
            capsize=3,
            label=label,
            zorder=3,
        )
        if number == 0:
            for entry, average, median in zip(entries, averages, medians, strict=True):
                axes.annotate(
                    f"{entry['speed_up'][figure]['median']:.2f}×",
                    (average, median),
                    xytext=(-7, 7),
                    textcoords="offset points",
                    ha="right",
                    color=colour,
                    fontsize=8.5,
                )
    axes.set_xlim(0, batch["vision_tokens"] * 1.04)
    axes.set_ylim(0, 1.12 * highest)
    axes.set_xlabel("vision tokens given to a layer (true average)", color=_INK)
    axes.set_ylabel("ms", color=_INK)
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.tick_params(colors=_QUIET)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_QUIET)


def _series(batch: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Points that belong together by their label: a method's budgets make a line, everything else stands alone."""
    series: dict[str, list[dict[str, Any]]] = {}
    alone: dict[str, list[dict[str, Any]]] = {}
    for entry in batch["variants"]:
        if entry["method"] is None:
            continue
        if entry["preset"] is not None or not entry["stages"]:
            alone[entry["name"]] = [entry]
            continue
        label = entry["method"] + ("" if entry["early_drop"] else ", late drop")
        label += ", compiled" if entry.get("compiled") else ""
        series.setdefault(label, []).append(entry)
    for entries in series.values():
        entries.sort(key=lambda entry: entry["true_average"])
    return {**series, **alone}
