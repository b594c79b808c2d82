"""A summary as Markdown and as one HTML file that needs no other: tables are made here, the text is in `templates`."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from adaptinfer.evaluation.conditions import VANILLA
from adaptinfer.evaluation.plots import OURS, file_of
from adaptinfer.evaluation.published import SETTING, published_for
from adaptinfer.evaluation.statistics import LEAST_GROUPS

_NOTHING = "–"


class Table(NamedTuple):
    """Columns, then rows of as many cells; numbers are on the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def to_markdown(document: dict[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The report for people who read it in a repository; pictures are files beside it.

    Args:
        document: a summary, as it stands in ``summary.json``.
        pictures: by task, PNGs.
    """
    return _rendered(_environment("markdown"), document, pictures).strip() + "\n"


def to_html(document: dict[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The same as one file: styles and pictures are in it."""
    environment = _environment("html")
    body = Markup(_rendered(environment, document, pictures))
    return environment.get_template("page.jinja").render(title=_title(document), body=body)


def _rendered(environment: Environment, document: dict[str, Any], pictures: Mapping[str, bytes]) -> str:
    latency = document["latency"]
    return environment.get_template("report.jinja").render(
        document,
        title=_title(document),
        overview=_overview(document["tasks"]),
        tables_of=_tables,
        times=_times(latency) if latency else None,
        pictures=pictures,
        file_of=file_of,
        printed_setting=SETTING,
        least_groups=LEAST_GROUPS,
    )


def _environment(form: str) -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__ or ""),
        autoescape=form == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["form"] = form
    environment.filters["one_line"] = lambda text: type(text)(" ").join(text.split())  # a Markup stays one
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment


def _title(document: dict[str, Any]) -> str:
    return f"Evaluation of {document['setup']['model']}"


# ---------------------------------------------------------------------------------------------------- tables


def _overview(tasks: list[dict[str, Any]]) -> Table:
    rows = []
    for name in dict.fromkeys(entry["name"] for task in tasks for entry in task["conditions"]):
        values = [
            next((entry["relative"]["value"] for entry in task["conditions"] if entry["name"] == name), None)
            for task in tasks
        ]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if len(known) == len(values) else None
        rows.append([name, *map(_percent, values), _percent(mean)])
    return Table(["accuracy, % of vanilla's", *(task["name"] for task in tasks), "mean"], rows)


def _tables(task: dict[str, Any]) -> dict[str, Any]:
    """All tables of one task; None where there is nothing to tell."""
    entries = task["conditions"]
    kinds, turns = task["kinds"], task["turns"]
    printed = {entry["name"]: published_for(entry["method"] or "", entry["true_average_share"]) for entry in entries}
    figures = ("flips", "correct_to_wrong", "wrong_to_correct", "top1_agreement")
    shares = ("precision", "recall", "yes_share")
    yes_no = [
        [entry["name"], kind, *(_percent(values[share]) for share in shares)]
        for entry in entries
        for kind, values in entry["yes_no"].items()
    ]
    series = list(dict.fromkeys(entry["series"] for entry in entries if entry["pruned"]))
    against = [_against(task, each) for each in series if each == series[0] or each in OURS]
    return {
        "by_budget": _by_budget(entries),
        "main": _main(entries, printed),
        "printed": any(printed.values()),
        "changes": Table(
            ["", "flips, %", "right to wrong, %", "wrong to right, %", "same top-1, %", "KL, nats"],
            [
                [entry["name"], *(_percent(entry[figure]) for figure in figures), f"{entry['kl']:.3f}"]
                for entry in entries
                if entry["name"] != VANILLA
            ],
        ),
        "kinds": Table(
            ["", *(f"{kind} ({count})" for kind, count in kinds.items())],
            [[entry["name"], *(_interval(entry["kinds"][kind]) for kind in kinds)] for entry in entries],
        )
        if len(kinds) > 1
        else None,
        "turns": Table(
            ["", *(f"turn {number + 1}" for number in range(turns))],
            [[entry["name"], *map(_interval, entry["turns"])] for entry in entries],
        )
        if turns
        else None,
        "yes_no": Table(["", "kind", "precision, %", "recall, %", "answers yes, %"], yes_no) if yes_no else None,
        "against": [each for each in against if each is not None],
    }


def _by_budget(entries: list[dict[str, Any]]) -> Table | None:
    """Accuracy alone, a line a method, the best first; None where there is little to compare."""
    budgets = list(dict.fromkeys(entry["budget"] for entry in entries if entry["budget"] is not None))
    values: dict[str, dict[float, float]] = {}
    for entry in entries:
        if entry["budget"] is not None and entry["accuracy"]["value"] is not None:
            values.setdefault(entry["series"], {})[entry["budget"]] = entry["accuracy"]["value"]
    if len(budgets) < 2 or len(values) < 3:
        return None
    ranked = sorted(values, key=lambda series: (-len(values[series]), -sum(values[series].values())))
    rows = [[series, *(_percent(values[series].get(budget)) for budget in budgets)] for series in ranked]
    return Table(["", *(f"{budget:g}" for budget in budgets)], rows)


def _main(entries: list[dict[str, Any]], printed: dict[str, Any]) -> Table:
    columns = ["", "true tokens", "of all, %", "FLOPs, %", "KV, %", "accuracy, %", "of vanilla's, %"]
    columns += ["difference, points", ""]
    rows = []
    for entry in entries:
        seeds = f", {entry['seeds']} seeds" if entry["seeds"] > 1 else ""
        cells = [
            entry["name"] + seeds,
            f"{entry['true_average']:.1f}",
            *(_percent(entry[f"{cost}_share"]) for cost in ("true_average", "flops", "kv_bytes")),
            _interval(entry["accuracy"]),
            _interval(entry["relative"]),
            _NOTHING if entry["name"] == VANILLA else _interval(entry["difference"], "+"),
            entry["verdict"] or "",
        ]
        rows.append([*cells, str(printed[entry["name"]] or "")] if any(printed.values()) else cells)
    return Table([*columns, "in print, of vanilla's"] if any(printed.values()) else columns, rows)


def _against(task: dict[str, Any], series: str) -> tuple[str, dict[str, list[str]], Table] | None:
    """A series against all others of its budgets: its name, to whom each of its rows loses, and the table."""
    entries = {entry["name"]: entry for entry in task["conditions"]}
    own = {name for name, entry in entries.items() if entry["series"] == series}
    pairs = [pair for pair in task["pairs"] if pair["first"] in own]
    pairs += [_turned(pair) for pair in task["pairs"] if pair["second"] in own and pair["first"] not in own]
    lost: dict[str, list[str]] = {}
    rows = []
    for pair in sorted(pairs, key=lambda pair: [*entries].index(pair["first"])):
        first, second = entries[pair["first"]], entries[pair["second"]]
        most = ""
        if pair["verdict"] == "worse":
            lost.setdefault(pair["first"], []).append(second["series"])
            most = _most_lost(task, first, second)
        rows.append([pair["first"], pair["second"], _interval(pair["difference"], "+"), pair["verdict"], most])
    return (series, lost, Table(["", "less", "difference, points", "", "lost most in"], rows)) if rows else None


def _turned(pair: dict[str, Any]) -> dict[str, Any]:
    """The second of a pair against the first."""
    value, low, high = (pair["difference"][key] for key in ("value", "low", "high"))
    other = {"value": value, "low": high, "high": low}
    difference = {key: None if side is None else -side for key, side in other.items()}
    verdict = {"better": "worse", "worse": "better"}.get(pair["verdict"], pair["verdict"])
    return {"first": pair["second"], "second": pair["first"], "difference": difference, "verdict": verdict}


def _most_lost(task: dict[str, Any], entry: dict[str, Any], other: dict[str, Any]) -> str:
    """The two kinds of question that cost it most answers, with the points that it loses in each."""
    losses = {}
    for kind, count in task["kinds"].items():
        own, theirs = entry["kinds"][kind]["value"], other["kinds"][kind]["value"]
        if own is not None and theirs is not None and own < theirs:
            losses[kind] = (count * (own - theirs), own - theirs)
    worst = sorted(losses, key=losses.__getitem__)[:2] if len(task["kinds"]) > 1 else []
    return ", ".join(f"{kind} ({100 * losses[kind][1]:+.1f})" for kind in worst)


def _times(latency: dict[str, Any]) -> Table:
    figures = {"ttft_ms": ".1f", "ttft_speed_up": ".2f", "decode_ms_per_token": ".2f"}
    rows = [
        [name, *(_quartiles(each[figure], digits) for figure, digits in figures.items())]
        for name, each in latency["conditions"].items()
    ]
    return Table(["", "TTFT, ms", "x", "decode, ms/token"], rows)


def _quartiles(summary: dict[str, float], digits: str) -> str:
    median, lower, upper = (f"{summary[key]:{digits}}" for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} ({lower} to {upper})"


def _percent(value: float | None) -> str:
    return _NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def _interval(interval: dict[str, float | None], sign: str = "") -> str:
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return _percent(value)
    return f"{100 * value:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"
