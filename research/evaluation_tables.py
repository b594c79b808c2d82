"""The tables of docs/results/accuracy.md and docs/results/search.md, from committed results.

    python research/evaluation_tables.py

prints all of them, to be pasted; `tests/test_readme.py` holds the pages to them. The commands stand above
each table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import search_space
from same_stages import WAYS, scores
from search_tables import changed

COMMITTED = Path(__file__).parent / "results"
_ORACLES = "evidence", "evidence-before"


def committed(folder: Path = COMMITTED) -> dict[str, list[str]]:
    """The lines of each table, by its name."""
    tables: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
        "every method": ("evaluation/summary.json", lambda found: accuracy_lines(found["tasks"][0])),
        "best against the others": ("evaluation/summary.json", lambda found: margin_lines(found["tasks"][0])),
        "first look": (
            "evaluation_first/summary.json",
            lambda found: margin_lines(found["tasks"][0], ("adaptinfer+",)),
        ),
        "second look": (
            "evaluation_second/summary.json",
            lambda found: margin_lines(found["tasks"][0], ("adaptinfer+",)),
        ),
        "harder tasks": ("evaluation_more/summary.json", lambda found: tasks_lines(found["tasks"])),
        "the same stages": ("same_stages.json", lambda found: stages_lines(found["entry"])),
        "positions": ("evaluation_positions/summary.json", lambda found: rows_lines(found["tasks"][0])),
        "counts that vary": ("evaluation_mass/summary.json", lambda found: rows_lines(found["tasks"][0])),
        "one thing changed": ("ablation.json", changes_lines),
    }
    return {
        name: lines(json.loads((folder / file).read_text(encoding="utf-8"))) for name, (file, lines) in tables.items()
    }


def accuracy_lines(task: dict[str, Any]) -> list[str]:
    """A row per series, a column per budget: accuracy and half its interval; most budgets, then the best mean first."""
    budgets, values = _by_series(task["conditions"])
    ranked = sorted(
        values, key=lambda name: (-len(values[name]), -sum(each["value"] for each in values[name].values()))
    )
    vanilla = next(entry for entry in task["conditions"] if entry["name"] == "vanilla")
    return [
        *_head(f"{task['answers']} answers", (f"{budget:g}" for budget in budgets)),
        _row("vanilla", *[_plus_minus(vanilla["accuracy"])] * len(budgets)),
        *(_row(_told(name), *(_plus_minus(values[name].get(budget)) for budget in budgets)) for name in ranked),
    ]


def margin_lines(task: dict[str, Any], shown: Sequence[str] = ("adaptinfer+", "adaptinfer")) -> list[str]:
    """AdaptInfer+ and AdaptInfer against the best of the other methods at each budget."""
    names = {entry["name"]: entry for entry in task["conditions"]}
    own = ("adaptinfer+", "adaptinfer")
    lines = _head("", ("share of vanilla's, %", "best other", "difference, points", "it loses to"))
    budgets, values = _by_series(task["conditions"])
    pairs = {(pair["first"], pair["second"]): pair for pair in task["pairs"]}
    for series in shown:
        for budget in budgets:
            name = f"{series} {budget:g}"
            if name not in names:
                continue
            others = [n for n in values if n not in (*own, *_ORACLES, "textguided") and budget in values[n]]
            best = max(others, key=lambda other: values[other][budget]["value"])
            pair = pairs[name, f"{best} {budget:g}"]
            lost = [n for n in others if pairs[name, f"{n} {budget:g}"]["verdict"] == "worse"]
            cells = _interval(names[name]["relative"]), best, _interval(pair["difference"], "+"), pair["verdict"]
            lines.append(_row(name, cells[0], best, f"{cells[2]} {cells[3]}", ", ".join(lost) or "none"))
    return lines


def tasks_lines(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """A row per condition that has a budget, a column per task."""
    names = list(dict.fromkeys(e["name"] for task in tasks for e in task["conditions"] if e["budget"] is not None))
    lines = _head("", (f"{task['name']} ({task['answers']} answers)" for task in tasks))
    for name in ("vanilla", *names):
        cells = [next((e["accuracy"] for e in task["conditions"] if e["name"] == name), None) for task in tasks]
        lines.append(_row(_told(name), *map(_plus_minus, cells)))
    return lines


def stages_lines(entry: dict[str, Any]) -> list[str]:
    """A row per score, a column per budget and arrangement."""
    found = {each["name"]: each["accuracy"] for each in entry["conditions"]}
    budgets = dict.fromkeys(each["budget"] for each in entry["conditions"] if each["budget"] is not None)
    columns = [f"{budget:g} {way}" for budget in budgets for way in WAYS]
    columns = [column for column in columns if any(name.endswith(f" {column}") for name in found)]
    cells = {name: [found.get(f"{name} {column}") for column in columns] for name in scores()}
    ranked = sorted(cells, key=lambda name: -sum(cell["value"] for cell in cells[name] if cell))
    lines = _head(f"{entry['answers']} answers, vanilla {_plus_minus(found['vanilla'])}", columns)
    return [*lines, *(_row(name, *map(_plus_minus, cells[name])) for name in ranked)]


def rows_lines(task: dict[str, Any]) -> list[str]:
    """A row per condition: what a layer is really given, accuracy, difference to vanilla."""
    lines = _head(f"{task['answers']} answers", ("true tokens of 256", "right, %", "to vanilla, points"))
    for entry in task["conditions"]:
        difference = "" if entry["name"] == "vanilla" else _interval(entry["difference"], "+")
        lines.append(
            _row(_told(entry["name"]), f"{entry['true_average']:.1f}", _plus_minus(entry["accuracy"]), difference)
        )
    return lines


def changes_lines(document: dict[str, Any]) -> list[str]:
    """A row per changed value, a column per budget: points to AdaptInfer+."""
    budgets = sorted({name.split()[1] for name in document["first_rung"]}, key=float, reverse=True)
    lines = _head("points to AdaptInfer+", budgets)
    for axis, values in search_space.AXES.items():
        for value in values:
            cells = []
            for budget in budgets:
                found = {n: each for n, each in document["first_rung"].items() if n.split()[1] == budget}
                name = changed({n: each["setting"] for n, each in found.items()}, search_space.OURS, axis, value)
                mark = {"worse": " **worse**", "better": " **better**"}
                cells.append("" if name is None else _interval(found[name], "+") + mark.get(found[name]["verdict"], ""))
            if any(cells):
                lines.append(_row(f"{axis}: {value}", *cells))
    return lines


def _by_series(entries: Iterable[dict[str, Any]]) -> tuple[list[float], dict[str, dict[float, Any]]]:
    values: dict[str, dict[float, Any]] = {}
    for entry in entries:
        if entry["budget"] is not None:
            values.setdefault(entry["series"], {})[entry["budget"]] = entry["accuracy"]
    return list(dict.fromkeys(budget for each in values.values() for budget in each)), values


def _told(name: str) -> str:
    return f"*{name}*" if name.split()[0] in _ORACLES else name


def _plus_minus(accuracy: dict[str, float] | None) -> str:
    return (
        "" if accuracy is None else f"{100 * accuracy['value']:.1f} ± {50 * (accuracy['high'] - accuracy['low']):.1f}"
    )


def _interval(found: dict[str, Any], sign: str = "") -> str:
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _head(first: str, columns: Iterable[str]) -> list[str]:
    names = [first, *columns]
    return [_row(*names), _row("---", *["---:"] * (len(names) - 1))]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    for name, lines in committed().items():
        print(f"{name}\n", *lines, "", sep="\n")
