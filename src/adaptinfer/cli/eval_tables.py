"""Results in a terminal: one table per task; the report has the rest."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptinfer.cli import terminal
from adaptinfer.evaluation.conditions import VANILLA

_STYLES = {"better": "green", "worse": "red", "open": "dim"}


def print_results(document: dict[str, Any]) -> None:
    """Print a summary, task by task."""
    console = terminal.console()
    for task in document["tasks"]:
        title = f"{task['name']}: {task['answers']} answers about {task['groups']} groups of pictures"
        console.print(Text(title, style="bold"), soft_wrap=True)
        if task["conditions"]:
            console.print(_table(console, task))
        if task["skipped"]:
            console.print(
                f"{len(task['skipped'])} samples could not be used: {', '.join(task['skipped'])}", soft_wrap=True
            )
        for name, reason in task["refused"].items():
            console.print(f"{name}: not run: {reason}", soft_wrap=True)
    note = (
        "In percent, with 95 % intervals; difference to vanilla in points, paired; better or worse only if its "
        "interval excludes 0 and at least six groups differ. Tokens: true average given to a layer."
    )
    terminal.print_notes(console, [note])


def _table(console: Console, task: dict[str, Any]) -> Table:
    columns = ("tokens", "FLOPs", "accuracy", "difference", "", "flips")
    table = terminal.table(console, "", *columns, figures=True)
    for entry in task["conditions"]:
        plain = entry["name"] == VANILLA
        difference, word = entry["difference"], entry["verdict"] or ""
        table.add_row(
            entry["name"],
            f"{entry['true_average']:.1f}",
            f"{entry['flops_share']:.0%}",
            _interval(entry["accuracy"]),
            "" if plain else _interval(difference, "+"),
            Text(word, style=_STYLES.get(word, "")),
            "" if plain else f"{100 * entry['flips']:.1f}",
        )
    return table


def _interval(interval: dict[str, float], sign: str = "") -> str:
    value, low, high = (f"{100 * interval[part]:{sign}.1f}" for part in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
