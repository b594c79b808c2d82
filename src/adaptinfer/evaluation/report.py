"""A summary as Markdown and as one HTML file that needs nothing beside it. Both are written from the same blocks."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptinfer.evaluation.conditions import VANILLA
from adaptinfer.evaluation.published import SETTING, published_for
from adaptinfer.evaluation.statistics import LEAST_GROUPS

_NOTHING = "–"
_OURS = ("adaptinfer+", "adaptinfer")  # held against the others in every report that has them

_RULES = (
    "Accuracy is the mean score, in percent, with its 95 % interval: a percentile bootstrap over groups of samples "
    "that share pictures, 2,000 resamples, the same ones for every row, scores of several seeds averaged first "
    "(Wilson's interval where every answer is right, or none). A difference is paired answer by answer. It is called "
    "better or worse only if its interval excludes 0 and at least six groups differ, since no sign test could tell "
    "with fewer; else open. With many rows, one comparison in twenty would still do so by chance. Budgets are true "
    "averages: vision tokens that a decoder layer is given, which is also what its KV cache holds; rows of one budget "
    "are compared."
)
_CHANGES = (
    "Flips: answers that are not vanilla's, right or wrong. Right to wrong and wrong to right count scores from 0.5 on "
    "as right. Top-1 and KL compare the first answer's next-token distribution with vanilla's for the same prompt: how "
    "often the likeliest token is the same, and the mean of KL(vanilla || row) in nats."
)
_CONTROLS = (
    "Controls: random keeps random tokens; evidence keeps the tokens of what is asked about (in a conversation, in any "
    "turn) and fills up at random, which only an evaluation can know, evidence-before does so in front of the "
    "language model; resized makes the picture so small that it has no more vision tokens than the budget; blank shows "
    "the picture's mean colour, shuffled its tiles in random order, wrong another sample's picture."
)
_COSTS = (
    "FLOPs (2 x multiply-adds, causal attention at half) and KV bytes are worked out for each sample by itself: the "
    "decoder layers of the prefill; scoring and vision tower are not counted."
)
_TURNS = (
    "Turns are asked one after the other on one cache, so later ones read what was kept for the first question; the "
    "conversation holds the row's own answers."
)


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    """Columns, then rows of as many cells; numbers are on the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG and where the Markdown report finds it."""

    path: str
    data: bytes
    text: str


Block = Heading | Text | Table | Picture


def blocks(document: dict[str, Any], pictures: dict[str, Picture]) -> list[Block]:
    """What the report says, in order.

    Args:
        document: a summary, as it stands in ``summary.json``.
        pictures: by task.
    """
    setup, environment = document["setup"], document["environment"]
    found: list[Block] = [
        Heading(f"Evaluation of {setup['model']}", 1),
        Text(f"{document['command']}"),
        Text(
            f"{environment['date']}, {setup['device']} ({environment['gpu'] or environment['cpu']}), {setup['dtype']}, "
            f"adaptinfer {environment['adaptinfer']}, torch {environment['torch']}, "
            f"transformers {environment['transformers']}, batch {setup['batch']}."
        ),
    ]
    if setup["model"] == "embedded":
        found.append(
            Text(
                "This is the embedded model on drawn scenes: one small model, one training run. It says nothing about "
                "the accuracy of other models on photographs."
            )
        )
    tasks = document["tasks"]
    if len(tasks) > 1:
        found += [Heading("All tasks"), _overview(tasks)]
    for task in tasks:
        found += _task(task, pictures.get(task["name"]))
    if document["latency"]:
        found += _latency(document["latency"])
    return [*found, Heading("How to read this"), *map(Text, (_RULES, _CHANGES, _CONTROLS, _COSTS))]


def _overview(tasks: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(entry["name"] for task in tasks for entry in task["conditions"]))
    rows = []
    for name in names:
        values = [
            next((entry["relative"]["value"] for entry in task["conditions"] if entry["name"] == name), None)
            for task in tasks
        ]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if len(known) == len(values) else None
        rows.append([name, *map(_percent, values), _percent(mean)])
    return Table(["accuracy, % of vanilla's", *(task["name"] for task in tasks), "mean"], rows)


def _task(task: dict[str, Any], picture: Picture | None) -> list[Block]:
    found: list[Block] = [
        Heading(task["name"]),
        Text(
            f"{task['answers']} answers to {task['samples']} samples about {task['groups']} groups of pictures, "
            f"metric {task['metric']}."
        ),
    ]
    if task["skipped"]:
        first = next(iter(task["skipped"].items()))
        found.append(
            Text(f"{len(task['skipped'])} samples could not be used and are in no figure, as {first[0]}: {first[1]}.")
        )
    if task["refused"]:
        reasons: dict[str, list[str]] = {}
        for name, why in task["refused"].items():
            reasons.setdefault(why, []).append(name)
        found += [Text("Not run:"), *(Text(f"{', '.join(names)}: {why}.") for why, names in reasons.items())]
    entries = task["conditions"]
    if not entries:
        return found
    found += [picture] if picture else []
    found += _by_budget(entries)
    found += _main(entries)
    found += [Heading("Against vanilla, answer by answer", 3), _changes(entries)]
    if len(task["kinds"]) > 1:
        found += [Heading("By kind of question", 3), _kinds(task)]
    if task["turns"]:
        found += [Heading("By turn", 3), Text(_TURNS), _turns(task)]
    if any(entry["yes_no"] for entry in entries):
        found += [Heading("Yes or no", 3), _yes_no(entries)]
    return found + _pairs(task)


def _by_budget(entries: list[dict[str, Any]]) -> list[Block]:
    """Accuracy alone, a line a method, for an eye that looks for the best; nothing where there is little to compare."""
    budgets = list(dict.fromkeys(entry["budget"] for entry in entries if entry["budget"] is not None))
    values: dict[str, dict[float, float]] = {}
    for entry in entries:
        if entry["budget"] is not None and entry["accuracy"]["value"] is not None:
            values.setdefault(entry["series"], {})[entry["budget"]] = entry["accuracy"]["value"]
    if len(budgets) < 2 or len(values) < 3:
        return []
    ranked = sorted(values, key=lambda series: (-len(values[series]), -sum(values[series].values())))
    rows = [[series, *(_percent(values[series].get(budget)) for budget in budgets)] for series in ranked]
    return [
        Heading("Accuracy at each budget, %", 3),
        Text("Most budgets first, then the best mean; without intervals, which stand in the next table."),
        Table(["", *(f"{budget:g}" for budget in budgets)], rows),
        Heading("Every row", 3),
    ]


def _main(entries: list[dict[str, Any]]) -> list[Block]:
    printed = {entry["name"]: published_for(entry["method"] or "", entry["true_average_share"]) for entry in entries}
    columns = [
        "",
        "true tokens",
        "of all, %",
        "FLOPs, %",
        "KV, %",
        "accuracy, %",
        "of vanilla's, %",
        "difference, points",
        "",
    ]
    rows = []
    for entry in entries:
        seeds = f", {entry['seeds']} seeds" if entry["seeds"] > 1 else ""
        cells = [
            entry["name"] + seeds,
            f"{entry['true_average']:.1f}",
            *(_percent(entry[f"{cost}_share"]) for cost in ("true_average", "flops", "kv_bytes")),
            _interval(entry["accuracy"]),
            _interval(entry["relative"]),
            _NOTHING if entry["name"] == VANILLA else _interval(entry["difference"], signed=True),
            entry["verdict"] or "",
        ]
        if any(printed.values()):
            cells.append(str(printed[entry["name"]] or ""))
        rows.append(cells)
    if any(printed.values()):
        columns.append("in print, of vanilla's")
    found: list[Block] = [Table(columns, rows)]
    return [*found, Text(f"In print, and not measured here: {SETTING}.")] if any(printed.values()) else found


def _changes(entries: list[dict[str, Any]]) -> Table:
    figures = ("flips", "correct_to_wrong", "wrong_to_correct", "top1_agreement")
    return Table(
        ["", "flips, %", "right to wrong, %", "wrong to right, %", "same top-1, %", "KL, nats"],
        [
            [entry["name"], *(_percent(entry[figure]) for figure in figures), f"{entry['kl']:.3f}"]
            for entry in entries
            if entry["name"] != VANILLA
        ],
    )


def _kinds(task: dict[str, Any]) -> Table:
    return Table(
        ["", *(f"{kind} ({count})" for kind, count in task["kinds"].items())],
        [[entry["name"], *(_interval(entry["kinds"][kind]) for kind in task["kinds"])] for entry in task["conditions"]],
    )


def _turns(task: dict[str, Any]) -> Table:
    return Table(
        ["", *(f"turn {number + 1}" for number in range(task["turns"]))],
        [[entry["name"], *map(_interval, entry["turns"])] for entry in task["conditions"]],
    )


def _yes_no(entries: list[dict[str, Any]]) -> Table:
    return Table(
        ["", "kind", "precision, %", "recall, %", "answers yes, %"],
        [
            [entry["name"], kind, *(_percent(values[figure]) for figure in ("precision", "recall", "yes_share"))]
            for entry in entries
            for kind, values in entry["yes_no"].items()
        ],
    )


def _pairs(task: dict[str, Any]) -> list[Block]:
    """The first method, and whatever else is ours, against everything else of its budget, and where it loses."""
    there = list(dict.fromkeys(entry["series"] for entry in task["conditions"] if entry["pruned"]))
    return [block for series in there if series == there[0] or series in _OURS for block in _against(task, series)]


def _against(task: dict[str, Any], series: str) -> list[Block]:
    entries = {entry["name"]: entry for entry in task["conditions"]}
    own = {name for name, entry in entries.items() if entry["series"] == series}
    pairs = [pair for pair in task["pairs"] if pair["first"] in own]
    turned = [pair for pair in task["pairs"] if pair["second"] in own and pair["first"] not in own]
    pairs += [_turned(pair) for pair in turned]
    if not pairs:
        return []
    pairs.sort(key=lambda pair: [*entries].index(pair["first"]))
    lost: dict[str, list[str]] = {}
    rows = []
    for pair in pairs:
        first, second = entries[pair["first"]], entries[pair["second"]]
        cells = [pair["first"], pair["second"], _interval(pair["difference"], signed=True), pair["verdict"], ""]
        if pair["verdict"] == "worse":
            lost.setdefault(pair["first"], []).append(second["series"])
            cells[-1] = _most_lost(task, first, second)
        rows.append(cells)
    told = [f"It loses: {name} to {', '.join(others)}." for name, others in lost.items()]
    if task["groups"] < LEAST_GROUPS:
        told = [f"{task['groups']} groups of pictures are too few to tell a difference from chance."]
    return [
        Heading(f"{series} against the others, at the same budget", 3),
        *map(Text, told or ["It loses to none of them by more than chance."]),
        Table(["", "less", "difference, points", "", "lost most in"], rows),
    ]


def _turned(pair: dict[str, Any]) -> dict[str, Any]:
    """The second of a pair against the first."""
    value, low, high = (pair["difference"][key] for key in ("value", "low", "high"))
    other = {"value": value, "low": high, "high": low}
    difference = {key: None if side is None else -side for key, side in other.items()}
    verdict = {"better": "worse", "worse": "better"}.get(pair["verdict"], pair["verdict"])
    return {"first": pair["second"], "second": pair["first"], "difference": difference, "verdict": verdict}


def _most_lost(task: dict[str, Any], entry: dict[str, Any], other: dict[str, Any]) -> str:
    """The two kinds of question that cost it most answers, with the points that it is behind in each."""
    behind = {}
    for kind, count in task["kinds"].items():
        own, theirs = entry["kinds"][kind]["value"], other["kinds"][kind]["value"]
        if own is not None and theirs is not None and own < theirs:
            behind[kind] = (count * (own - theirs), own - theirs)
    worst = sorted(behind, key=behind.__getitem__)[:2] if len(task["kinds"]) > 1 else []
    return ", ".join(f"{kind} ({100 * behind[kind][1]:+.1f})" for kind in worst)


def _latency(latency: dict[str, Any]) -> list[Block]:
    figures = {"ttft_ms": ".1f", "ttft_speed_up": ".2f", "decode_ms_per_token": ".2f"}
    rows = [
        [name, *(_spread(each[figure], digits) for figure, digits in figures.items())]
        for name, each in latency["conditions"].items()
    ]
    return [
        Heading("Latency"),
        Text(
            f"Measured apart from the answers, one by one: the first prompt of {latency['task']} alone, batch "
            f"1, {latency['rounds']} rounds in which every row runs once: median (quartiles). x is over vanilla in the "
            "same round. TTFT: processor-ready inputs to first token. For figures to rely on, run adaptinfer bench."
            + _load(latency["load_average"], latency["cores"])
        ),
        Table(["", "TTFT, ms", "x", "decode, ms/token"], rows),
    ]


def _load(average: float | None, cores: int) -> str:
    busy = average is not None and average > cores
    return f" The machine was busy: load average {average:.1f} on {cores} cores; believe none of these." if busy else ""


def _spread(summary: dict[str, float], digits: str) -> str:
    median, lower, upper = (f"{summary[key]:{digits}}" for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} ({lower} to {upper})"


def _percent(value: float | None) -> str:
    return _NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def _interval(interval: dict[str, float | None], signed: bool = False) -> str:
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return _percent(value)
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


# ---------------------------------------------------------------------------------------------------- two forms


def to_markdown(found: Sequence[Block]) -> str:
    """For people who read it in a repository; pictures are files beside it."""
    parts = []
    for block in found:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {block.text}")
            case Text():
                parts.append(block.text.replace("<", "\\<"))
            case Picture():
                parts.append(f"![{block.text}]({block.path})")
            case Table():
                marks = ["---", *["---:"] * (len(block.columns) - 1)]
                lines = [block.columns, marks, *block.rows]
                parts.append(
                    "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
                )
    return "\n\n".join(parts) + "\n"


def to_html(found: Sequence[Block]) -> str:
    """One file: styles and pictures are in it."""
    title = next(block.text for block in found if isinstance(block, Heading))
    parts = []
    for block in found:
        match block:
            case Heading():
                parts.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
            case Text():
                parts.append(f"<p>{html.escape(block.text)}</p>")
            case Picture():
                data = base64.b64encode(block.data).decode()
                parts.append(f'<img alt="{html.escape(block.text)}" src="data:image/png;base64,{data}">')
            case Table():
                parts.append(_html_table(block))
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(parts))


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "\n".join("<tr>" + "".join(_html_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _html_cell(cell: str) -> str:
    shown = f' class="{cell}"' if cell in ("better", "worse", "open") else ""
    return f"<td{shown}>{html.escape(cell)}</td>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
body { margin: 0; background: #fff; color: #1d2733; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid #e4e8ec; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p { max-width: 52rem; margin: .5rem 0; }
h1 + p { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; color: #46535f; }
img { max-width: 100%; height: auto; margin: .75rem 0; }
.table { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #e4e8ec; white-space: nowrap; }
th { font-weight: 600; color: #46535f; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tbody tr:hover td { background: #f5f8fa; }
.better { color: #2e7d4f; font-weight: 600; }
.worse { color: #b3392a; font-weight: 600; }
.open { color: #6b7785; }
"""
