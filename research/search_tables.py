"""The tables of `search.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from search_space import AXES, IDLE, PLAIN, Setting, single_changes, told

from adaptinfer.evaluation.conditions import VANILLA

if TYPE_CHECKING:
    from search import Search

__all__ = ["axis_means", "changed", "tables"]


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
    from_adaptinfer = all(start == PLAIN for start in search.starts.values())
    start = "AdaptInfer" if from_adaptinfer else "the start"
    table = _by_budget(search, f"{start[0].upper()}{start[1:]} with one thing changed, first rung: points to {start}")
    if not from_adaptinfer:
        table.add_row("[dim]the start[/dim]", *(f"[dim]{told(search.starts[b])}[/dim]" for b in search.references))
    for axis, values in AXES.items():
        for value in values:
            cells = []
            for budget in search.references:
                there = {name: each for name, each in search.settings.items() if search.budget(name) == budget}
                name = changed(there, search.starts[budget], axis, value)
                change = None if name is None else changes.get(name)
                cells.append("" if change is None else _points(change, change["verdict"]))
            if any(cells):
                table.add_row(f"{axis} {value}", *cells)
    return table


def changed(settings: dict[str, Setting], start: Setting, axis: str, value: Any) -> str | None:
    """The name of the single change of a start that gives an axis this value; None if there is none."""
    singles = single_changes(start)
    for name, each in settings.items():
        if each[axis] == value != start[axis] and each in singles and _moved(start, each) == axis:
            return name
    return None


def _moved(start: Setting, setting: Setting) -> str:
    """The axis in which a single change differs; where another one had to be switched on for it, still that one."""
    moved = [axis for axis in AXES if setting[axis] != start[axis]]
    return next((axis for axis in moved if axis in IDLE and not start[IDLE[axis]]), moved[0])


def _axes(search: Search, changes: dict[str, Any]) -> Table:
    table = _by_budget(search, "Random combinations, first rung: mean points to the start of those with a value")
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
    singles = {budget: single_changes(start) for budget, start in search.starts.items()}
    for axis, values in AXES.items():
        for value in values:
            means: dict[float, float | None] = {}
            for budget in search.references:
                of = [
                    changes[name]["value"]
                    for name, setting in search.settings.items()
                    if setting[axis] == value
                    and (axis not in IDLE or setting[IDLE[axis]])
                    and setting not in singles[budget]
                    and name in changes
                    and search.budget(name) == budget
                ]
                means[budget] = sum(of) / len(of) if of else None
            yield axis, value, means


def _points(difference: dict[str, Any], judged: str) -> str:
    mark = {"better": "green", "worse": "red"}.get(judged)
    text = f"{100 * difference['value']:+.1f} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})"
    return f"[{mark}]{text}[/{mark}]" if mark else text
