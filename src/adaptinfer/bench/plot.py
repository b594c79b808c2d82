"""Latency against the true budget, with the FLOPs bound drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptinfer.bench.variants import VANILLA
from adaptinfer.charts import BLUE, GREEN, INK, QUIET, RED, label, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COLOURS = (BLUE, RED, GREEN, "#8e6c8a", "#b7892c", "#3d5a80")
_MARKERS = "osD^vP"


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw one row per batch size: decoder prefill with its bound, and time to first token. Save it.

    Raises:
        InputError: the file cannot be written.
    """
    batches, setup, environment = document["batches"], document["setup"], document["environment"]
    on_gpu = setup["device"].startswith("cuda")
    machine = environment["gpu"] if on_gpu else f"{environment['cpu']}, threads: {environment['torch_threads']}"
    title = (
        f"{setup['model']}, {setup['dtype']}, {setup['attention']} on {machine}\n"
        f"medians and quartiles of {setup['rounds']} rounds"
    )
    figure = new_figure(11.0, 1.1 + 4.1 * len(batches), title)
    axes = figure.subplots(len(batches), 2, squeeze=False)
    for (left, right), batch in zip(axes, batches, strict=True):
        _panel(left, batch, "decoder_prefill_ms", "Decoder prefill")
        _panel(right, batch, "ttft_ms", "Time to first token")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(5, len(labels)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    save(figure, "--plot", path)


def _panel(axes: Axes, batch: dict[str, Any], figure: str, title: str) -> None:
    vanilla = next(entry for entry in batch["variants"] if entry["name"] == VANILLA)
    whole = vanilla["summary"][figure]["median"]
    # Pruning inside the decoder leaves all else as it is, so the bound of the TTFT is the bound of its decoder part.
    decoder = vanilla["summary"]["decoder_prefill_ms"]["median"]
    bound = [(average, whole - decoder + decoder * share) for average, share in batch["flops_bound_curve"]]
    axes.plot(*zip(*bound, strict=True), color=QUIET, linestyle="--", linewidth=1.4, label="FLOPs bound", zorder=1)
    axes.axhline(whole, color=QUIET, linestyle=":", linewidth=1.2, label=VANILLA, zorder=1)
    highest = whole
    for number, (name, entries) in enumerate(_series(batch).items()):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        if not entries[0]["stages"]:
            colour, marker = QUIET, "x"
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
            label=name,
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
    label(axes, f"{title}, batch {batch['batch']}", "vision tokens given to a layer (true average)", "ms")


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
        name = entry["method"] + ("" if entry["early_drop"] else ", late drop")
        name += ", compiled" if entry.get("compiled") else ""
        series.setdefault(name, []).append(entry)
    for entries in series.values():
        entries.sort(key=lambda entry: entry["true_average"])
    return {**series, **alone}
