"""The tables of `search.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from search_space import AXES, IDLE, single_changes, told

from adaptinfer.evaluation.conditions import VANILLA

if TYPE_CHECKING:
    from search import Search

__all__ = ["axis_means", "tables"]


def tables(
    search: Search, finalists: dict[float, list[str]], entry: dict[str, Any], changes: dict[str, Any]
) -> list[Table]:
    """The finalists beside reference and controls, budget by budget; single changes; means over random combinations."""
    return [_finalists(search, finalists, entry), _single_changes(search, changes), _axes(search, changes)]


def _finalists(search: Search, finalists: dict[float, list[str]], entry: dict[str, Any]) -> Table:
    rows = {row["name"]: row for row in entry["conditions"]}
    against = {pair["first"]: pair for pair in entry["pairs"] if pair["second"] == search.references[pair["budget"]]}
    title = f"{search.plan.tasks[0]}: {entry['answers']} answers that no earlier rung has seen; right, %"
    table = Table(title=title, title_justify="left")
    table.add_column("tokens a layer", justify="right")
    table.add_column("", overflow="fold", min_width=30)
    for column in ("all", "to AdaptInfer", *entry["kinds"]):
        table.add_column(column, justify="right", no_wrap=True)

    def add(name: str, label: str) -> None:
        row = rows.get(name)
        if row is None:
            table.add_row("", label, "refused")
            return
        pair, accuracy = against.get(name), row["accuracy"]
        difference = "" if pair is None else _points(pair["difference"], pair["verdict"])
        kinds = [f"{100 * row['kinds'][kind]['value']:.1f}" for kind in entry["kinds"]]
        margin = (accuracy["high"] - accuracy["low"]) / 2
        cells = f"{row['true_average']:.2f}", label, f"{100 * accuracy['value']:.1f} ± {100 * margin:.1f}", difference
        table.add_row(*cells, *kinds)

    add(VANILLA, VANILLA)
    for budget, names in finalists.items():
        table.add_section()
        for name in names:
            add(name, told(search.settings[name]))
        for condition in search.plan.conditions:
            if condition.budget == budget and condition.name not in search.settings:
                add(condition.name, f"[dim]{condition.series}[/dim]")
    return table


def _single_changes(search: Search, changes: dict[str, Any]) -> Table:
    table = _by_budget(search, "AdaptInfer with one thing changed, first rung: points to AdaptInfer")
    for setting in single_changes():
        cells = []
        for budget in search.references:
            same = [n for n, each in search.settings.items() if each == setting and search.budget(n) == budget]
            change = changes.get(same[0]) if same else None
            cells.append("" if change is None else _points(change, change["verdict"]))
        table.add_row(told(setting), *cells)
    return table


def _axes(search: Search, changes: dict[str, Any]) -> Table:
    table = _by_budget(search, "Random combinations, first rung: mean points to AdaptInfer of those with a value")
    for axis, value, means in axis_means(search, changes):
        table.add_row(f"{axis} {value}", *("" if mean is None else f"{100 * mean:+.1f}" for mean in means.values()))
    return table


def _by_budget(search: Search, title: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title) + 2)
    table.add_column("")
    for budget in search.references:
        table.add_column(f"{budget:g}", justify="right", no_wrap=True)
    return table


def axis_means(
    search: Search, changes: dict[str, dict[str, Any]]
) -> Iterable[tuple[str, Any, dict[float, float | None]]]:
    """Per axis and value, the mean difference of random combinations that have it, by budget."""
    singles = single_changes()
    for axis, values in AXES.items():
        for value in values:
            means: dict[float, float | None] = {}
            for budget in search.references:
                of = [
                    changes[name]["value"]
                    for name, setting in search.settings.items()
                    if setting[axis] == value
                    and (axis not in IDLE or setting[IDLE[axis]])
                    and setting not in singles
                    and name in changes
                    and search.budget(name) == budget
                ]
                means[budget] = sum(of) / len(of) if of else None
            yield axis, value, means


def _points(difference: dict[str, Any], judged: str) -> str:
    mark = {"better": "green", "worse": "red"}.get(judged)
    text = f"{100 * difference['value']:+.1f} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"
    return f"[{mark}]{text}[/{mark}]" if mark else text
